"""A small file cannot ask for much: memory by what the file holds, time by a budget."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_files import document_of, quick, rewrite_file, run
from runtime_networks import image, vgg
from torch import Tensor, nn

from lhc_triton.artifact import ArtifactError, load, save
from lhc_triton.runtime.saved.sealed_file import sealed

GROWN = 256 * 2**20  # bytes that refusing a file of some kilobytes may take, generously


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("saved") / "net"
    save(quick(vgg()), path)
    return document_of(path)


def largest() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refused(path: Path) -> str:
    before = largest()
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert largest() - before < GROWN
    assert str(caught.value).isprintable()
    return str(caught.value)


def without_weights(layer: dict[str, Any], **geometry: Any) -> None:
    """Make a layer of the plan a huge one that has no live weight, so that the file need hold none."""
    layer["geometry"].update(geometry)
    sizes = layer["geometry"]
    layer.update(
        in_block=sizes["in_channels"],
        out_block=sizes["out_channels"],
        patterns=[[]],
        group_pattern=[0],
        tiles=[{"groups": [0], "entries": []}],
        tile_width=1 << (sizes["out_channels"] - 1).bit_length(),
    )


def empty_groups(layer: dict[str, Any], groups: int, entries: int) -> None:
    """Give a layer many filter groups of no weight, each in a tile of its own."""
    layer["geometry"].update(in_channels=entries, out_channels=groups, kernel=[1, 1])
    layer.update(in_block=1, out_block=1, patterns=[[]], group_pattern=[0] * groups)
    layer["tiles"] = [{"groups": [group], "entries": []} for group in range(groups)]


def all_entries(layer: dict[str, Any]) -> None:
    """Give a tile every entry there is, though no group has them."""
    sizes = layer["geometry"]
    blocks = -(-sizes["in_channels"] // layer["in_block"])
    for tile in layer["tiles"]:
        tile["entries"] = list(range(blocks * 9))


CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a wide tile": (lambda layer: layer.update(tile_width=2**24), "tile_width is 16777216; up to 128 are"),
    "entries that no group has": (all_entries, "a tile has entries that none of its filter groups has"),
    "many channels": (
        lambda layer: without_weights(layer, in_channels=2**20, out_channels=2**20),
        "brings its weights to",
    ),
    "many cells": (lambda layer: empty_groups(layer, 2**12, 5500), "brings its cells to 22528000"),
    "a long kernel": (
        lambda layer: without_weights(layer, in_channels=2**20, kernel=[2, 2**16], width=2**17),
        "brings its weights to",
    ),
    "a far step": (lambda layer: layer["geometry"].update(stride=[2**24, 1]), "stride is 16777216"),
    "a far tap": (lambda layer: layer["geometry"].update(dilation=[2**23, 1]), "dilation is 8388608"),
    "a wide border": (lambda layer: layer["geometry"].update(padding=[2**20, 0, 0, 0]), "padding is 1048576"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_plan_claims_is_bounded_by_what_the_file_holds(claim: str, saved: Any, tmp_path: Path) -> None:
    document, tensors = copy.deepcopy(saved)
    change, said = CLAIMS[claim]
    change(document["plan"]["layers"][0])
    rewrite_file(tmp_path / "net", document, tensors)
    assert said in refused(tmp_path / "net")


def test_many_modules_of_one_layer_count_each(saved: Any, tmp_path: Path) -> None:
    document, tensors = copy.deepcopy(saved)
    layer = document["plan"]["layers"][0]
    empty_groups(layer, 1024, 1)
    layer["tile_width"] = 128
    spec = next(spec for spec in document["modules"].values() if spec.get("layer") == layer["name"])
    document["modules"].update({f"more{number}": spec for number in range(500)})
    rewrite_file(tmp_path / "net", document, tensors)
    assert "brings its packed weights to" in refused(tmp_path / "net")


def test_one_long_pattern_named_by_many_groups_is_counted_before_it_is_walked(
    saved: Any, tmp_path: Path
) -> None:
    document, tensors = copy.deepcopy(saved)
    layer = document["plan"]["layers"][0]
    groups, entries = 10_000, 10_000
    layer["geometry"].update(in_channels=entries, out_channels=groups, kernel=[1, 1])
    layer.update(in_block=1, out_block=1, tile_width=128, patterns=[list(range(entries))])
    layer.update(group_pattern=[0] * groups, tiles=[])
    rewrite_file(tmp_path / "net", document, tensors)
    assert "100000000 live blocks; up to 16777216 are read" in refused(tmp_path / "net")


def test_a_dense_layer_may_not_step_far(tmp_path: Path) -> None:
    save(quick(vgg(), backend="dense"), tmp_path / "net")
    document, tensors = document_of(tmp_path / "net")
    for field, value in (("stride", [2**20, 1]), ("padding", [0, 0, 0, 2**28]), ("dilation", [1, 2**30])):
        changed = copy.deepcopy(document)
        next(iter(changed["modules"].values()))[field] = value
        rewrite_file(tmp_path / "net", changed, tensors)
        assert "stride, padding and dilation are supported up to 4096" in refused(tmp_path / "net")


def graph_of(document: dict[str, Any], *steps: tuple[str, str, list[Any]]) -> None:
    """Put steps (op, target, args) before the output; "it" stands for the step before."""
    first = document["nodes"][0]["name"]
    for number, (op, target, args) in enumerate(steps):
        before = f"step{number - 1}" if number else first
        given = [{"node": before} if arg == "it" else arg for arg in args]
        entry = {"name": f"step{number}", "op": op, "target": target, "args": given, "kwargs": {}}
        document["nodes"].insert(-1, entry)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            [("call_method", "size", ["it", 0]), *[("call_function", "mul", ["it", "it"])] * 60],
            "mul: its result may have 320 bits, more than 256",
        ),
        (
            [("call_function", "shape", ["it", "shape"]), *[("call_function", "add", ["it", "it"])] * 60],
            "add: an operand is a shape or a list",
        ),
        (
            [("call_function", "shape", ["it", "shape"]), ("call_function", "mul", ["it", 2**40])],
            "mul: an operand is a shape or a list",
        ),
        (
            [("call_method", "chunk", ["it", 2]), *[("call_function", "iadd", ["it", "it"])] * 60],
            "iadd: an operand is a shape or a list",
        ),
    ],
    ids=["squared sizes", "doubled shapes", "a shape many times", "doubled lists"],
)
def test_numbers_and_lists_of_a_graph_cannot_grow_without_bound(
    steps: list[Any], said: str, saved: Any, tmp_path: Path
) -> None:
    document, tensors = copy.deepcopy(saved)
    graph_of(document, *steps)
    rewrite_file(tmp_path / "net", document, tensors)
    assert said in refused(tmp_path / "net")


def test_numbers_of_real_graphs_may_be_calculated(saved: Any, tmp_path: Path) -> None:
    document, tensors = copy.deepcopy(saved)
    size = [("call_method", "size", ["it", 1]), *[("call_function", "mul", ["it", 2])] * 8]
    shape = [("call_function", "shape", ["it", "shape"]), ("call_function", "getitem", ["it", -1])]
    graph_of(document, *size, ("call_function", "floordiv", ["it", 3]))
    rewrite_file(tmp_path / "net", document, tensors)
    assert torch.equal(run(load(tmp_path / "net"), image()), run(quick(vgg()), image()))
    document = copy.deepcopy(saved)[0]
    graph_of(document, *shape, ("call_function", "sub", ["it", 1]))
    rewrite_file(tmp_path / "net", document, tensors)
    assert torch.equal(run(load(tmp_path / "net"), image()), run(quick(vgg()), image()))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' * 50_000, "", "null", "[1", '{"a": ' + "1" * 5000])
def test_a_document_that_is_no_json_object_is_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"".join(sealed(text, {"x": torch.zeros(1)})))
    assert "its document is not" in refused(tmp_path / "net")


def test_nesting_inside_the_document_is_one_clear_line(saved: Any, tmp_path: Path) -> None:
    document, tensors = saved
    for key in ("plan", "nodes", "record", "modules", "outline"):
        text = json.dumps({**document, key: "HERE"}).replace('"HERE"', "[" * 900 + "]" * 900)
        rewrite_file(tmp_path / "net", text, tensors)
        if key == "outline":  # of no use to a graph
            load(tmp_path / "net")
        else:
            refused(tmp_path / "net")


def test_layers_of_too_many_patterns_keep_their_tiles_on_another_device(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, tensors = copy.deepcopy(saved)
    document["device"], document["record"]["requested"] = "cuda", "auto"
    rewrite_file(tmp_path / "net", document, tensors)
    monkeypatch.setattr("lhc_triton.runtime.saved.retarget.MAX_COMPARED", 0)
    fast = load(tmp_path / "net")
    rows = [row for row in fast.report()["layers"] if row["patterns"] is not None]
    assert all("the tiles are the file's, for there are too many patterns" in row["reason"] for row in rows)
    for layer, stored in zip(fast.plan.layers, document["plan"]["layers"], strict=True):
        assert [list(tile.groups) for tile in layer.tiles] == [tile["groups"] for tile in stored["tiles"]]
    assert torch.allclose(run(fast, image()), run(vgg(), image()), atol=1e-5)


def test_a_network_that_load_would_refuse_is_refused_by_save(tmp_path: Path) -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, stride=5000, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    (tmp_path / "net").write_text("the old file")
    fast = quick(Far().eval())
    with (
        pytest.warns(UserWarning, match="the graph cannot be stored"),
        pytest.raises(ArtifactError, match=r"cannot be saved: module 'conv' \(DenseConv2d\): stride, pad"),
    ):
        save(fast, tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert (tmp_path / "net").read_text() == "the old file"
