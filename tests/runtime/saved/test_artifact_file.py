"""save() and load(): the same bits, whole files, and what happens on another device."""

from __future__ import annotations

import copy
import os
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from artifact_files import document_of, quick, rewrite_file, run
from oracle import norm_error
from runtime_networks import finish, image, resnet, shared, vgg
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lhc_triton as lhc
from lhc_triton.artifact import ArtifactError, is_artifact, load, save
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.op.dense import DenseConv2d


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path / "cache"))


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


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for place, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), ("/dev/null", "a device")):
        with pytest.raises(OSError, match=f"{place} is {kind}; give the name of a file"):
            load(place)
        with pytest.raises(OSError, match=f"^{place} is {kind}; give the name of a file$"):
            save(quick(vgg()), place)


def test_a_device_that_fails_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    save(quick(vgg()), tmp_path / "net")
    monkeypatch.setattr("lhc_triton.artifact.retarget", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        load(tmp_path / "net")


def test_loading_restores_the_memory_format_of_dense_weights(tmp_path: Path) -> None:
    save(quick(vgg(), backend="dense"), tmp_path / "net")
    dense = [m for m in load(tmp_path / "net").modules() if isinstance(m, DenseConv2d)]
    assert dense
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in dense)


class Mixed(nn.Module):
    """Computes its middle in another type, without a conversion in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(3, 16, 3, padding=1).bfloat16()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


def test_layers_of_different_types_go_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = image(size=16)
    fast = quick(finish(Mixed()), x, x.bfloat16(), backend="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(fast, tmp_path / "net")
    again = load(tmp_path / "net")
    assert torch.equal(run(again, x, x.bfloat16()), run(fast, x, x.bfloat16()))
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32, torch.bfloat16}


def norms() -> dict[str, nn.BatchNorm2d]:
    """Batch norms of which something is missing, each with values of its own in what is left."""
    made = {
        "whole": nn.BatchNorm2d(16),
        "flag alone": nn.BatchNorm2d(16),
        "no statistics": nn.BatchNorm2d(16, track_running_stats=False),
        "no bias": nn.BatchNorm2d(16),
        "no weight": nn.BatchNorm2d(16),
        "neither": nn.BatchNorm2d(16, affine=False),
        "nothing": nn.BatchNorm2d(16, affine=False, track_running_stats=False),
        "no counter": nn.BatchNorm2d(16),
    }
    made["flag alone"].track_running_stats = False
    made["no bias"].bias = None
    made["no weight"].weight = None
    made["no counter"].num_batches_tracked = None
    return made


@pytest.mark.parametrize("kind", norms())
@pytest.mark.parametrize("folded", [True, False])
def test_a_batch_norm_goes_round_whatever_it_lacks(kind: str, folded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = norms()[kind]
    between = [nn.ReLU()] if not folded else []
    conv = nn.Conv2d(3, 16, 3, padding=1)
    model = nn.Sequential(conv, *between, norm, nn.Conv2d(16, 16, 3, padding=1)).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None:
            with torch.no_grad():
                tensor.copy_(torch.rand(16) + 0.5)
    fast = quick(model, backend="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(fast, tmp_path / "net")
    again, x = load(tmp_path / "net"), image(seed=3)
    assert torch.equal(run(again, x), run(fast, x))
    assert norm_error(run(again, x), run(model.double(), x.double())) < 1e-5
    assert list(again.state_dict()) == list(fast.state_dict())


def test_a_running_network_does_not_feel_what_becomes_of_its_file(tmp_path: Path) -> None:
    path, x = tmp_path / "net", image()
    save(quick(vgg()), path)
    fast = load(path, graphs=False)
    before = run(fast, x)
    size = path.stat().st_size
    with path.open("r+b") as file:  # as cp does over an existing file
        file.write(b"\xff" * size)
    assert torch.equal(run(fast, x), before)
    os.truncate(path, 0)
    assert torch.equal(run(fast, x), before)
    path.unlink()
    assert torch.equal(run(fast, x), before)
    save(fast, path)
    assert torch.equal(run(load(path), x), before)


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".net.0123456789abcdef.tmp").write_bytes(b"half")
    save(quick(vgg()), tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["net"]


def test_the_digest_finds_every_changed_byte_and_can_be_left_out(tmp_path: Path) -> None:
    path, x = tmp_path / "net", image()
    fast = quick(vgg())
    save(fast, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last bit of a weight
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"its digest is not that of its content.*load.*verify=False"):
        load(path)
    changed = load(path, verify=False)
    assert not torch.equal(torch.cat([t.double().ravel() for t in changed.state_dict().values()]),
                           torch.cat([t.double().ravel() for t in fast.state_dict().values()]))  # fmt: skip
    assert run(changed, x).shape == run(fast, x).shape


def test_a_file_without_a_digest_is_read_only_where_that_is_asked_for(tmp_path: Path) -> None:
    fast = quick(vgg())
    save(fast, tmp_path / "net")
    with safe_open(tmp_path / "net", framework="pt") as file:
        metadata = {"lhc_triton": file.metadata()["lhc_triton"]}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "net", metadata)
    with pytest.raises(ArtifactError, match=r"no digest of its content.*verify=False"):
        load(tmp_path / "net")
    assert torch.equal(run(load(tmp_path / "net", verify=False), image()), run(fast, image()))


def test_plain_attributes_of_the_model_go_round_and_others_are_left_out(tmp_path: Path) -> None:
    model = vgg()
    model.classes, model.size, model.scale = ["cat", "dog"], (28, 28), 0.5
    model.big, model.kinds = 2**70, {1, 2}
    fast = quick(model)
    assert fast.big == 2**70
    save(fast, tmp_path / "net")
    again = load(tmp_path / "net")
    assert (again.classes, again.size, again.scale) == (["cat", "dog"], (28, 28), 0.5)
    for name in ("big", "kinds"):
        with pytest.raises(AttributeError, match=name):
            getattr(again, name)


Pair = namedtuple("Pair", ["first", "second"])


class Structured(nn.Module):
    """Returns what ``made`` makes of two values."""

    def __init__(self, made: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.made = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3), made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.a(x), self.b(x))


STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, (b, 1)),
    "list": lambda a, b: [a, [b, 2.5, None]],
    "dict": lambda a, b: {"a": a, "b": {"c": b}},
    "named": lambda a, b: Pair(a, b),
    "ordered": lambda a, b: OrderedDict(a=a, b=b),
    "sizes": lambda a, b: (a + b, torch.Size((1, 2))),
    "number": lambda a, b: (a + b, np.float64(0.5)),
    "shape": lambda a, b: (a + b, a.shape),
}


def same(mine: Any, theirs: Any) -> bool:
    """Whether two outputs are of one structure, types included, with the same values."""
    if type(mine) is not type(theirs):
        return False
    if isinstance(theirs, Tensor):
        return torch.equal(mine, theirs)
    if isinstance(theirs, dict):
        return list(mine) == list(theirs) and all(same(mine[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple) and not isinstance(theirs, torch.Size):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == theirs


@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_types_of_outputs_are_those_of_the_saved_network(kind: str, tmp_path: Path) -> None:
    model = Structured(STRUCTURES[kind]).eval()
    fast = quick(model, backend="dense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(fast, tmp_path / "net")
    assert same(run(load(tmp_path / "net", model), image()), run(fast, image()))


def test_where_replays_were_given_up_they_stay_so(tmp_path: Path) -> None:
    fast = quick(vgg())
    save(fast, tmp_path / "net")
    assert load(tmp_path / "net").graphs is not None
    assert load(tmp_path / "net", graphs=False).graphs is None
    fast.graphs.refuse("replayed, the output is another one")
    save(fast, tmp_path / "net")
    again = load(tmp_path / "net")
    assert (again.graphs, again.tapes) == (None, None)
    assert torch.equal(run(again, image()), run(fast, image()))
