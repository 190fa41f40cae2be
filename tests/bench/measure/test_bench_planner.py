"""The suite of the planner, on small layers, and the ways to form tiles that it compares."""

import json
from dataclasses import replace

import numpy as np
import pytest
from oracle import partitions

from lhc_bench.measure import planner, suites
from lhc_bench.measure.cases import LayerCase
from lhc_bench.measure.planner_problems import TOPOLOGIES, PlannerCase, planner_cases
from lhc_bench.measure.planner_rivals import (
    EXHAUSTIVE,
    MAX_EXHAUSTIVE,
    METHODS,
    PLANNER,
    applies,
    exhaustive,
    tiles_of,
)
from lhc_bench.measure.rows import write_document
from lhc_bench.pictures import drawing
from lhc_triton.planning.cost import COST_MODELS
from lhc_triton.planning.grouping import candidate_widths
from lhc_triton.planning.schema import LayerTopology

SMALL = LayerCase("tiny-cifar", "a", 64, 96, 6, 6)
OTHER = LayerCase("tiny-cifar", "b", 96, 40, 6, 6, kernel=1)
CASES = (PlannerCase("tiny-cifar", "a", (SMALL,)), PlannerCase("tiny-cifar", "all", (SMALL, OTHER)))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(planner, "planner_cases", lambda: CASES)


def topology(kind="correlated", density=0.3, case=SMALL, out_block=16, seed=0):
    return PlannerCase(case.model, case.layer, (case,), out_block).topologies(kind, density, "cpu", seed)[0]


@pytest.mark.usefixtures("tiny")
def test_the_suite_writes_a_row_for_every_method_under_every_mask(tmp_path):
    seen = []
    found = suites.run_suite("planner", tmp_path, lambda *step: seen.append(step[:2]), densities=(0.1, 0.5))
    results = planner.read_planner(tmp_path / "results.json")
    assert results.to_dict() == found
    assert (tmp_path / "results.csv").read_text().splitlines()[0].startswith("case,model,layer,device")
    assert len(results.rows) == 2 * 2 * len(TOPOLOGIES) * len(COST_MODELS) * len(METHODS)
    for row in results.rows:
        assert row.waste >= 0
        assert (row.kernel, row.tile_width) == (0, 0) or row.layer == "a"
        if row.method in ("no merge", "equal patterns"):
            assert row.waste == pytest.approx(0)
    groups = {}
    for row in results.rows:
        key = (row.case, row.cost_model, row.topology, row.density)
        groups.setdefault(key, {})[row.method] = row.predicted_us
    for times in groups.values():
        assert times[EXHAUSTIVE] == pytest.approx(min(times.values()))
    assert seen[-1] == (36, 36)
    assert found["env"]["cost_models"]["triton"].endswith("modelled, not measured")


@pytest.mark.usefixtures("tiny")
def test_the_summary_tells_ratios_the_optimum_and_the_aims(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "WIDE", 96)
    found = suites.run_suite("planner", tmp_path, densities=(0.2,))["summary"]
    assert {row["method"] for row in found["methods"]} == set(METHODS)
    assert all(
        row["cases"] == 6 and set(row["predicted_ratio"]) == set(TOPOLOGIES) for row in found["methods"]
    )
    assert found["optimum"]["cases"] == 18
    assert 1 <= found["optimum"]["predicted_ratio"] <= found["optimum"]["worst_ratio"] <= 1.02
    assert [aim["aim"] for aim in found["aims"]] == ["a layer of 2,048 filters"]
    assert found["aims"][0]["met"] == (found["aims"][0]["planning_ms"] < 2000)


def test_a_networks_figures_are_the_sums_of_its_layers(tmp_path, monkeypatch):
    parts = tuple(PlannerCase("tiny-cifar", case.layer, (case,)) for case in (SMALL, OTHER))
    monkeypatch.setattr(planner, "planner_cases", lambda: (parts[0], CASES[1]))
    rows = suites.run_suite("planner", tmp_path, densities=(0.3,))["rows"]

    def of(case):
        return {(r["cost_model"], r["topology"], r["method"]): r for r in rows if r["case"] == case}

    first, whole = of("tiny-cifar/a"), of("tiny-cifar/all")
    for key, row in whole.items():
        second = PlannerCase("tiny-cifar", "b", (OTHER,)).topologies(key[1], 0.3, row["device"], 1)[0]
        cost = COST_MODELS[key[0]]
        itemsize = 2 if row["device"] == "cuda" else 4
        rest = planner.choose_tiles(second, cost, itemsize, METHODS[key[2]])[2]
        assert row["predicted_us"] == pytest.approx(first[key]["predicted_us"] + rest)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_every_method_tiles_every_filter_once_within_the_width(method, kind):
    layer = topology(kind)
    for cost in COST_MODELS.values():
        for width in candidate_widths(layer.out_block, layer.geometry.out_channels):
            tiles = METHODS[method](layer, cost, width, 4)
            assert sorted(g for tile in tiles for g in tile.groups) == list(range(layer.groups))
            for tile in tiles:
                assert set(tile.entries) == {e for g in tile.groups for e in layer.pattern_of(g)}
                assert sum(len(layer.group_filters(g)) for g in tile.groups) <= width


