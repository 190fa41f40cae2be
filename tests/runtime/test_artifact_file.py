"""save() and load(): the same bits, and one clear line for every damaged file."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime_networks import finish, image, resnet, shared, untraceable, vgg
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lhc_triton as lhc
from lhc_triton.artifact import ArtifactError, is_artifact, load, save
from lhc_triton.runtime.accelerate import accelerate
from lhc_triton.runtime.accelerated import AcceleratedModel
from lhc_triton.runtime.modules import DenseConv2d, GroupedConv2d


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path / "cache"))


def run(module: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return module(*inputs)


def quick(model: nn.Module, *inputs: Tensor, backend: str = "torch") -> AcceleratedModel:
    return accelerate(model, inputs or image(size=16), backend=backend, tune="off")


class Everything(nn.Module):
    """Uses most operations that a graph may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 24, 3, padding="same", groups=2)
        self.free = nn.BatchNorm2d(16, track_running_stats=False)
        self.norm = nn.BatchNorm2d(40)
        self.silu = nn.Sequential(nn.SiLU(), nn.ReLU6(), nn.Hardswish(inplace=True), nn.Identity())
        self.gate = nn.Sequential(nn.Hardsigmoid(), nn.Sigmoid())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.mean = nn.AvgPool2d(2)
        self.adaptive = nn.AdaptiveAvgPool2d((2, None))
        self.flat = nn.Flatten()
        self.drop = nn.Dropout(0.5)
        self.id = nn.Identity()
        self.head = nn.Linear(40, 10)
        self.tied = nn.Linear(40, 10)
        self.tied.weight = self.head.weight
        self.offset = nn.Parameter(torch.randn(1, 16, 1, 1))
        self.register_buffer("scale", torch.rand(()))

    def forward(self, x: Tensor, gain: Tensor) -> dict[str, Any]:
        y = self.free(self.a(x) * self.scale + self.offset)
        z = torch.cat([y, self.b(x)], dim=1)
        z = self.pool(self.silu(self.norm(z)) * self.gate(z))
        z = F.hardswish(F.relu6(z)) + F.hardsigmoid(z, inplace=False)
        z = F.max_pool2d(F.relu(z), 2) + F.avg_pool2d(z, kernel_size=2)
        z = z * F.adaptive_avg_pool2d(z, 1)
        z = self.id(z[:, :, 0:2]).contiguous()
        v = z.mean((2, 3)).view(z.size(0), -1)
        w = torch.flatten(F.adaptive_avg_pool2d(z, (1, 1)), 1).reshape(z.shape[0], 40)
        one = self.head(self.drop(v)) + gain.unsqueeze(1)
        return {"one": one, "both": (self.tied(w).relu_(), self.flat(self.adaptive(self.mean(x))))}


def everything() -> nn.Module:
    torch.manual_seed(0)
    return finish(Everything())


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vgg": vgg, "resnet": resnet, "shared": shared}


