"""accelerate(): forwards that do more than compute: they write, remember, ask, and surround themselves."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runtime_networks import image
from test_accelerate_silent import BACKENDS, Body, accelerated, assert_same, made, several, sparse
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lhc_triton as lhc


def darkens(m: Any, x: Tensor) -> Tensor:
    x -= 0.5
    return m.body(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_that_forward_writes_to_is_written_to_alike(backend: str) -> None:
    example = image()
    fast = lhc.accelerate(made(lambda: Body(darkens)), example, tune="off", backend=backend)
    assert torch.equal(example, image())
    twin = made(lambda: Body(darkens))
    for x in (*several(), image(2, 12, seed=6).contiguous(memory_format=torch.channels_last)):
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            assert_same(fast(mine), twin(theirs))
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, x)


def together(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    y = m.mid(h)
    torch._foreach_mul_([h, y], 0.5)
    return m.last(y.relu()) + h


def two_results(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    y = m.last(m.mid(h))
    torch.max(m.mid(h), dim=1, keepdim=True, out=(h[:, :1], torch.empty(0, dtype=torch.long)))
    return (y + h).relu()


def by_operator(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    y = m.last(m.mid(h))
    torch.ops.aten.add_.Tensor(h, 1.0)
    return (y + h).relu()


def by_hook(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    y = m.last(m.mid(h))
    m.act(h)
    return (y + h).relu()


def _triple(module: nn.Module, arguments: Any) -> None:
    arguments[0].mul_(3)


def with_hooked_activation() -> nn.Module:
    act = nn.Sigmoid()
    act.register_forward_pre_hook(_triple)
    return Body(by_hook, act=act)


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "a list": lambda: Body(together),
    "one of two results": lambda: Body(two_results),
    "an operator": lambda: Body(by_operator),
    "a hook": with_hooked_activation,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_that_do_not_look_like_any_are_seen(writer: str, backend: str) -> None:
    accelerated(WRITERS[writer], *several(), backend=backend)


def test_a_forward_that_writes_to_a_weight_is_refused_in_one_line_and_undone() -> None:
    def decays(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.mid.weight.mul_(0.9)
        return m.body(x)

    model = made(lambda: Body(decays))
    before = model.mid.weight.detach().clone()
    with pytest.raises(ValueError, match=r"writes to its parameter 'mid.weight'") as caught:
        lhc.accelerate(model, image(), tune="off")
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(model.mid.weight, before)


def batch_statistics(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(m.body(x), m.mean, m.var, training=True, momentum=0.5) + m.mean.view(-1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_that_forward_gathers_are_those_of_its_own_calls(backend: str) -> None:
    def build() -> nn.Module:
        return Body(batch_statistics, mean=nn.Buffer(torch.zeros(32)), var=nn.Buffer(torch.ones(32)))

    model = made(build)
    lhc.accelerate(model, image(), tune="off", backend=backend)
    assert torch.equal(model.mean, torch.zeros(32))
    accelerated(build, *several(), backend=backend)


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> int:
        self.n += 1
        return self.n


class Array:
    def __init__(self) -> None:
        self.n = np.zeros(1, dtype=np.int64)

    def __call__(self) -> int:
        self.n[0] += 1
        return int(self.n[0])


def ages(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * (1.0 if m.age() < 9 else 0.5)


@pytest.mark.parametrize("kind", [Slotted, Array])
def test_state_of_any_kind_counts(kind: Callable[[], Any]) -> None:
    accelerated(lambda: Body(ages, age=kind()), *[image(seed=seed) for seed in range(12)])


def test_the_first_call_of_the_network_decides_what_the_models_own_would() -> None:
    def normalised(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        if m.level is None:
            m.level = y.detach().mean()
        return y > m.level * 3

    for backend in BACKENDS:
        accelerated(lambda: Body(normalised, level=None), *[image() * k for k in (1, 3, 9)], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", ["copied", "replaced", "in place"])
def test_what_the_example_would_settle_is_open_at_the_first_call(write: str, backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        highest = torch.maximum(m.peak, x.amax())
        if write == "copied":
            m.peak.copy_(highest)
        elif write == "replaced":
            m.peak = highest
        else:
            torch.maximum(m.peak, highest, out=m.peak)
        return m.body(x) / m.peak

    build = lambda: made(lambda: Body(forward, peak=nn.Buffer(torch.tensor(0.01))))  # noqa: E731
    model, twin = build(), build()
    fast = lhc.accelerate(model, image() * 9, tune="off", backend=backend)
    for scale in (0.1, 1, 3, 0.1):
        with torch.no_grad():
            assert_same(fast(image(seed=3) * scale), twin(image(seed=3) * scale))


MODES: dict[str, Callable[[], bool]] = {
    "gradients": lambda: torch.is_grad_enabled(),
    "inference": lambda: torch.is_inference_mode_enabled(),
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_forward_asks_for_is_that_of_the_call(mode: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.body(x) * (3.0 if MODES[mode]() else 1.0)

    fast, twin = lhc.accelerate(made(lambda: Body(forward)), image(), tune="off"), made(lambda: Body(forward))
    x = image(seed=6)
    for context in (
        torch.no_grad(),
        torch.enable_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with context:
            found, expected = fast(x).detach().float(), twin(x).detach().float()
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_switched_on_inside_forward(backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return m.body(x)

    model, twin = made(lambda: Body(forward)), made(lambda: Body(forward))
    fast = lhc.accelerate(model, image(), tune="off", backend=backend)
    for x in several():
        with torch.no_grad():
            assert_same(fast(x).detach(), twin(x).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolutions_of_single_images_and_by_keyword_inside_forward(backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = [m.mid(input=F.relu(m.stem(row))) for row in x]
        return m.last(torch.stack(rows))

    fast = accelerated(lambda: Body(forward), *several(), backend=backend)
    assert sparse(fast) == 2


FORMATS: dict[str, Callable[[Any, Tensor], Any]] = {
    "half of the channels": lambda m, x: m.last(m.mid(m.stem(x)).chunk(2, 1)[0].repeat(1, 2, 1, 1)),
    "a slice": lambda m, x: m.narrow(m.mid(m.stem(x))[:, 16:]),
    "tokens": lambda m, x: m.mid(m.stem(x).flatten(2).mT.mT.view(x.size(0), 32, *x.shape[2:]).relu()),
    "a turned map": lambda m, x: m.mid(m.stem(x).permute(0, 3, 1, 2).permute(0, 2, 3, 1)),
    "an asked for format": lambda m, x: m.mid(m.stem(x).contiguous(memory_format=torch.channels_last)),
    "not traceable": lambda m, x: m.mid(m.stem(x)) if float(x.mean()) < 9 else x,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_convolutions_answer_in_the_format_that_torch_would_choose(form: str, backend: str) -> None:
    def build() -> nn.Module:
        return Body(FORMATS[form], narrow=nn.Conv2d(32, 32, 3))

    inputs = [image(2, 12), image(1, 12, seed=3), image(3, 9, seed=4), image(2, 4, seed=5)]
    inputs += [x.contiguous(memory_format=torch.channels_last) for x in inputs[1:]]
    inputs += [image(2, 24, seed=7)[:, :, ::2, ::2], image(2, 12, seed=8).transpose(2, 3)]
    accelerated(build, *inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_map_of_one_pixel_tells_nothing_of_its_format(backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.max_pool2d(m.stem(x), 2)
        up = F.interpolate(m.norm(m.down(h)), size=h.shape[2:])
        return m.mid(up + h).roll(1, 2)

    def build() -> nn.Module:
        return Body(forward, down=nn.Conv2d(32, 32, 3, stride=2, padding=1), norm=nn.BatchNorm2d(32))

    wide = image(2, 12, seed=3).contiguous(memory_format=torch.channels_last)
    accelerated(build, image(2, 12), wide, image(1, 4, seed=5), wide, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grey_images(backend: str) -> None:
    def build() -> nn.Module:
        model = Body(
            lambda m, x: m.fc(m.body(x).mean((2, 3)) if float(x.mean()) > 9 else m.body(x).view(-1, 9))
        )
        model.stem = nn.Conv2d(1, 32, 3, padding=1)
        model.fc = nn.Linear(9, 4)
        return model

    accelerated(build, *(image(n, 9, channels=1, seed=n) for n in (2, 1, 3)), backend=backend)


def test_a_computed_weight_is_left_to_the_model_that_computes_it() -> None:
    for computed in (parametrizations.weight_norm, parametrizations.orthogonal):
        model = made(Body)
        computed(model.mid)
        expected = model(image(seed=5)).detach()
        fast = lhc.accelerate(model, image(), tune="off")
        with torch.no_grad():
            assert_same(fast(image(seed=5)), expected)
            assert_same(model(image(seed=5)), expected)
        assert nn.utils.parametrize.is_parametrized(model.mid, "weight")


class Doubled(nn.Conv2d):
    @property
    def weight(self) -> Tensor:
        return 2 * self._parameters["weight"]

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self._parameters["weight"] = value


def test_a_weight_that_is_a_property_counts_as_it_reads() -> None:
    model = made(Body)
    model.mid.__class__ = Doubled
    fast = lhc.accelerate(model, image(), tune="off", backend="torch")
    for x in several():
        with torch.no_grad():
            assert_same(fast(x), model(x))


def test_a_patched_forward_is_kept() -> None:
    def build() -> nn.Module:
        model = Body()
        plain = model.mid.forward
        model.mid.forward = lambda x: plain(x).abs()
        return model

    model = made(build)
    accelerated(build, *several(), backend="torch")
    expected = model(image()).detach()
    lhc.accelerate(model, image(), tune="off", backend="torch")
    assert_same(model(image()).detach(), expected)


def in_a_dict() -> nn.Module:
    model = Body(lambda m, x: m.steps["last"](m.steps["mid"](m.steps["stem"](x))))
    model.steps = {
        "stem": model.stem.forward,
        "mid": lambda x: F.relu(model.mid(x)),
        "last": partial(lambda m, x: m.last(x), model),
    }
    return model


def in_a_list() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for step in m.steps[0]:
            x = step(x)
        return x

    model = Body(forward)
    model.steps = ([model.stem, F.relu, lambda x: model.mid(x), model.last],)
    return model


def of_a_child() -> nn.Module:
    """A part that knows, weakly, the whole that it belongs to."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Buffer(torch.ones(()))
            self.part = Body(self.keep)
            self.part.whole = weakref.ref(self)

        @staticmethod
        def keep(m: Any, x: Tensor) -> Tensor:
            m.whole().mean = x.mean()
            m.whole().gain.mul_(0.5)
            return m.body(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) * self.mean + self.gain

    return Whole()