@pytest.mark.parametrize("backend", sorted(COST_MODELS))
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_is_that_of_all_partitions(backend, seed):
    cost, layer = COST_MODELS[backend], topology("few patterns", seed=seed)
    # Where memory hides the tiles' own time, that is what is made least.
    price = cost.tiles_us if cost.overlap else cost.sparse_us
    for width in candidate_widths(layer.out_block, layer.geometry.out_channels):
        room = width // layer.out_block
        least = min(
            price(layer, tiles_of(layer, parts), width)
            for parts in partitions(list(range(layer.groups)))
            if max(map(len, parts)) <= room
        )
        assert price(layer, exhaustive(layer, cost, width, 4), width) == pytest.approx(least)


def test_what_would_take_too_long_is_refused_or_left_out():
    wide = topology("independent", case=replace(SMALL, in_channels=512, out_channels=16 * 12))
    assert wide.groups == 12 > MAX_EXHAUSTIVE
    assert not applies(EXHAUSTIVE, wide)
    with pytest.raises(ValueError, match="12 filter groups are too many for all partitions: up to 10"):
        exhaustive(wide, COST_MODELS["native"], 16, 4)
    single = topology("independent", case=replace(SMALL, in_channels=512, out_channels=600), out_block=1)
    assert [name for name in METHODS if applies(name, single)] == [
        name for name in METHODS if name not in ("pairs", EXHAUSTIVE)
    ]


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_topologies_have_their_density_and_no_dead_filter(kind):
    shape = (64, 16, 3, 3)
    mask = TOPOLOGIES[kind](shape, 0.2, 3)
    assert mask.shape == shape
    assert mask.mean() == pytest.approx(0.2, abs=0.02)
    assert mask.reshape(64, -1).any(axis=1).all()
    assert (mask == TOPOLOGIES[kind](shape, 0.2, 3)).all()
    assert (mask != TOPOLOGIES[kind](shape, 0.2, 4)).any()


def test_correlated_patterns_are_more_alike_than_independent_ones():
    def shared(kind):
        rows = TOPOLOGIES[kind]((64, 16, 3, 3), 0.2, 0).reshape(64, -1).astype(float)
        return (rows @ rows.T)[np.triu_indices(64, 1)].mean()

    assert shared("correlated") > 1.3 * shared("independent")
    patterns = LayerTopology.from_mask(
        "few", SMALL.geometry(1), 32, 1, TOPOLOGIES["few patterns"]((96, 2, 3, 3), 0.3, 0)
    ).patterns
    assert len(patterns) <= 12


def test_the_cases_hold_what_the_aims_speak_of():
    cases = {case.name: case for case in planner_cases()}
    assert len(cases["resnet50-imagenet/all"].layers) == 52
    assert cases["wide-imagenet/conv"].layers[0].out_channels == 2048
    assert cases["wide-imagenet/conv, blocks of 1"].out_block == 1
    assert len(planner_cases()) == len(cases)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"only": "nothing"},
            "no case of suite 'planner' has 'nothing' in its name; the cases are tiny",
        ),
        ({"seed": -1}, "seed is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"densities": (0.0,)}, "densities are"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        suites.run_suite("planner", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
def test_the_picture_is_drawn_from_the_file_and_a_damaged_one_is_named(tmp_path):
    found = suites.run_suite("planner", tmp_path, densities=(0.2,), only="/a")
    assert [path.name for path in drawing.draw(tmp_path / "results.json", tmp_path)] == ["planner.png"]
    for change, message in (
        ({"predicted_ratio": 0.5}, "predicted_ratio is 0.5, expected 1 or more"),
        ({"planning_ms": "soon"}, "planning_ms is 'soon', expected a number"),
    ):
        rows = [{**found["rows"][0], **change}, *found["rows"][1:]]
        (tmp_path / "results.json").write_text(json.dumps({**found, "rows": rows}))
        with pytest.raises(ValueError, match=message):
            drawing.draw(tmp_path / "results.json", tmp_path)
    without = [row for row in found["rows"] if row["method"] != PLANNER]
    write_document(tmp_path, {**found, "rows": without}, list(found["rows"][0]))
    with pytest.raises(ValueError, match="it needs a row of the method 'planner'"):
        planner.read_planner(tmp_path / "results.json")
