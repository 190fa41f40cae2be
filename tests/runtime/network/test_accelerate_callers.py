"""accelerate(): memory as the model lays it out, and the network as its callers see it."""

from __future__ import annotations

import threading
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime_networks import image
from test_accelerate_silent import BACKENDS, Body, accelerated, assert_same, made, several, sparse
from torch import Tensor, nn

import lhc_triton as lhc

VIEWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "classifier": lambda m, y: m.fc(F.adaptive_avg_pool2d(y, 2).view(y.size(0), -1)),
    "reshaped": lambda m, y: m.fc(F.adaptive_max_pool2d(y, 2).reshape(-1, 128)),
    "all in one": lambda m, y: y.view(-1),
    "unflattened": lambda m, y: y.view(y.shape[0], 4, 8, y.shape[2], y.shape[3]).sum(2),
    "by strides": lambda m, y: y.as_strided((y.numel(),), (1,)),
    "weighted by a stride": lambda m, y: y * y.stride(1),
    "turned in memory": lambda m, y: y.permute(0, 2, 3, 1),
    "rows": lambda m, y: torch.stack([row.view(-1) for row in y.unbind(0)]),
    "written through a view": lambda m, y: (y.view(y.size(0), -1)[:, ::2].zero_(), y)[1],
    "as numpy": lambda m, y: torch.from_numpy(y.numpy().ravel(order="K").copy()),
}