def of_a_module_in_a_list() -> nn.Module:
    model = Body(lambda m, x: (m.kept.clear(), m.parts[0](m.body(x)), m.kept[0])[1:])
    model.kept, model.parts = [], [nn.Conv2d(32, 32, 1)]
    model.parts[0].register_forward_hook(lambda module, arguments, output: model.kept.append(output * 2))
    return model


REFERENCES: dict[str, Callable[[], nn.Module]] = {
    "functions in a dict": in_a_dict,
    "functions in a list": in_a_list,
    "a weak reference": of_a_child,
    "a hook of a module in a list": of_a_module_in_a_list,
}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_refers_to_the_model_refers_to_its_copy_in_the_copy(kind: str, backend: str) -> None:
    assert sparse(accelerated(REFERENCES[kind], *several(), backend=backend)) == 2
    model, twin = made(REFERENCES[kind]), made(REFERENCES[kind])
    fast = lhc.accelerate(model, image(), tune="off", backend=backend)
    with torch.no_grad():
        fast(image(seed=4))
        assert_same(model(image(seed=5)), twin(image(seed=5)))


PIECES: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda y: y.chunk(2, 1),
    "split": lambda y: torch.split(y, [8, 24], dim=1),
    "tensor_split": lambda y: y.tensor_split((8,), dim=1),
}


