"""Pictures of reports: whose they are, what they compare, and what a reader could not see otherwise."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from fabricated_runs import COARSE, FINE, fabricated_run

from lhc_bench.reports import experiment_pictures
from lhc_bench.reports.experiment_pictures import (
    accuracy_figure,
    layers_figure,
    shapes_figure,
    training_figure,
)
from lhc_bench.reports.experiment_rows import Timed, dense_twins, describe, experiments, labels
from lhc_bench.reports.report import make_report
from lhc_bench.reports.runs import read_run


@pytest.fixture
def made(tmp_path):
    """Experiments of runs with these settings."""

    def make(*settings):
        folders = [fabricated_run(tmp_path / f"run{n}", **one) for n, one in enumerate(settings)]
        return experiments([describe(read_run(folder), 1) for folder in folders])

    return make


def test_a_setting_is_named_where_it_is_not_that_of_most_runs(tmp_path):
    base = {"in_block": 8, "out_block": 8}
    changes = ({}, {"out_block": 16}, {"out_block": 32}, {"penalty": "macs"}, {"penalty": "latency"})
    runs = [
        read_run(fabricated_run(tmp_path / f"{number}", **{**base, **change}))
        for number, change in enumerate(changes)
    ]
    named = [
        "out_block 8, penalty weights",
        "out_block 16",
        "out_block 32",
        "penalty macs",
        "penalty latency",
    ]
    assert labels(runs) == named
    assert labels(runs[:3]) == ["out_block 8", "out_block 16", "out_block 32"]  # none is that of most
    assert labels(runs[:1]) == ["small VGG"]


def test_dense_twins_of_other_recipes_stay_apart_and_shared_ones_count_once(made):
    found = made({"seed": 0}, {"seed": 1}, {"out_block": 16, "seed": 0}, {"lr": 0.02, "seed": 0})
    accuracy = [[row.run.dense_accuracy for row in experiment.rows] for experiment in found]
    twins = dense_twins(found)
    assert list(twins) == [f"dense twin, lr {found[0].first.run.config.lr:g}", "dense twin, lr 0.02"]
    assert [twin.accuracy for twin in twins.values()] == pytest.approx(
        [(accuracy[1][0] + accuracy[0][1]) / 2, accuracy[2][0]], abs=1e-12
    )
    assert {(twin.weights, twin.macs) for twin in twins.values()} == {
        (found[0].first.weights, found[0].first.macs)
    }
    assert list(dense_twins(found[:2])) == ["dense twin"]


def test_a_setting_that_means_nothing_beside_the_others_is_not_named(tmp_path):
    gradual = {"mac_share": 0.3, "gradual": True, "warmup_epochs": 2}
    changes = (gradual, {**gradual, "density": 0.5}, {"topology": "pruned"}, {"topology": "cross"})
    runs = [
        read_run(fabricated_run(tmp_path / f"{number}", **change)) for number, change in enumerate(changes)
    ]
    assert labels(runs) == [
        "topology learned",
        "topology learned, density 0.5",
        "topology pruned",
        "topology cross",
    ]


def test_accuracy_is_drawn_against_what_the_whole_network_costs(made):
    found = made({"seed": 0}, {"seed": 1}, {"out_block": 16, "seed": 0})
    axes = accuracy_figure(found, ["live_weights", "live_macs"]).axes
    for axis, name, unit in ((axes[0], "weights", 1e3), (axes[1], "macs", 1e6)):
        drawn = {
            line.get_label(): line.get_xdata()[0] for line in axis.lines if line.get_label() == "dense twin"
        }
        assert drawn == {"dense twin": getattr(found[0].first, name) / unit}
        means = [container.lines[0].get_xdata()[0] for container in axis.containers]
        live = [[getattr(row, f"live_{name}") for row in experiment.rows] for experiment in found]
        assert means == pytest.approx([sum(values) / len(values) / unit for values in live])
        low, high = axis.get_xlim()
        assert all(low < x < high for x in [*means, *drawn.values()])


def test_measured_time_is_what_a_network_costs_too(made):
    times = ((4e3, 1e3), (6e3, 3e3), (9e3, 9e3))
    plain = made({}, {"out_block": 16}, {"out_block": 32, "with_twin": False})
    found = [
        replace(one, rows=(replace(one.first, measured=Timed("cpu", "float32", 8, *both, "")),))
        for one, both in zip(plain, times, strict=True)
    ]
    assert [experiment.mean("time_us") for experiment in found] == [1e3, 3e3, 9e3]
    (twin,) = dense_twins(found).values()
    assert twin.time_us == 5e3, "what stands for a twin where there is none is no twin"
    axis = accuracy_figure(found, ["live_weights", "live_macs", "time_us"]).axes[2]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_label() == "dense twin"] == [5.0]
    assert [container.lines[0].get_xdata()[0] for container in axis.containers] == [1.0, 3.0, 9.0]
    (unmeasured,) = dense_twins(plain[:1]).values()
    assert unmeasured.time_us is None


@pytest.mark.parametrize(
    "against",
    [["density"], ["live_weights", "live_macs"], ["live_weights", "live_macs", "predicted_cpu"]],
    ids=len,
)
def test_the_legend_has_a_column_for_each_panel_and_overlaps_nothing(made, against):
    plain = made(*({"out_block": 8 * block} for block in range(1, 8)))
    labels = [f"setting {number}, " + "of WIDE NAMES " * (7 * number % 13) for number in range(len(plain))]
    drawn = accuracy_figure(
        [replace(one, label=label) for one, label in zip(plain, labels, strict=True)], against
    )
    drawn.canvas.draw()
    (legend,) = drawn.legends
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert len({round(box.x0) for box in boxes}) == len(against)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    whole = legend.get_window_extent()
    assert whole.x0 >= 0
    assert whole.x1 <= drawn.bbox.width
    caption = min((text.get_window_extent() for text in drawn.texts), key=lambda box: box.y0)
    assert whole.y0 >= caption.y1
    assert whole.y1 <= min(axis.xaxis.get_tightbbox().y0 for axis in drawn.axes)


@pytest.mark.parametrize("figure", [training_figure, layers_figure, shapes_figure])
def test_a_picture_says_whose_it_is_within_its_width(made, figure):
    experiment = replace(made({})[0], label="a label of many settings, " * 8)
    drawn = figure(experiment)
    title = next(text for text in drawn.texts if experiment.label in text.get_text())
    assert title.get_window_extent().x1 <= drawn.bbox.width


def test_pictures_of_an_earlier_larger_report_are_removed_and_others_stay(tmp_path):
    names = ("02_training.png", "13_topology_2.png", "accuracy_density_cifar10.png", "02_notes.png", "my.png")
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    make_report([fabricated_run(tmp_path / "run")], tmp_path, batch=1)
    assert [name for name in names if (tmp_path / name).exists()] == ["02_notes.png", "my.png"]
    assert (tmp_path / "01_training.png").exists()


@pytest.mark.parametrize(("seed", "beside"), [(0, True), (1, False)])
def test_the_curve_of_a_shared_dense_twin_is_that_of_the_run_beside(tmp_path, seed, beside):
    first = fabricated_run(tmp_path / "first", seed=0)
    folder = fabricated_run(tmp_path / "second", seed=seed, out_block=16, dense_twin="/moved/first")
    run = read_run(folder)
    dense = [row for row in run.epochs if row["stage"] == "dense"]
    assert dense == ([row for row in read_run(first).epochs if row["stage"] == "dense"] if beside else [])
    assert bool(run.notes) is not beside
    figure = training_figure(experiments([describe(run, 1)])[0])
    assert any("no curve" in text.get_text() for text in figure.texts) is not beside
    assert ("dense twin" in figure.axes[0].get_legend_handles_labels()[1]) is beside


def test_a_dense_stage_longer_than_both_others_is_drawn_whole(made, tmp_path):
    folder = fabricated_run(tmp_path / "run")
    with (folder / "metrics.csv").open("a") as file:
        file.writelines(f"dense,{COARSE + FINE + more},0.1,1.0,1.0,0.8\n" for more in range(4))
    figure = training_figure(experiments([describe(read_run(folder), 1)])[0])
    assert figure.axes[0].get_xlim()[1] >= COARSE + FINE + 3


def shape_texts(experiment, monkeypatch, *layers):
    """The numbers in the shapes' picture, with their colours, where the layers' shapes are these."""
    monkeypatch.setattr(experiment_pictures, "_shape_counts", lambda rows, place: Counter(layers[place]))
    texts = shapes_figure(experiment).axes[0].texts
    return [(text.get_text(), text.get_color()) for text in texts]


def test_a_narrow_layer_has_its_say_in_which_shapes_are_shown(made, monkeypatch):
    wide = {f"{bits // 64:03b}/{bits // 8 % 8:03b}/{bits % 8:03b}": 1000 for bits in range(1, 40)}
    found = shape_texts(made({})[0], monkeypatch, wide, {"111/111/110": 5, "111/111/111": 5})
    assert [text for text, _ in found].count("50") == 2


def test_numbers_are_white_on_dark_cells_only(made, monkeypatch):
    half = {"111/111/111": 1, "010/111/010": 1}
    found = shape_texts(made({})[0], monkeypatch, {"111/111/111": 1}, half)
    assert sorted(found) == [("100", "white"), ("50", "black"), ("50", "black")]
