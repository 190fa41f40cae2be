"""accelerate(): what a network computes besides one float tensor from one example is what it returns, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime_networks import finish, image
from torch import Tensor, nn

import lhc_triton as lhc

BACKENDS = ["auto", "torch", "native"]


class Body(nn.Module):
    """Three convolutions with structured zeros; what is done around them is a test's matter."""

    def __init__(self, forward: Callable[..., Any] | None = None, **parts: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.mid = nn.Conv2d(32, 48, 3, padding=1)
        self.last = nn.Conv2d(48, 32, 3, padding=1)
        self.rest = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def body(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.mid(F.relu(self.stem(x)))))

    def forward(self, x: Tensor) -> Any:
        return self.rest(self, x) if self.rest is not None else self.body(x)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return finish(build(), seed=4, density=0.4)


def flat(output: Any) -> list[Any]:
    if isinstance(output, Tensor) or not isinstance(output, tuple | list | dict):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [leaf for item in items for leaf in flat(item)]


def assert_same(mine: Any, theirs: Any) -> None:
    """Compare two outputs, each tensor by itself: kind, strides, values."""
    assert type(mine) is type(theirs)
    for left, right in zip(flat(mine), flat(theirs), strict=True):
        if not isinstance(right, Tensor):
            assert left == right
            continue
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert [s for s, n in zip(left.stride(), left.shape, strict=True) if n > 1] == [
            s for s, n in zip(right.stride(), right.shape, strict=True) if n > 1
        ]
        if right.is_floating_point() or right.is_complex():
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))
        else:
            assert float((left != right).double().mean()) < 1e-3


def accelerated(
    build: Callable[[], nn.Module], *inputs: Tensor, backend: str = "auto", keywords: Any = None
) -> Any:
    """Accelerate on the first input and compare with an untouched model on all of them, in turn."""
    model, twin = made(build), made(build)
    fast = lhc.accelerate(model, inputs[0].clone(), tune="off", backend=backend)
    with torch.no_grad():
        for x in (*inputs, inputs[0]):
            assert_same(fast(x.clone()), twin(x.clone()))
    return fast


def several() -> tuple[Tensor, ...]:
    return image(2, 12), image(2, 12, seed=3), image(1, 12, seed=4), image(3, 17, seed=5)


def sparse(fast: Any) -> int:
    return fast.report()["totals"]["sparse_layers"]


def told(fast: Any) -> str:
    return "\n".join(fast.report()["notes"])


NO_FLOATS: dict[str, Callable[[Any, Tensor], Any]] = {
    "labels": lambda m, x: m.body(x).max(dim=1).indices,
    "a mask": lambda m, x: m.body(x) > 0.05,
    "bytes": lambda m, x: (m.body(x).sigmoid() * 200).to(torch.uint8),
    "a spectrum": lambda m, x: torch.fft.rfft2(m.body(x), norm="ortho"),
    "a small score beside distances": lambda m, x: (m.body(x).abs() * 5000, m.body(x).mean((1, 2, 3)) * 1e-3),
}


@pytest.mark.parametrize("kind", NO_FLOATS)
def test_what_tracing_gets_wrong_is_found_in_every_kind_of_output(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        if kind.startswith("a small"):
            far, score = NO_FLOATS[kind](m, x)
            return far, score if not isinstance(x, Tensor) else score + 0.002
        return NO_FLOATS[kind](m, x * 4 - 1 if isinstance(x, Tensor) else x)

    fast = accelerated(lambda: Body(forward), *several())
    assert not fast.report()["traced"]
    assert ("output [1] differs" if kind.startswith("a small") else "the output differs") in told(fast)


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda y: y.relu().mean((2, 3)).to_sparse(),
    "sparse by rows": lambda y: y.relu().mean((2, 3)).to_sparse_csr(),
    "nested": lambda y: torch.nested.as_nested_tensor(list(y.unbind(0))) if isinstance(y, Tensor) else y,
    "quantised": lambda y: torch.quantize_per_tensor(y, 0.01, 3, torch.qint8),
    "of oneDNN": lambda y: y.to_mkldnn(),
}


def dense(output: Tensor) -> list[Tensor]:
    if output.is_nested:
        return list(output.unbind())
    return [output.dequantize() if output.is_quantized else output.to_dense()]


@pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|nested tensors|beta state)")
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("deceived", [False, True])
def test_outputs_in_unusual_layouts_are_compared(kind: str, deceived: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return UNUSUAL[kind](m.body(x * 4 - 1 if isinstance(x, Tensor) and deceived else x))

    model, twin = made(lambda: Body(forward)), made(lambda: Body(forward))
    fast = lhc.accelerate(model, image(), tune="off")
    assert fast.report()["traced"] == (not deceived and kind != "nested")
    with torch.no_grad():
        for x in several():
            found, expected = fast(x), twin(x)
            assert found.layout == expected.layout
            for mine, theirs in zip(dense(found), dense(expected), strict=True):
                torch.testing.assert_close(
                    mine, theirs, rtol=1e-3, atol=0.011 if found.is_quantized else 1e-4
                )


IMAGES: dict[str, Callable[[int, int], Tensor]] = {
    "bytes": lambda size, seed: (image(2, size, seed=seed) * 255).to(torch.uint8),
    "no batch": lambda size, seed: image(1, size, seed=seed)[0],
    "videos": lambda size, seed: image(6, size, seed=seed).unflatten(0, (2, 3)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_another_size_is_tried_of_every_kind_of_image(kind: str) -> None:
    def side(x: Any) -> int:
        try:
            return int(x.shape[-1])
        except TypeError:  # while somebody traces
            return 12

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.float() if kind == "bytes" else x
        return m.body(x.flatten(0, 1) if kind == "videos" else x) * side(x)

    fast = accelerated(lambda: Body(forward), *(IMAGES[kind](size, size) for size in (12, 9, 17)))
    assert not fast.report()["traced"]


CANVASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copied": lambda canvas, means: canvas.copy_(means),
    "set": lambda canvas, means: canvas.__setitem__(slice(4, 20), means[4:20]),
    "scattered": lambda canvas, means: canvas.index_copy_(0, torch.arange(31, -1, -1), means),
    "out": lambda canvas, means: torch.mul(means, 3, out=canvas),
    "maximum": lambda canvas, means: torch.maximum(canvas, means, out=canvas),
    "summed": lambda canvas, means: canvas.add_(means),
    "accumulated": lambda canvas, means: torch.addcmul(canvas, means, means, out=canvas),
}


@pytest.mark.parametrize("form", CANVASES)
@pytest.mark.parametrize("returned", [False, True])
def test_a_tensor_that_forward_makes_and_writes_is_made_anew(form: str, returned: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.body(x)
        canvas = torch.full((32,), -0.5)
        CANVASES[form](canvas, y.mean((0, 2, 3)))
        return canvas if returned else y * canvas.view(1, -1, 1, 1)

    fast = accelerated(lambda: Body(forward), *several())
    first = fast(image(2, 12))
    kept = first.clone()
    fast(image(2, 12, seed=9))
    assert torch.equal(first, kept)


class Tap:
    def __init__(self, module: nn.Module) -> None:
        self.features: list[Tensor] = []
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.features.append(output)


class Tapped(Body):
    """Reads, in ``forward``, what its own hook kept: in a dict, by a closure, or in an object."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        kept: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.tap = Tap(self.mid) if form == "object" else None
        if form == "closure":
            self.mid.register_forward_hook(lambda module, arguments, output: kept.update(mid=output))
            self.read = lambda: kept["mid"]
        elif form == "dict":
            self.mid.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.kept["mid"] = output

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.tap is not None:
            return y + self.tap.features.pop().mean()
        return y + (self.read() if self.form == "closure" else self.kept["mid"]).mean()


def test_features_that_a_closure_and_an_attribute_share_stay_shared() -> None:
    def build() -> nn.Module:
        model = Tapped("closure")
        model.kept = model.read.__closure__[0].cell_contents
        return model

    accelerated(build, *several())


@pytest.mark.parametrize("form", ["dict", "closure", "object"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_that_hooks_keep_are_those_of_the_call(form: str, backend: str) -> None:
    accelerated(lambda: Tapped(form), *several(), backend=backend)


def counts(m: Any, x: Tensor) -> Tensor:
    m.seen += 1
    return m.body(x) * (1 + m.seen % 3)


def remembers_peak(m: Any, x: Tensor) -> Tensor:
    m.peak = torch.maximum(m.peak, x.amax())
    return m.body(x) / m.peak


def alternates(m: Any, x: Tensor) -> Tensor:
    m.turn = not m.turn
    return m.body(x) if m.turn else m.body(x).neg()


def tires(m: Any, x: Tensor) -> Tensor:
    m.turn = m.turn + 1
    return m.body(x) * (0.1 if m.turn > 6 else 1.0)


def depends_on_values(m: Any, x: Tensor) -> Tensor:
    return m.body(x) if x.mean() > 0 else m.stem(x)


STATES: dict[str, Callable[[], nn.Module]] = {
    "a counter": lambda: Body(counts, seen=nn.Buffer(torch.zeros((), dtype=torch.long))),
    "a running maximum": lambda: Body(remembers_peak, peak=nn.Buffer(torch.tensor(0.1))),
    "every other call": lambda: Body(alternates, turn=False),
    "many calls later": lambda: Body(tires, turn=0),
    "values": lambda: Body(depends_on_values),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_forward_remembers_starts_where_the_model_stands(state: str, backend: str) -> None:
    more = [image(2, 12, seed=seed) * (-1) ** seed for seed in range(8)]
    accelerated(STATES[state], *several(), *more, backend=backend)


def test_a_model_that_changes_as_it_runs_is_left_as_it_was() -> None:
    model = made(STATES["a counter"])
    model(image())
    lhc.accelerate(model, image(), tune="off")
    assert int(model.seen) == 1


def test_a_random_forward_is_not_blamed() -> None:
    model = made(lambda: Body(lambda m, x: m.body(x + 0.2 * torch.randn_like(x))))
    fast = lhc.accelerate(model, image(), tune="off", backend="torch")
    assert sparse(fast) == 2
    assert "differs" not in told(fast)


def test_autocast_inside_forward_is_not_blamed() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.body(x).float()

    model, twin = made(lambda: Body(forward)), made(lambda: Body(forward))
    fast = lhc.accelerate(model, image(), tune="off", backend="torch")
    assert "differs" not in told(fast)
    x = image(3, 14, seed=6)
    with torch.no_grad():
        found, expected = fast(x), twin(x)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def _keyword_hook(module: nn.Module, arguments: Any, keywords: Any) -> Any:
    return (arguments[0].abs(),), keywords


HOOKS: dict[str, Callable[[Any], Any]] = {
    "clamps a layer": lambda m: m.mid.register_forward_hook(lambda mod, i, o: o.clamp(-0.1, 0.2)),
    "halves a layer's input": lambda m: m.last.register_forward_pre_hook(lambda mod, i: (i[0] / 2,)),
    "takes keywords": lambda m: m.mid.register_forward_pre_hook(_keyword_hook, with_kwargs=True),
    "writes in place": lambda m: m.stem.register_forward_hook(lambda mod, i, o: o.mul_(-2)),
    "prepares the image": lambda m: m.register_forward_pre_hook(lambda mod, i: (i[0] * 3 - 1,)),
    "is the softmax": lambda m: m.register_forward_hook(lambda mod, i, o: o.softmax(1)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_that_change_values_are_part_of_the_network(hook: str, backend: str) -> None:
    def build() -> nn.Module:
        model = Body()
        HOOKS[hook](model)
        return model

    accelerated(build, *several(), backend=backend)


@pytest.mark.parametrize("place", ["mid", "block", ""])
def test_hooks_of_the_caller_see_every_call(place: str) -> None:
    def build(seen: dict[str, Tensor]) -> nn.Module:
        model = Body(lambda m, x: m.block(m.last(F.relu(m.mid(m.stem(x).relu_())))))
        model.block = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU())
        module = model.get_submodule(place)
        module.register_forward_hook(lambda mod, i, o: seen.update(y=o, now=o.clone()))
        return model

    mine: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    model, twin = made(lambda: build(mine)), made(lambda: build(theirs))
    fast = lhc.accelerate(model, image(), tune="off", backend="torch")
    for x in several():
        mine.clear()
        with torch.no_grad():
            assert_same(fast(x), twin(x))
        assert_same(mine, theirs)
