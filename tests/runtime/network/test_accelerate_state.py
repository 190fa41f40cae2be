"""accelerate(): state that a model's code keeps outside of the model, on its layers, or in generators."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from runtime_networks import image
from test_accelerate_silent import BACKENDS, Body, accelerated, made, told
from torch import Tensor, nn

import lhc_triton as lhc

LATE = 9  # calls after which the state shows: more than accelerate() makes by itself


def class_attribute() -> nn.Module:
    class Counting(Body):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return self.body(x) * (1.0 if Counting.calls < LATE else 0.5)

    return Counting()


def list_of_the_class() -> nn.Module:
    class Collecting(Body):
        means: ClassVar[list[Tensor]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.means.append(x.mean())
            return self.body(x) - self.means[0]

    return Collecting()


SOURCE = """
calls, table, peak, late = 0, {}, torch.zeros(()), SimpleNamespace(calls=0)

def remember(name, value):
    table.setdefault(name, value)
    return table[name]

def advance():
    late.calls += 1
    return late.calls

class Counting(Body):
    def forward(self, x):
        global calls
        calls += 1
        return self.body(x) * (1.0 if calls < LATE else 0.5)

class Remembering(Body):
    def forward(self, x):
        return self.body(x) - remember("first", x.mean())

class Rising(Body):
    def forward(self, x):
        torch.maximum(peak, x.amax(), out=peak)
        return self.body(x) / peak

class Late(Body):
    def forward(self, x):
        return self.body(x) * (1.0 if advance() < LATE else 0.5)