@pytest.mark.parametrize("form", VIEWS)
@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_what_reads_strides_reads_the_models(form: str, backend: str) -> None:
    forward = lambda m, x: VIEWS[form](m, m.body(x))  # noqa: E731  (one expression)
    fast = accelerated(lambda: Body(forward, fc=nn.Linear(128, 5)), *several(), backend=backend)
    if form in ("classifier", "all in one", "unflattened") and backend != "dense":
        assert fast.report()["traced"]
        assert sparse(fast) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_seen_on_an_example_of_one_pixel_hold_for_larger_images(backend: str) -> None:
    forward = lambda m, x: (m.body(x).view(x.size(0), -1), m.mid(m.stem(x)))  # noqa: E731
    accelerated(lambda: Body(forward), image(1, 1), image(2, 9), image(3, 12), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_has_the_format_that_the_model_gives_it_for_this_input(backend: str) -> None:
    fast = accelerated(Body, *several(), backend=backend)
    twin = made(Body)
    for x in several():
        wide = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert_same(fast(wide), twin(wide))


def grows(m: Any, x: Tensor) -> Any:
    h = m.stem(x)
    t = h
    t -= h.mean()
    return m.last(m.mid(h)) + t, h


def captured(m: Any, x: Tensor) -> Any:
    offset = m.offset
    offset *= 0.5
    return m.body(x) + offset


def chained(m: Any, x: Tensor) -> Any:
    y = m.mid(m.stem(x).relu_())
    kept = y
    return m.last(y.relu_()).add_(1) + kept.sum(1, keepdim=True)


ALIASES: dict[str, Callable[[], nn.Module]] = {
    "grows": lambda: Body(grows),
    "captured": lambda: Body(captured, offset=nn.Buffer(torch.ones(1, 32, 1, 1))),
    "chained": lambda: Body(chained),
}


@pytest.mark.parametrize("form", ALIASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_names_of_one_value_see_the_same_writes(form: str, backend: str) -> None:
    accelerated(ALIASES[form], *several(), backend=backend)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("traceable", [False, True])
def test_a_model_that_writes_to_its_input_leaves_the_example_alone(traceable: bool, planned: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return x if not traceable and float(x.sum()) < -1e30 else m.body(x)

    model, example = made(lambda: Body(forward)), image()
    plan = lhc.plan(model, example) if planned else None
    fast = lhc.accelerate(model, example, plan, tune="off")
    assert fast.report()["traced"] == traceable
    assert torch.equal(example, image())
    with torch.no_grad():
        assert_same(fast(image(seed=4)), model(image(seed=4)))


class Optional(Body):
    def forward(self, picture: Tensor, gain: float = 0.25, invert: bool = False) -> Tensor:
        y = self.body(picture) * gain
        return -y if invert else y


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_beyond_the_example_are_refused_unless_it_gave_them(backend: str) -> None:
    model, twin, x = made(Optional), made(Optional), image(seed=8)
    fast = lhc.accelerate(model, image(), tune="off", backend=backend)
    with torch.no_grad():
        assert_same(fast(picture=x), twin(picture=x))
    for call, named in (
        (lambda: fast(x, gain=2.0), "'gain'"),
        (lambda: fast(x, 3.0), "argument 2"),
        (lambda: fast(x, colour=1), "'colour'"),
        (lambda: fast(x, picture=x), "'picture' is given twice"),
        (lambda: fast(), "missing.*'picture'|'picture' is missing"),
    ):
        with pytest.raises(TypeError, match=named) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    fast = lhc.accelerate(model, (image(), torch.tensor(0.25)), tune="off", backend=backend)
    for gain in (torch.tensor(2.0), torch.tensor(-1.0)):
        with torch.no_grad():
            assert_same(fast(x, gain=gain), twin(x, gain=gain))
            assert_same(fast(gain=gain, picture=x), twin(x, gain))


class Pooling(Body):
    """Its second parameter has a default that is no constant, and others stand around it."""

    def forward(
        self, picture: Tensor, invert: bool = False, size: Any = (2, 3), *, gain: float | None = None
    ) -> Tensor:
        y = F.adaptive_avg_pool2d(self.body(picture), size)
        y = y if gain is None else y * gain
        return -y if invert else y


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_may_be_given_or_left_out(backend: str) -> None:
    model, twin, x = made(Pooling), made(Pooling), image(seed=8)
    fast = lhc.accelerate(model, image(), tune="off", backend=backend)
    assert fast.report()["traced"]
    with torch.no_grad():
        for arguments, named in (
            ((), {"picture": x}),
            ((x, False), {}),
            ((x, False, (3, 2)), {"gain": None}),
            ((x,), {"size": (4, 4), "invert": False}),
        ):
            assert_same(fast(*arguments, **named), twin(*arguments, **named))
    for arguments, named, odd in (((x, True), {}, "argument 2"), ((x,), {"gain": 2.0}, "'gain'")):
        with pytest.raises(TypeError, match=f"{odd} is none of them"):
            fast(*arguments, **named)
    with pytest.raises(TypeError, match=r"none of them|'gain'"):
        fast(x, False, (3, 2), None)  # by keyword only, as in the model


@pytest.mark.filterwarnings("ignore:the graph cannot be stored")
def test_defaults_find_their_places_in_a_loaded_network(tmp_path: Path) -> None:
    model, x = made(Pooling), image(seed=8)
    lhc.save(lhc.accelerate(model, image(), tune="off"), tmp_path / "net")
    fast = lhc.load(tmp_path / "net", made(Pooling))
    with torch.no_grad():
        assert_same(fast(x, False, (3, 2)), model(x, False, (3, 2)))
    with pytest.raises(TypeError, match="argument 2 is none of them"):
        fast(x, (3, 2))  # the model would take them for ``invert``


class Masked(Body):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.body(x) if mask is None else self.body(x) * 2 + F.relu(self.body(x)) * mask


def test_a_trace_for_a_tensor_refuses_what_is_none() -> None:
    model, twin, x, mask = made(Masked), made(Masked), image(seed=8), torch.rand(12, 12)
    fast = lhc.accelerate(model, (image(), mask), tune="off")
    assert fast.report()["traced"]
    with torch.no_grad():
        assert_same(fast(x, mask=mask * 2), twin(x, mask * 2))
        assert_same(fast(x, 0.5), twin(x, 0.5))
    for arguments in ((x,), (x, None), (x, [1.0]), ([x], mask)):
        with pytest.raises(TypeError, match=r"was accelerated for a tensor as '(mask|x)'") as caught:
            fast(*arguments)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("traceable", [True, False])
def test_an_image_that_is_no_tensor_is_one_clear_line(traceable: bool, backend: str) -> None:
    model = made(Body)
    if not traceable:
        model.mid.register_forward_hook(lambda module, arguments, output: None)
    fast = lhc.accelerate(model, image(), tune="off", backend=backend)
    for wrong in (image().tolist(), image().numpy(), None):
        with pytest.raises(
            TypeError, match=f"tensor.* {type(wrong).__name__}|{type(wrong).__name__}.*tensor"
        ):
            fast(wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_without_a_batch(backend: str) -> None:
    fast = accelerated(Body, image()[0], image(seed=4)[1], image(3, 9), backend=backend)
    assert sparse(fast) == 2
    accelerated(Body, image(), image(seed=4)[1], backend=backend)


class Detector(Body):
    def __init__(self) -> None:
        super().__init__()
        self.names = ["cat", "dog"]
        self.stride = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.stride

    def postprocess(self, y: Tensor) -> Tensor:
        return y.sigmoid()


def test_plain_attributes_of_the_model_are_there_and_its_methods_are_refused_in_one_line() -> None:
    fast = lhc.accelerate(made(Detector), image(), tune="off")
    assert fast.names == ["cat", "dog"]
    assert fast.stride == 2.0
    with pytest.raises(AttributeError, match="'postprocess' from the model itself") as caught:
        fast.postprocess(torch.zeros(2))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(AttributeError, match="no 'missing'"):
        _ = fast.missing


def test_an_attribute_that_forward_reads_cannot_be_set_in_silence() -> None:
    fast = lhc.accelerate(made(Detector), image(), tune="off")
    with pytest.raises(AttributeError, match=r"'stride' is fixed.*accelerate again"):
        fast.stride = 5.0


def test_attributes_that_forward_changes_are_those_of_the_network() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return m.body(x) * m.settings["gain"]

    def build() -> nn.Module:
        return Body(forward, calls=0, settings={"gain": 2.0})

    fast, twin = lhc.accelerate(made(build), image(), tune="off"), made(build)
    with torch.no_grad():
        for gain in (2.0, 5.0):
            fast.settings["gain"] = twin.settings["gain"] = gain
            assert_same(fast(image(seed=3)), twin(image(seed=3)))
            assert fast.calls == twin.calls
        fast.calls = twin.calls = 7
        assert_same(fast(image(seed=3)), twin(image(seed=3)))
        assert fast.calls == twin.calls == 8


Found = namedtuple("Found", ["boxes", "scores"])


@dataclass
class Parts:
    first: Tensor
    names: list[str]


class Answer(dict[str, Any]):
    pass


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "namedtuple": lambda y: Found(y * 2, y.mean(1)),
    "list": lambda y: [y, [y.mean(), None, 3]],
    "subclass of dict": lambda y: Answer(y=y, size=y.shape),
    "top k": lambda y: y.flatten(1).topk(2),
}


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("traceable", [True, False])
def test_structured_outputs_keep_their_types(kind: str, traceable: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        if not traceable and float(x.amax()) > 1e9:
            return None
        return STRUCTURES[kind](m.body(x))

    accelerated(lambda: Body(forward), *several())


def test_a_dataclass_stays_one() -> None:
    fast = lhc.accelerate(made(lambda: Body(lambda m, x: Parts(m.body(x), ["a"]))), image(), tune="off")
    found, expected = fast(image(seed=2)), made(Body)(image(seed=2))
    assert isinstance(found, Parts)
    assert found.names == ["a"]
    assert_same(found.first, expected.detach())


class Quiet(Body):
    """Its train() returns nothing, as those of some detectors do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_whose_train_returns_nothing(backend: str) -> None:
    model = Quiet()
    model.train()
    lhc.accelerate(model, image(), tune="off", backend=backend)
    assert model.training


def test_results_kept_in_attributes_do_not_stop_the_copy() -> None:
    model = made(lambda: Body(lambda m, x: m.body(x)))
    model.cache = [model.body(image()), {"mid": model.mid(model.stem(image()))}]  # with gradients
    fast = lhc.accelerate(model, image(), tune="off")
    with torch.no_grad():
        assert_same(fast(image(seed=3)), model(image(seed=3)))


def test_a_model_that_cannot_be_copied_is_refused_in_one_line() -> None:
    model = made(Body)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Body cannot be copied: .*lock") as caught:
        lhc.accelerate(model, image(), tune="off")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_an_input_of_another_type_is_one_clear_line(dtype: torch.dtype, backend: str) -> None:
    fast = lhc.accelerate(made(Body), image(), tune="off", backend=backend)
    with pytest.raises((ValueError, TypeError), match=str(dtype).removeprefix("torch.")) as caught:
        fast(image().to(dtype))
    assert "float32" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


WEIGHT_READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "type": lambda m, x: m.body(x.to(m.mid.weight.dtype)),
    "shape": lambda m, x: m.body(x)[:, : m.mid.weight.shape[0] // 3],
    "first parameter": lambda m, x: m.body(x.to(next(m.parameters()).device)),
    "values": lambda m, x: m.body(x) * m.last.weight.abs().mean(),
}


@pytest.mark.parametrize("read", WEIGHT_READS)
def test_a_weight_that_forward_reads_does_not_make_everything_dense(read: str) -> None:
    fast = accelerated(lambda: Body(WEIGHT_READS[read]), *several(), backend="torch")
    assert sparse(fast) == 2


GRADIENT_READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of a layer": lambda m, x: m.body(x) * (3 if m.mid.weight.requires_grad else 1),
    "of any": lambda m, x: m.body(x) * (3 if any(p.requires_grad for p in m.parameters()) else 1),
    "of what stays": lambda m, x: m.norm(m.body(x)) * (3 if m.norm.weight.requires_grad else 1),
    "in the graph": lambda m, x: m.body(x) * (1 + m.norm.weight.requires_grad),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("read", GRADIENT_READS)
def test_a_forward_that_asks_for_gradients_gets_the_models_answer(
    read: str, branches: bool, frozen: bool, tmp_path: Path
) -> None:
    """The network has none, and is judged like that."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return GRADIENT_READS[read](m, x) if not branches or float(x.sum()) < 1e9 else x

    def build() -> nn.Module:
        model = Body(forward, norm=nn.GroupNorm(4, 32))
        return model.requires_grad_(not frozen)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = accelerated(build, *several())
        lhc.save(fast, tmp_path / "net")
        again = lhc.load(tmp_path / "net", made(build))
    with torch.no_grad():
        assert torch.equal(again(image(seed=5)), fast(image(seed=5)))
    if frozen:
        assert sparse(fast) == 2


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_an_input_that_is_not_dense_is_one_clear_line(dtype: Any) -> None:
    fast = lhc.accelerate(made(Body), image(), tune="off", dtype=dtype)
    with pytest.raises(ValueError, match=r"the input is torch\.sparse_coo, expected") as caught:
        fast(image().to_sparse())
    assert str(caught.value).isprintable()


def test_layers_of_several_types() -> None:
    def build() -> nn.Module:
        model = Body(lambda m, x: m.last(m.mid(m.stem(x).relu().double()).float()))
        model.mid.double()
        return model

    accelerated(build, *several())
