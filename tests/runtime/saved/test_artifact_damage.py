"""Damaged and hostile files: one clear line each, before anything is allocated or run."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_files import document_of, quick, rewrite_file
from runtime_networks import vgg
from safetensors.torch import save_file
from torch import Tensor

from lhc_triton.artifact import ArtifactError, load, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("saved") / "net"
    save(quick(vgg()), path)
    return document_of(path)


def test_truncated_files_and_strangers_are_refused(tmp_path: Path) -> None:
    save(quick(vgg()), tmp_path / "net")
    content = (tmp_path / "net").read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "net").write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="truncated, damaged") as caught:
            load(tmp_path / "net")
        assert "\n" not in str(caught.value)
    save_file({"x": torch.zeros(1)}, tmp_path / "net")
    with pytest.raises(ArtifactError, match="not one that lhc_triton"):
        load(tmp_path / "net")


def node(document: Any, op: str) -> Any:
    return next(item for item in document["nodes"] if item["op"] == op)


def grouped(document: Any) -> Any:
    return next(spec for spec in document["modules"].values() if spec["type"] == "GroupedConv2d")


def linear(document: Any) -> Any:
    return next(spec for spec in document["modules"].values() if spec["type"] == "Linear")


def norm(document: Any, eps: Any) -> None:
    document["modules"]["norm"] = {
        "type": "BatchNorm2d",
        "num_features": 4,
        "eps": eps,
        **dict.fromkeys(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"), True),
    }


def again(document: Any, name: str, target: str = "more") -> None:
    """Give the graph a second input."""
    first = node(document, "placeholder")
    document["nodes"].insert(1, {**first, "name": name, "target": target})


DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "older version": (
        lambda d: d.update(format_version=1),
        "format version 1 is not supported, this",
    ),
    "newer version": (lambda d: d.update(format_version=99), "format version 99 is not supported"),
    "version of 4000 digits": (lambda d: d.update(format_version=10**4000), "format version 1000.* is not"),
    "no version": (lambda d: d.pop("format_version"), "format version None"),
    "lost field": (lambda d: d.pop("plan"), "missing or unknown fields"),
    "extra field": (lambda d: d.update(code="import os"), "missing or unknown fields"),
    "unknown kind": (lambda d: d.update(kind="pickle"), "missing or unknown fields"),
    "unknown dtype": (lambda d: grouped(d).update(dtype="object"), "dtype='object' is no valid dtype"),
    "other dtype": (lambda d: grouped(d).update(dtype="float16"), "its module needs torch.float16"),
    "whole numbers": (lambda d: grouped(d).update(dtype="int8"), "dtype='int8' is no valid dtype"),
    "plan version": (lambda d: d["plan"].update(version=99), "its plan is not valid"),
    "plan is a list": (lambda d: d.update(plan=[]), "its plan is not valid"),
    "unknown function": (
        lambda d: d["nodes"].insert(
            1,
            {"name": "n", "op": "call_function", "target": "os.system", "args": ["ls"], "kwargs": {}},
        ),
        "operation 'os.system' is unknown",
    ),
    "unknown method": (
        lambda d: d["nodes"].insert(
            1, {"name": "n", "op": "call_method", "target": "__reduce__", "args": [], "kwargs": {}}
        ),
        "operation '__reduce__' is unknown",
    ),
    "unknown kind of node": (lambda d: node(d, "call_module").update(op="root"), "'root' is unknown"),
    "code in a name": (lambda d: node(d, "placeholder").update(target="x, y=print('hi')"), "not allowed"),
    "keyword as a name": (lambda d: node(d, "placeholder").update(target="lambda"), "not allowed"),
    "code in a module's name": (
        lambda d: (
            d["modules"].update({'a"); print("hi': {"type": "Identity"}}),
            node(d, "call_module").update(target='a"); print("hi'),
        ),
        "not allowed",
    ),
    "module named as a method": (
        lambda d: (
            d["modules"].update(forward={"type": "Identity"}),
            node(d, "call_module").update(target="forward"),
        ),
        "not allowed",
    ),
    "unknown module": (lambda d: linear(d).update(type="LSTM"), "not on the list"),
    "missing argument": (lambda d: linear(d).pop("in_features"), "in_features are missing or unknown"),
    "negative size": (lambda d: linear(d).update(in_features=-3), "no valid size"),
    "huge size": (lambda d: linear(d).update(in_features=2**40), "no valid size"),
    "size as text": (lambda d: linear(d).update(in_features="48"), "no valid size"),
    "other size": (lambda d: linear(d).update(in_features=47), "has shape"),
    "layer without plan": (lambda d: grouped(d).update(layer="nowhere"), "not in the plan"),
    "unknown activation": (lambda d: grouped(d).update(activation="exec"), "activation='exec'"),
    "no bias": (lambda d: grouped(d).update(bias=False), "missing or unknown"),
    "undefined node": (
        lambda d: node(d, "call_module").update(args=[{"node": "later"}]),
        "'later', which does not come before",
    ),
    "no output": (lambda d: d["nodes"].pop(), "must end with its one output"),
    "two outputs": (lambda d: d["nodes"].append(d["nodes"][-1]), "must end with its one output"),
    "no nodes": (lambda d: d.update(nodes=None), "no list of nodes"),
    "unmarked dict": (lambda d: node(d, "call_module").update(args=[{"eval": "1"}]), "marked 'eval'"),
    "infinite number": (
        lambda d: node(d, "call_module").update(args=[float("inf")]),
        "not valid JSON .Infinity is not a number that JSON has",
    ),
    "site of no layer": (lambda d: d["record"].update(sites=[{}]), "Site has missing"),
    "rows of text": (lambda d: d["record"].update(rows="many"), "invalid rows"),
    "rows without end": (lambda d: d["record"].update(rows=[{}] * 100_001), "invalid rows"),
    "density above 1": (lambda d: d["record"]["rows"][0].update(density=1.5), "invalid density"),
    "negative time": (lambda d: d["record"]["rows"][0].update(predicted_us=-1.0), "invalid predicted_us"),
    "error that is no number": (
        lambda d: d["record"].update(output_error=float("nan")),
        "NaN is not a number that JSON has",
    ),
    "MACs of 400 digits": (lambda d: d["record"]["rows"][0].update(macs=10**400), "invalid macs"),
    "number of 400 digits": (
        lambda d: node(d, "call_module").update(args=[10**400]),
        "a number is out of bounds",
    ),
    "block of 400 digits": (
        lambda d: d["plan"]["layers"][0].update(in_block=10**400),
        "in_block is a number of more than 60 digits",
    ),
    "eps of 400 digits": (lambda d: norm(d, 10**400), "no valid number"),
    "unknown backend of a row": (lambda d: d["record"]["rows"][0].update(backend="gpu"), "invalid backend"),
    "unknown request": (lambda d: d["record"].update(requested="magic"), "invalid requested"),
    "dense in a sparse layer": (
        lambda d: grouped(d).update(backend="dense"),
        "backend 'dense' runs no sparse layer",
    ),
    "inputs of one name": (
        lambda d: again(d, "y", target="input"),
        "'input' has arguments, or is there",
    ),
    "an input that Python knows": (lambda d: again(d, "y", target="__debug__"), "'__debug__' is not allowed"),
    "an input that is the network": (lambda d: again(d, "y", target="self"), "'self' is not allowed"),
    "a node that Python knows": (lambda d: again(d, "__debug__"), "'__debug__' is not allowed"),
    "a name that writes to the terminal": (
        lambda d: d["record"].update(model="\x1b[2J\x1b]0;owned\x07"),
        "invalid model",
    ),
    "a name of a megabyte": (lambda d: grouped(d).update(layer="x" * 2**20), "no valid text"),
    "a module of a megabyte": (
        lambda d: d["modules"].update({"x" * 2**20: {"type": "LSTM"}}),
        "module 'x{80}' .LSTM.: the type is not on the list",
    ),
    "a type that writes to the terminal": (
        lambda d: linear(d).update(type="\x1b[2J"),
        r"\(\\x1b\[2J\): the type is not on the list",
    ),
    "row with text for a number": (
        lambda d: d["record"]["rows"][0].update(macs="many"),
        "invalid macs",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_document_is_one_clear_line(case: str, saved: Any, tmp_path: Path) -> None:
    damage, message = DAMAGES[case]
    document, tensors = copy.deepcopy(saved)
    damage(document)
    rewrite_file(tmp_path / "net", document, tensors)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(tmp_path / "net")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    assert str(tmp_path / "net") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.bias"), "missing or unknown: 0.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "missing or unknown: extra"),
        (lambda t: t.update({"3.blocks": t["3.blocks"][1:].clone()}), "'3.blocks' has shape"),
        (lambda t: t.update({"3.blocks": t["3.blocks"].half()}), "'3.blocks' is torch.float16"),
        (lambda t: t.update({"3.blocks": t["3.blocks"].int()}), "'3.blocks' is torch.int32"),
        (
            lambda t: t.update({"0.weight": t["0.weight"].transpose(2, 3)[:, :2].contiguous()}),
            "'0.weight' has shape",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[Any], Any], message: str, saved: Any, tmp_path: Path
) -> None:
    document, tensors = copy.deepcopy(saved)
    change(tensors)
    rewrite_file(tmp_path / "net", document, tensors)
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "net")


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, item in items for leaf in _leaves(item, (*path, key)))]


def test_random_damage_never_gives_anything_but_an_artifact_error(saved: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    junk = [
        None,
        True,
        -1,
        0,
        3,
        2**31,
        2**70,
        1.5,
        "",
        "x",
        "torch",
        [],
        [1],
        [None],
        {},
        {"node": "x"},
        [[1]],
    ]
    paths = [path for path in _leaves(saved[0]) if path]
    # every part of the document, few of the many alike entries of the plan
    messages = []
    short = [path for path in paths if len(path) < 5 or path[0] != "plan"]
    for path in rng.sample(short, 250) + rng.sample(paths, 50):
        document = copy.deepcopy(saved[0])
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = rng.choice(junk)
        rewrite_file(tmp_path / "net", document, saved[1])
        try:
            load(tmp_path / "net")
        except ArtifactError as error:
            messages.append(str(error))
    assert len(messages) > 150
    assert not any("\n" in message for message in messages)
    assert sum("damaged (" in message for message in messages) < 10