@pytest.mark.parametrize("form", PIECES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_pieces_is_traced(form: str, backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        pieces = list(PIECES[form](m.body(x)))
        pieces.extend([piece.relu() for piece in pieces])
        return torch.cat(pieces[1:], 1)

    assert accelerated(lambda: Body(forward), *several(), backend=backend).report()["traced"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_pieces_than_were_asked_for(backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = [row.mean(2) for row in m.body(x).chunk(5, 2)]
        return torch.stack([sum(rows), rows[-1] * len(rows)])

    accelerated(lambda: Body(forward), *several(), image(2, 6, seed=6), backend=backend)


def test_constants_that_a_value_is_read_by_do_not_stop_a_trace() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y, order, grid = m.body(x), torch.arange(31, -1, -1), torch.linspace(-1, 1, 16).view(1, 2, 4, 2)
        looks = F.grid_sample(y[:1], grid, align_corners=False)
        return (
            y.index_select(1, order),
            looks,
            torch.take(y, order),
            y > torch.linspace(0, 1, 32).view(-1, 1, 1),
        )

    assert accelerated(lambda: Body(forward), *several()).report()["traced"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_attributes_that_others_put_on_a_convolution_stay_with_it(backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in (m.stem, m.mid, m.last):
            x = layer(x) * layer.scales[0]
            if layer.rectify and float(x.mean()) < 1e9:
                x = x.relu()
        return x

    def build() -> nn.Module:
        model = Body(forward)
        for layer in (model.stem, model.mid, model.last):
            layer.rectify, layer.scales = layer is not model.last, [0.5]
        return model

    assert sparse(accelerated(build, *several(), backend=backend)) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_left_as_it_is() -> None:
    def build() -> nn.Module:
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU()))
        return Body(lambda m, x: m.scripted(m.body(x)), scripted=scripted)

    accelerated(build, *several(), backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_caller_may_write_to_outputs(backend: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        made_here = torch.linspace(0, 1, 32).view(1, -1, 1, 1)
        return m.body(x) + made_here, made_here, m.anchors.clone(), x[:, :1]

    fast = accelerated(lambda: Body(forward, anchors=nn.Buffer(torch.rand(4))), *several(), backend=backend)
    expected = [value.clone() for value in fast(image(seed=5))]
    for _ in range(4):
        found = fast(image(seed=5))
        assert all(map(torch.equal, found, expected))
        for value in found:
            value.mul_(-7)


@pytest.mark.parametrize(
    "odd", [torch.empty(3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"]
)
def test_tensors_without_values_or_strides_may_lie_about(odd: Tensor) -> None:
    fast = accelerated(lambda: Body(odd=nn.Buffer(odd.clone())), *several(), backend="torch")
    assert sparse(fast) == 2
