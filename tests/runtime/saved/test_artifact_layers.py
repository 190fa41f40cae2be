"""Networks that are stored by their layers: every number is the file's, whatever model it is put into."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from artifact_files import document_of, quick, rewrite_file, run
from oracle import norm_error
from runtime_networks import Untraceable, finish, image, untraceable, vgg
from torch import Tensor, nn

from lhc_triton.artifact import ArtifactError, load, save


class Unlisted(nn.Module):
    """Ends in operations that no file holds, behind weights of many kinds."""

    def __init__(self, width: int = 16, classes: int = 5, slope: float = 0.1, factor: float = 2.0) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.LeakyReLU(slope)
        self.factor = factor
        self.head = nn.Linear(16, classes)
        self.register_buffer("scale", torch.rand(1, 16, 1, 1) + 0.5)
        self.register_buffer("offset", torch.randn(classes), persistent=False)
        self.gain = torch.rand(classes) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.b(self.a(x)))) * self.scale
        return torch.erf(self.head(y.mean((2, 3))) * self.gain * self.factor + self.offset)


class Branching(Untraceable):
    """Cannot be traced either, and goes on behind its convolutions."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(24, classes)
        self.register_buffer("offset", torch.randn(classes), persistent=False)
        self.gain = torch.rand(classes) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x).mean((2, 3))) * self.gain + self.offset


def save_layers(model: nn.Module, path: Path, *inputs: Tensor) -> Any:
    fast = quick(model, *inputs)
    with pytest.warns(UserWarning, match="the graph cannot be stored .*load.. will need model="):
        save(fast, path)
    return fast


