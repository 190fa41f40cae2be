"""accelerate(): what wraps a model or replaces parts of it, and what is told of all that is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime_networks import finish, image
from test_accelerate_silent import BACKENDS, Body, accelerated, assert_same, made, several, sparse, told
from torch import Tensor, nn

import lhc_triton as lhc


class Renamed(nn.Conv2d):
    """The same convolution under another name."""


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_without_a_forward_of_its_own_is_accelerated() -> None:
    def build(kind: type[nn.Conv2d]) -> nn.Module:
        return Body(mid=kind(32, 48, 3, padding=1))

    assert sparse(accelerated(lambda: build(Renamed), *several(), backend="torch")) == 2
    assert sparse(accelerated(lambda: build(Scaled), *several(), backend="torch")) == 1


def test_layers_called_by_forward_are_accelerated() -> None:
    forward = lambda m, x: m.last.forward(F.relu(m.mid.forward(F.relu(m.stem.forward(x)))))  # noqa: E731
    assert sparse(accelerated(lambda: Body(forward), *several(), backend="torch")) == 2


def test_a_layer_that_the_example_does_not_reach_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.mid(m.stem(x))
        return m.last(h) if float(x.mean()) > 50 else h

    fast = accelerated(lambda: Body(forward), *several(), image() + 100)
    assert "'last'" in told(fast)
    assert "not called" in told(fast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_data_parallel_part_is_taken_for_what_it_wraps(backend: str) -> None:
    def build() -> nn.Module:
        inner = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        return nn.Sequential(nn.DataParallel(inner), nn.Flatten(1))

    fast = accelerated(build, image(), image(seed=2), backend=backend)
    assert sparse(fast) == 1


class Decorated(Body):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _compiled(form: str) -> nn.Module:
    model = made(Decorated if form == "a decorator" else Body)
    if form == "the model":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if form == "a layer":
        model.mid = torch.compile(model.mid, backend="eager")
    elif form == "the model in place":
        model.compile(backend="eager")
    elif form == "a layer in place":
        model.mid.compile(backend="eager")
    elif form == "its forward":
        model.forward = torch.compile(model.forward, backend="eager")
    return model


COMPILED = {
    "the model": "the model",
    "a layer": "'mid'",
    "the model in place": "the model",
    "a layer in place": "'mid'",
    "its forward": "the model",
    "a decorator": None,
}


@pytest.mark.filterwarnings("error:Using `torch.compile")
@pytest.mark.parametrize("form", COMPILED)
def test_what_is_compiled_is_taken_for_what_it_was_and_said(form: str) -> None:
    model, twin = _compiled(form), made(Body)
    fast = lhc.accelerate(model, image(), tune="off", backend="torch")
    assert sparse(fast) == 2
    notes = [note for note in fast.report()["notes"] if "what wraps" in note]
    assert [COMPILED[form] in note for note in notes] == ([True] if COMPILED[form] else [])
    assert fast.report()["traced"] == (form != "a decorator")
    with torch.no_grad():
        for x in several():
            assert_same(fast(x), twin(x))


def test_accelerating_leaves_nothing_in_the_caches_of_a_compiled_model() -> None:
    compiles = []

    def counting(graph: Any, example: Any) -> Any:
        compiles.append(graph)
        return graph.forward

    torch.compiler.reset()
    lhc.accelerate(torch.compile(made(Body), backend=counting), image(), tune="off")
    assert not compiles


@pytest.mark.parametrize("wrapped", ["the model", "a part"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_inside_wrappers_are_the_models_own(wrapped: str, wrap: Callable[..., nn.Module]) -> None:
    """A plan that was made for the wrapped model serves, and forward may read through the wrapper."""

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = wrap(made(Body))

        def forward(self, x: Tensor) -> Tensor:
            inner = next(self.part.children())
            return self.part(x) + inner.mid.bias.mean() + inner.last(inner.mid(inner.stem(x)))

    model = wrap(made(Body)) if wrapped == "the model" else Reading()
    fast = lhc.accelerate(model.eval(), image(), plan=lhc.plan(model, image(), backend="torch"), tune="off")
    with torch.no_grad():
        assert_same(fast(image(seed=5)), model(image(seed=5)))
    if wrapped == "a part":
        names = {name for name, _ in model.named_modules()}
        assert {row["layer"].split("__")[0] for row in fast.report()["layers"]} <= names


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapper_with_hooks_is_more_than_a_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(made(Body))
    model.register_forward_hook(lambda module, args, output: output * 3 + 1)
    fast = lhc.accelerate(model, image(), tune="off", backend="torch")
    with torch.no_grad():
        assert_same(fast(image(seed=5)), model(image(seed=5)))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


# What is done with "mid" and beside it, which layer is named for it, and how many convolutions run elsewhere.
NOT_LAYERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, int]] = {
    "its weight in a function": (lambda m, h: F.conv2d(h, m.mid.weight, m.mid.bias, padding=1), "mid", 1),
    "called past itself": (lambda m, h: nn.Conv2d.forward(m.mid, h), "mid", 1),
    "a function beside it": (lambda m, h: m.mid(h) + F.conv_transpose2d(h, m.extra, padding=1), "", 1),
    "a module of nobody": (lambda m, h: m.mid(m.hidden[0](m.hidden[0](h))), "", 2),
    "one dimension": (lambda m, h: m.mid(h + m.line(h.flatten(2)).view_as(h)), "line", 0),
    "transposed": (lambda m, h: m.up(h), "up", 0),
    "of its own kind": (lambda m, h: m.own(h), "own", 0),
    "scripted": (lambda m, h: m.scripted(h), "", 1),
    "never": (lambda m, h: h.repeat(1, 2, 1, 1)[:, :48], "mid", 0),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", NOT_LAYERS)
def test_every_convolution_that_is_not_replaced_is_told(kind: str) -> None:
    call, named, elsewhere = NOT_LAYERS[kind]

    def build() -> nn.Module:
        torch.manual_seed(1)
        forward = lambda m, x: m.last(F.relu(call(m, F.relu(m.stem(x)))))  # noqa: E731
        parts: dict[str, Any] = {
            "hidden": [nn.Conv2d(32, 32, 1)],
            "extra": nn.Parameter(torch.randn(32, 48, 3, 3)),
        }
        if kind == "one dimension":
            parts["line"] = nn.Conv1d(32, 32, 1)
        if kind == "transposed":
            parts["up"] = nn.ConvTranspose2d(32, 48, 3, padding=1)
        if kind == "of its own kind":
            parts["own"] = Standardised(32, 48, 3, padding=1)
        if kind == "scripted":
            parts["scripted"] = torch.jit.script(nn.Conv2d(32, 48, 3, padding=1))
        return Body(forward, **parts)

    fast = accelerated(build, *several(), backend="torch")
    rows = {row["layer"] for row in fast.report()["layers"]}
    convs = {name for name, m in build().named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    left = {name for name in convs if f"layer {name!r} is left as it is" in told(fast)}
    assert left == convs - rows
    assert named in left or not named
    counted = {
        0: "outside the model's layers",
        1: "1 convolution runs as it is",
        2: "2 convolutions run as they",
    }
    assert (counted[elsewhere] in told(fast)) == (elsewhere > 0)


def test_zeros_in_layers_that_are_left_are_not_denied() -> None:
    model = finish(nn.Sequential(nn.Conv2d(3, 32, 3), Standardised(32, 32, 3), nn.ConvTranspose2d(32, 8, 3)))
    fast = lhc.accelerate(model, image(), tune="off")
    assert "no convolution that can be replaced has" in told(fast)


def test_what_stands_in_for_forward_is_not_traced_past() -> None:
    """torch.fx traces the forward of the class, whatever is called in truth."""

    class Called(Body):
        def __call__(self, x: Tensor) -> Tensor:
            y = super().__call__(x)
            return y if float(x.mean()) < 50 else -y

    fast = accelerated(Called, image(), image(seed=3) + 100, image(seed=4), backend="torch")
    assert sparse(fast) == 2
    assert "other code than its class's forward" in told(fast)


@pytest.mark.parametrize("lazy", [lambda: nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d])
def test_lazy_layers_of_any_kind_are_named(lazy: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"layer '1' is lazy and has no weights yet; call the model on an"):
        lhc.accelerate(nn.Sequential(nn.Conv2d(3, 8, 3), lazy()), image())