@pytest.mark.parametrize("backend", ["auto", "dense", "reference", "torch"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_loaded_network_computes_the_same_bits(network: str, backend: str, tmp_path: Path) -> None:
    fast = quick(NETWORKS[network](), backend=backend)
    save(fast, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    for x in (image(size=16), image(batch=3, size=11, seed=4)):
        assert torch.equal(run(again, x), run(fast, x))
    assert again.report() == fast.report()
    assert again.explain() == fast.explain()
    assert again.plan == fast.plan
    assert list(again.state_dict()) == list(fast.state_dict())
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_every_listed_operation_goes_round(tmp_path: Path) -> None:
    inputs = (image(channels=16, size=16), torch.rand(2))
    fast = quick(everything(), *inputs)
    assert fast.report()["traced"]
    save(fast, tmp_path / "net")
    mine, theirs = run(load(tmp_path / "net"), *inputs), run(fast, *inputs)
    assert torch.equal(mine["one"], theirs["one"])
    assert all(torch.equal(a, b) for a, b in zip(mine["both"], theirs["both"], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_types_go_round(dtype: torch.dtype, tmp_path: Path) -> None:
    fast = quick(vgg()).to(dtype)
    save(fast, tmp_path / "net")
    x = image().to(dtype)
    assert torch.equal(run(load(tmp_path / "net"), x), run(fast, x))


def test_what_was_loaded_can_be_saved_and_copied(tmp_path: Path) -> None:
    save(quick(resnet()), tmp_path / "a")
    first = load(tmp_path / "a")
    save(copy.deepcopy(first), tmp_path / "b")
    second = load(tmp_path / "b")
    assert torch.equal(run(first, image()), run(second, image()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_network_that_was_not_traced_needs_its_model(tmp_path: Path) -> None:
    model = untraceable()
    fast = quick(model)
    with pytest.warns(UserWarning, match="the graph cannot be stored .*load.. will need model="):
        save(fast, tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"its graph could not be stored .*give load\(..., model=\)"):
        load(tmp_path / "net")
    again = load(tmp_path / "net", model)
    assert torch.equal(run(again, image(seed=3)), run(fast, image(seed=3)))
    assert again.report() == fast.report()
    assert type(model.body) is nn.Conv2d


class Unlisted(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(torch.relu(self.norm(self.b(self.a(x)))))


def test_a_graph_with_an_unlisted_operation_is_stored_by_its_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = finish(Unlisted())
    fast = quick(model)
    with pytest.warns(UserWarning, match="operation 'erf'"):
        save(fast, tmp_path / "net")
    again = load(tmp_path / "net", model)
    assert torch.equal(run(again, image(seed=3)), run(fast, image(seed=3)))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in again.modules())


@pytest.mark.parametrize("other", [vgg, untraceable, lambda: Unlisted(24).eval(), lambda: "a model"])
def test_another_model_is_refused(other: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="erf"):
        save(quick(finish(Unlisted())), tmp_path / "net")
    with pytest.raises(ArtifactError, match="model="):
        load(tmp_path / "net", other())


def test_a_learned_network_goes_round(tmp_path: Path) -> None:
    model = lhc.freeze(lhc.convert(vgg(), lhc.LHCConfig(in_block=8, out_block=16))).eval()
    fast = quick(model)
    save(fast, tmp_path / "net")
    assert torch.equal(run(load(tmp_path / "net"), image()), run(fast, image()))


def test_is_artifact_knows_its_own(tmp_path: Path) -> None:
    save(quick(vgg()), tmp_path / "net")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("no")
    assert is_artifact(tmp_path / "net")
    assert not any(is_artifact(tmp_path / name) for name in ("other", "text", "missing", "."))


def document_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["lhc_triton"])
        return document, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def rewrite_file(path: Path, document: Any, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, {"lhc_triton": json.dumps(document)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("saved") / "net"
    save(quick(vgg()), path)
    return document_of(path)


def test_a_missing_backend_falls_back_and_says_why(saved: Any, tmp_path: Path) -> None:
    document, tensors = copy.deepcopy(saved)
    for spec in document["modules"].values():
        if spec["type"] == "GroupedConv2d":
            spec["backend"] = "triton"
    document["record"]["requested"] = "triton"
    rewrite_file(tmp_path / "net", document, tensors)
    fast = load(tmp_path / "net")
    rows = [row for row in fast.report()["layers"] if row["patterns"] is not None]
    assert rows
    assert all("triton" in row["reason"] and row["backend"] in ("dense", "native", "torch") for row in rows)
    assert not any(m.backend == "triton" for m in fast.modules() if isinstance(m, GroupedConv2d))
    expected = run(quick(vgg()), image())
    assert torch.allclose(run(fast, image()), expected, atol=1e-5)
    assert [layer.backend for layer in fast.plan.layers] == [row["backend"] for row in rows]


@pytest.mark.parametrize("requested", ["auto", "torch"])
def test_backends_are_chosen_again_on_another_kind_of_device(
    requested: str, saved: Any, tmp_path: Path
) -> None:
    document, tensors = copy.deepcopy(saved)
    document["device"] = "cuda"
    document["record"]["requested"] = requested
    rewrite_file(tmp_path / "net", document, tensors)
    fast = load(tmp_path / "net")
    rows = [row for row in fast.report()["layers"] if row["patterns"] is not None]
    if requested == "auto":
        assert all("chosen again" in row["reason"] for row in rows)
        assert {row["backend"] for row in rows} <= {"dense", "native", "torch"}
    else:
        assert {row["backend"] for row in rows} == {"torch"}
    assert torch.allclose(run(fast, image()), run(quick(vgg()), image()), atol=1e-5)


def test_dense_layers_with_a_plan_may_turn_sparse_on_another_device(tmp_path: Path) -> None:
    save(quick(vgg(), backend="dense"), tmp_path / "net")
    document, tensors = document_of(tmp_path / "net")
    document["device"], document["record"]["requested"] = "cuda", "torch"
    rewrite_file(tmp_path / "net", document, tensors)
    fast = load(tmp_path / "net")
    assert sum(isinstance(module, GroupedConv2d) for module in fast.modules()) == 3
    assert torch.allclose(run(fast, image()), run(vgg(), image()), atol=1e-5)


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "meta", "mps", "sofa", 3.5])
def test_a_device_that_is_not_there_is_one_clear_error(device: Any, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    save(quick(vgg()), tmp_path / "net")
    with pytest.raises(ValueError, match="device="):
        load(tmp_path / "net", device=device)


def test_a_failed_save_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(quick(vgg()), tmp_path / "net")
    before = (tmp_path / "net").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*net: No space left"):
        save(quick(resnet()), tmp_path / "net")
    assert (tmp_path / "net").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["net"]


def test_threads_may_save_and_load_one_file(tmp_path: Path) -> None:
    fast = quick(vgg())
    expected = run(fast, image())

    def turn(_: int) -> bool:
        save(fast, tmp_path / "net")
        return torch.equal(run(load(tmp_path / "net"), image()), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(turn, range(12)))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["net"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "missing" / "net", tmp_path / "file" / "net"):
        with pytest.raises(OSError, match="choose a folder that exists and is writable") as caught:
            save(quick(vgg()), target)
        assert "\n" not in str(caught.value)


def test_save_takes_accelerated_networks_only(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not a Sequential"):
        save(vgg(), tmp_path / "net")  # type: ignore[arg-type]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path)


def test_a_device_that_fails_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    save(quick(vgg()), tmp_path / "net")
    monkeypatch.setattr("lhc_triton.artifact.retarget", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        load(tmp_path / "net")


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


DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "newer version": (lambda d: d.update(format_version=2), "format version 2 is not supported"),
    "no version": (lambda d: d.pop("format_version"), "format version None"),
    "lost field": (lambda d: d.pop("plan"), "missing or unknown fields"),
    "extra field": (lambda d: d.update(code="import os"), "missing or unknown fields"),
    "unknown kind": (lambda d: d.update(kind="pickle"), "missing or unknown fields"),
    "unknown dtype": (lambda d: d.update(dtype="object"), "dtype"),
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
        "out of bounds",
    ),
    "site of no layer": (lambda d: d["record"].update(sites=[{}]), "Site has missing"),
    "rows of text": (lambda d: d["record"].update(rows="many"), "record is not valid"),
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
    assert "\n" not in str(caught.value)
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


def test_loading_restores_the_dense_layout(tmp_path: Path) -> None:
    save(quick(vgg(), backend="dense"), tmp_path / "net")
    dense = [m for m in load(tmp_path / "net").modules() if isinstance(m, DenseConv2d)]
    assert dense
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in dense)