def fresh(kind: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose every number is another one, norms included."""
    torch.manual_seed(seed)
    return finish(kind(), seed)


@pytest.mark.parametrize("kind", [Unlisted, Branching])
def test_a_fresh_instance_of_the_class_gets_every_number_of_the_saved_network(
    kind: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = fresh(kind, 1)
    fast = save_layers(model, tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"its graph could not be stored .*give load\(..., model=\)"):
        load(tmp_path / "net")
    other = fresh(kind, 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for given in (model, other, kind()):
        again = load(tmp_path / "net", given)
        for x in (image(size=16, seed=3), image(batch=3, size=11, seed=4)):
            assert torch.equal(run(again, x), run(fast, x))
            assert norm_error(run(again, x), run(model.double(), x.double())) < 1e-5
            model.float()
        assert again.report() == fast.report()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert type(other.b if isinstance(other, Unlisted) else other.body) is nn.Conv2d


def test_what_was_loaded_into_a_model_can_be_saved_again(tmp_path: Path) -> None:
    fast = save_layers(fresh(Unlisted, 1), tmp_path / "a")
    with pytest.warns(UserWarning, match="erf"):
        save(load(tmp_path / "a", Unlisted()), tmp_path / "b")
    assert torch.equal(run(load(tmp_path / "b", Unlisted()), image()), run(fast, image()))


def test_a_network_of_another_type_than_the_fresh_instance_keeps_its_own(tmp_path: Path) -> None:
    model = fresh(Branching, 1).bfloat16()
    model.gain = model.gain.bfloat16()
    fast = save_layers(model, tmp_path / "net", image(size=16).bfloat16())
    x = image(size=16, seed=3).bfloat16()
    assert torch.equal(run(load(tmp_path / "net", Branching()), x), run(fast, x))


class Tied(Branching):
    """Two layers that share one weight, and one that a list holds too."""

    def __init__(self) -> None:
        super().__init__(24)
        self.second = nn.Linear(24, 24, bias=False)
        self.second.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(super().forward(x))


def test_shared_weights_stay_shared(tmp_path: Path) -> None:
    fast = save_layers(fresh(Tied, 1), tmp_path / "net")
    again = load(tmp_path / "net", Tied())
    assert torch.equal(run(again, image(seed=3)), run(fast, image(seed=3)))
    network: Any = again.network
    assert network.second.weight is network.head.weight


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (vgg, "layer 'a' is missing or has other sizes"),
        (untraceable, "layer 'a' is missing or has other sizes"),
        (lambda: Unlisted(24), "layer 'a' is missing or has other sizes"),
        (lambda: Unlisted(classes=7), r"it has 'head: Linear\(in_features=16, out_features=7"),
        (lambda: Unlisted(slope=0.2), r"it has 'act: LeakyReLU\(negative_slope=0.2\)', the file"),
        (
            lambda: Unlisted(factor=3.0),
            r"_operator.mul \(mul_1, 3.0\) {}', the file 'mul_2 = _operator.mul \(mul_1, 2.0",
        ),
        (lambda: "a model", "model= is a str, expected the torch.nn.Module"),
    ],
    ids=["vgg", "untraceable", "width", "classes", "slope", "factor", "text"],
)
def test_another_model_is_refused_by_its_first_difference(
    other: Callable[[], Any], said: str, tmp_path: Path
) -> None:
    save_layers(fresh(Unlisted, 1), tmp_path / "net")
    with pytest.raises(ArtifactError, match=said) as caught:
        load(tmp_path / "net", other())
    assert "\n" not in str(caught.value)
    assert "model=" in str(caught.value)


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    document, tensors = document_of(path)
    change(document, tensors)
    rewrite_file(path, document, tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d, t: t.pop("head.bias"), "the file has no tensor 'head.bias'"),
        (lambda d, t: t.update(extra=torch.zeros(1)), "it has no tensor 'extra'"),
        (lambda d, t: t.update({"head.bias": torch.zeros(6)}), r"'head.bias' is torch.float32 \(5,\), the"),
        (lambda d, t: t.update({"head.bias": torch.zeros(5).int()}), "the file's torch.int32"),
        (lambda d, t: d["outline"].append("one more"), "other modules or steps"),
        (lambda d, t: d.update(outline=None), "the outline of its model is not valid"),
        (lambda d, t: d.update(outline=["\x1b[2J" * 3]), r"the file '\\x1b\[2J"),
    ],
    ids=["lost", "unknown", "shape", "kind", "step", "no outline", "escapes"],
)
def test_a_file_that_does_not_fit_its_model_is_one_clear_line(
    change: Callable[[Any, Any], object], said: str, tmp_path: Path
) -> None:
    save_layers(fresh(Unlisted, 1), tmp_path / "net")
    changed(tmp_path / "net", change)
    with pytest.raises(ArtifactError, match=said) as caught:
        load(tmp_path / "net", Unlisted())
    assert str(caught.value).isprintable()


def test_the_sizes_that_a_file_claims_are_not_run(tmp_path: Path) -> None:
    fast = save_layers(fresh(Unlisted, 1), tmp_path / "net")

    def enlarge(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["record"]["inputs"] = [[[2**20, 3, 2**10, 2**10], "float32"]]  # 12 TiB of input

    changed(tmp_path / "net", enlarge)
    assert torch.equal(run(load(tmp_path / "net", Unlisted()), image()), run(fast, image()))


def test_a_model_whose_tensors_no_file_can_hold_is_refused_by_save(tmp_path: Path) -> None:
    fast = quick(fresh(Branching, 1))
    fast.network.register_buffer("table", torch.eye(3).to_sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ArtifactError, match="cannot be saved: tensor 'table' is sparse"):
            save(fast, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_hook_is_code_and_keeps_its_network_out_of_a_graph_file(tmp_path: Path) -> None:
    fast = quick(vgg())
    last = next(module for module in fast.modules() if isinstance(module, nn.Linear))
    last.register_forward_hook(lambda module, inputs, output: F.softmax(output, 1))
    with pytest.warns(UserWarning, match="has a forward hook, which is code"):
        save(fast, tmp_path / "net")


class Hooked(Branching):
    """Computes a part in hooks: of a convolution, of what stays, and of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(lambda module, inputs, output: output.clamp(min=-0.5))
        self.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        self.register_forward_hook(lambda module, inputs, output: output.softmax(1))


def test_hooks_are_those_of_the_model_and_a_model_without_them_is_another(tmp_path: Path) -> None:
    fast = save_layers(fresh(Hooked, 1), tmp_path / "net")
    x = image(size=16, seed=3)
    assert torch.equal(run(load(tmp_path / "net", Hooked()), x), run(fast, x))
    assert torch.allclose(run(fast, x).sum(1), torch.ones(2))
    with pytest.raises(ArtifactError, match=r"model= is another model: .*Hooked\.__init__"):
        load(tmp_path / "net", Branching())


class Viewed(Unlisted):
    """Reads the strides of a feature map, which its graph has to give back."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return super().forward(x) + torch.erf(self.head(y.view(y.size(0), 16, -1).mean(2)))


def test_a_graph_that_reads_strides_is_made_again_as_it_was(tmp_path: Path) -> None:
    model = fresh(Viewed, 1)
    fast = save_layers(model, tmp_path / "net")
    again, x = load(tmp_path / "net", Viewed()), image(size=16, seed=3)
    assert torch.equal(run(again, x), run(fast, x))
    assert norm_error(run(again, x), run(model.double(), x.double())) < 1e-5
    assert again.network.code == fast.network.code


class Keeping(Branching):
    """Keeps a value that its forward reads; ``get`` finds it."""

    def __init__(self, keep: Callable[[], Any], get: Callable[[Any], Any]) -> None:
        super().__init__()
        self.kept, self.get = keep(), get

    def forward(self, x: Tensor) -> Tensor:
        read = self.get(self.kept)
        y = super().forward(x)
        return read(y) if callable(read) else y * read


@dataclass
class Settings:
    gain: Any


def closed_over(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda y: y * value


def at(*path: Any) -> Callable[[Any], Any]:
    return lambda kept: reduce(lambda value, key: value[key], path, kept)


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))


REPLACED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a list": (lambda: [torch.rand(5)], at(0)),
    "a dict in a list": (lambda: [1, {"gain": [torch.rand(5), "text"]}], at(1, "gain", 0)),
    "a list that is kept twice": (lambda: (lambda one: [one, {"a": one}])([torch.rand(5)]), at(1, "a", 0)),
    "a parameter in a dict": (lambda: {3: nn.Parameter(torch.rand(5))}, at(3)),
    "a module in a list": (lambda: [head()], at(0)),
    "a module in a dict": (lambda: {"head": [head()]}, at("head", 0)),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_what_lists_and_dicts_hold_is_the_files(kind: str, tmp_path: Path) -> None:
    build = lambda: Keeping(*REPLACED[kind])  # noqa: E731
    fast = save_layers(fresh(build, 1), tmp_path / "net")
    other = fresh(build, 2)
    before, x = run(other, image(seed=3)), image(seed=3)
    assert torch.equal(run(load(tmp_path / "net", other), x), run(fast, x))
    assert torch.equal(run(other, x), before)


DESCRIBED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a number": (lambda: float(torch.rand(())), lambda kept: kept),
    "a tuple": (lambda: (0, torch.rand(5)), at(1)),
    "an array": (lambda: torch.rand(5).numpy(), torch.from_numpy),
    "an object": (lambda: Settings([torch.rand(5)]), lambda kept: kept.gain[0]),
    "a closure": (lambda: closed_over(torch.rand(5)), lambda kept: kept),
    "a partial": (lambda: partial(torch.mul, torch.rand(5)), lambda kept: kept),
    "a module in a tuple": (lambda: (nn.Linear(5, 5),), at(0)),
    "a long list": (lambda: torch.rand(500).tolist(), at(499)),
}


@pytest.mark.parametrize("kind", DESCRIBED)
def test_an_instance_that_keeps_other_values_is_another_model(kind: str, tmp_path: Path) -> None:
    build = lambda: Keeping(*DESCRIBED[kind])  # noqa: E731
    model = fresh(build, 1)
    fast = save_layers(model, tmp_path / "net")
    for same in (model, fresh(build, 1)):
        assert torch.equal(run(load(tmp_path / "net", same), image(seed=3)), run(fast, image(seed=3)))
    with pytest.raises(ArtifactError, match=r"model= is another model: it has .: kept = ") as caught:
        load(tmp_path / "net", fresh(build, 2))
    assert str(caught.value).isprintable()


def test_what_a_hook_closes_over_counts(tmp_path: Path) -> None:
    def build(where: str) -> nn.Module:
        model, factor = Branching(), float(torch.rand(()))
        model.get_submodule(where).register_forward_hook(lambda module, args, output: output * factor)
        return model

    for where in ("body", "head", ""):
        fast = save_layers(fresh(partial(build, where), 1), tmp_path / "net")
        again = load(tmp_path / "net", fresh(partial(build, where), 1))
        assert torch.equal(run(again, image(seed=3)), run(fast, image(seed=3)))
        with pytest.raises(ArtifactError, match=r"model= is another model: it has .*hook"):
            load(tmp_path / "net", fresh(partial(build, where), 2))


def test_another_class_of_the_same_layers_is_another_model(tmp_path: Path) -> None:
    class Doubled(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    save_layers(fresh(Branching, 1), tmp_path / "net")
    with pytest.raises(ArtifactError, match="it has 'a Doubled', the file 'a Branching'"):
        load(tmp_path / "net", Doubled())


class Watched(Branching):
    """Keeps features of the last call in all the ways people do, and counts its calls."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.features: dict[str, Any] = {}
        self.last: list[Tensor] = []
        self.settings = Settings(None)
        self.calls, self.counts = 0, counts
        closed: dict[str, Tensor] = {}
        self.body.register_forward_hook(lambda module, args, output: closed.update(body=output))
        self.norm.register_forward_hook(lambda module, args, output: self.features.update(norm=output))

    def forward(self, x: Tensor) -> Tensor:
        self.last[:] = [x]
        self.settings.gain = x.mean()
        self.calls += self.counts
        return super().forward(x)


def test_what_calls_leave_behind_is_no_part_of_the_model(tmp_path: Path) -> None:
    fast = quick(fresh(Watched, 1))
    run(fast, image(seed=6))
    with pytest.warns(UserWarning, match="the graph cannot be stored"):
        save(fast, tmp_path / "net")
    called = fresh(Watched, 3)
    run(called, image(batch=5, size=9))
    for given in (fresh(Watched, 2), called):
        assert torch.equal(run(load(tmp_path / "net", given), image(seed=3)), run(fast, image(seed=3)))


def test_a_count_of_calls_is_part_of_the_model(tmp_path: Path) -> None:
    """It may decide what a call returns."""
    fast = save_layers(fresh(partial(Watched, True), 1), tmp_path / "net")
    run(fast, image())
    with pytest.warns(UserWarning, match="the graph cannot be stored"):
        save(fast, tmp_path / "net")
    with pytest.raises(ArtifactError, match="it has ': calls = 0', the file ': calls = 1'"):
        load(tmp_path / "net", Watched(True))