"""


def of_a_module(name: str) -> nn.Module:
    """Return a network of a new module: the one of another call has variables of its own."""
    module = ModuleType("written_by_others")
    vars(module).update(torch=torch, Body=Body, LATE=LATE, SimpleNamespace=SimpleNamespace)
    exec(SOURCE, vars(module))
    network: nn.Module = getattr(module, name)()
    return network


def function_attribute() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        forward.calls += 1  # type: ignore[attr-defined]
        return m.body(x) * (1.0 if forward.calls < LATE else 0.5)  # type: ignore[attr-defined]

    forward.calls = 0  # type: ignore[attr-defined]
    return Body(forward)


def mutable_default() -> nn.Module:
    def later(m: Any, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        seen.append(1)
        return m.body(x) * (1.0 if len(seen) < LATE else 0.5)

    return Body(lambda m, x: later(m, x))


def variable_around_a_class() -> nn.Module:
    calls = 0

    class Counting(Body):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.body(x) * (1.0 if calls < LATE else 0.5)

    return Counting()


def property_that_counts() -> nn.Module:
    numbers = [0]

    class Counting(Body):
        @property
        def gain(self) -> float:
            numbers[0] += 1
            return 1.0 if numbers[0] < LATE else 0.5

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.gain

    return Counting()


def attribute_of_a_buffer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.scale.calls = getattr(m.scale, "calls", 0) + 1
        return m.body(x) * (m.scale if m.scale.calls < LATE else 0.5)

    return Body(forward, scale=nn.Buffer(torch.ones(())))


def attribute_of_a_layer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.mid.calls = getattr(m.mid, "calls", 0) + 1
        return m.body(x) * (1.0 if m.mid.calls < LATE else 0.5)

    return Body(forward)


def hook_of_a_layer_that_counts() -> nn.Module:
    model, calls = Body(), [0]

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output if calls[0] < LATE else output * 0.5

    model.mid.register_forward_hook(hook)
    return model


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("peak", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.peak.copy_(torch.maximum(self.peak, x.amax()))
        return x / self.peak * (1.0 if self.calls < 9 else 0.5)


def scripted() -> nn.Module:
    return Body(lambda m, x: m.part(m.body(x)), part=torch.jit.script(Scripted()))


STATES: dict[str, Callable[[], nn.Module]] = {
    "an attribute of the class": class_attribute,
    "a list of the class": list_of_the_class,
    "a global number": lambda: of_a_module("Counting"),
    "a global dict behind a function": lambda: of_a_module("Remembering"),
    "a global tensor": lambda: of_a_module("Rising"),
    "a global object": lambda: of_a_module("Late"),
    "an attribute of a function": function_attribute,
    "a mutable default": mutable_default,
    "a variable around a class": variable_around_a_class,
    "a property": property_that_counts,
    "an attribute of a buffer": attribute_of_a_buffer,
    "an attribute of a layer": attribute_of_a_layer,
    "a scripted part": scripted,
    "a hook of a layer": hook_of_a_layer_that_counts,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_code_can_reach_goes_on_as_the_models(state: str, backend: str) -> None:
    calls = [image(2, 12, seed=seed) * (1 + seed % 3) for seed in range(1, LATE + 4)]
    model, twin = made(STATES[state]), made(STATES[state])
    fast = lhc.accelerate(model, image(2, 12) * 2, tune="off", backend=backend)
    with torch.no_grad():
        for x in calls:
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("state", STATES)
def test_state_that_code_can_reach_is_left_as_it_was(state: str) -> None:
    model, twin = made(STATES[state]), made(STATES[state])
    lhc.accelerate(model, image(2, 12) * 2, tune="off")
    with torch.no_grad():
        for seed in range(1, LATE + 4):
            x = image(2, 12, seed=seed)
            assert torch.equal(model(x), twin(x))


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g, x: torch.rand(x.shape, generator=g)),
    "python": (lambda: random.Random(3), lambda g, x: g.random()),
    "numpy": (lambda: np.random.default_rng(3), lambda g, x: g.random()),
    "old numpy": (lambda: np.random.RandomState(3), lambda g, x: g.rand()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_the_models_own_draws_what_it_would_have_drawn(kind: str) -> None:
    make, draw = GENERATORS[kind]
    build = lambda: Body(lambda m, x: m.body(x + draw(m.source, x)), source=make())  # noqa: E731
    accelerated(build, image(2, 12), image(2, 12, seed=3), image(1, 9, seed=4))


CHANCES: dict[str, Callable[[], bool]] = {
    "torch": lambda: bool(torch.rand(()) < 0.02),
    "python": lambda: random.random() < 0.02,
    "numpy": lambda: bool(np.random.rand() < 0.02),
}


@pytest.mark.parametrize("kind", CHANCES)
def test_chance_that_hardly_ever_shows_is_not_settled_by_a_trace(kind: str) -> None:
    model = made(lambda: Body(lambda m, x: m.body(x) * (0.0 if CHANCES[kind]() else 1.0)))
    fast = lhc.accelerate(model, image(), tune="off", backend="torch")
    assert not fast.report()["traced"]
    assert "forward draws random numbers" in told(fast)
    with torch.no_grad():
        assert any(not fast(image()).any() for _ in range(600))


@pytest.mark.filterwarnings("ignore:the graph cannot be stored:UserWarning")
@pytest.mark.parametrize("seen", ["traced", "as it is"])
@pytest.mark.parametrize("run", ["accelerate", "plan", "save"])
def test_common_generators_go_on_where_they_were(run: str, seen: str, tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if seen == "as it is" and float(x.sum()) < -1e30:
            return x
        noise = float(torch.rand(())) + random.random() + np.random.rand()
        return m.body(x) + 0 * noise

    model = made(lambda: Body(forward))

    def numbers(meanwhile: Callable[[], object]) -> list[float]:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        meanwhile()
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    fast = lhc.accelerate(model, image(), tune="off")

    def call() -> object:
        if run == "save":
            return lhc.save(fast, tmp_path / "net.safetensors")
        return lhc.plan(model, image()) if run == "plan" else lhc.accelerate(model, image(), tune="off")

    assert numbers(call) == numbers(lambda: None)


def test_iterators_that_a_copy_shares_do_not_stop_it() -> None:
    class Numbered(Body):
        numbers = count()

        def forward(self, x: Tensor) -> Tensor:
            next(self.numbers)
            return self.body(x)

    accelerated(Numbered, image(), image(seed=3))
