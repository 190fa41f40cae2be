"""accelerate(): every mistake of a caller gets one clear line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime_networks import finish, image, resnet, vgg
from torch import nn
from torch.autograd import forward_ad

import lhc_triton as lhc
from lhc_triton.planning import plan as make_plan
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.network.accelerated import AcceleratedModel


def _nan_weight() -> nn.Module:
    model = vgg()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    return model


def _warming_up() -> nn.Module:
    model = lhc.convert(vgg(), lhc.LHCConfig(in_block=8, out_block=8))
    model[3].masked_filters[0] = False
    return model


def _wider_plan() -> Any:
    wide = finish(nn.Sequential(*[nn.Conv2d(16, 16, 3) for _ in range(4)]))
    return make_plan(wide, image(channels=16), backend="torch")


def _thinner_plan() -> Any:
    plan = make_plan(vgg(), image(), backend="torch")
    layer = plan.layers[0]
    patterns = ((), *layer.topology.patterns[1:])
    topology = dataclasses.replace(layer.topology, patterns=patterns)
    return dataclasses.replace(plan, layers=(dataclasses.replace(layer, topology=topology), *plan.layers[1:]))


WRONG: dict[str, tuple[Callable[[], AcceleratedModel], type[Exception], str]] = {
    "no module": (lambda: accelerate("vgg", image()), TypeError, "expected a torch.nn.Module"),
    "no convolution": (
        lambda: accelerate(nn.Linear(3, 3), torch.zeros(1, 3)),
        ValueError,
        "Linear has no nn.Conv2d",
    ),
    "NaN weights": (lambda: accelerate(_nan_weight(), image()), ValueError, "layer '3' has NaN or infinity"),
    "warm-up": (lambda: accelerate(_warming_up(), image()), ValueError, "layer '3' is in its mask warm-up"),
    "wrong channels": (
        lambda: accelerate(vgg(), image(channels=4)),
        ValueError,
        r"Sequential does not take example_input \(2, 4, 12, 12\)",
    ),
    "wrong type": (lambda: accelerate(vgg(), image().double()), ValueError, "does not take example_input"),
    "no tensor": (lambda: accelerate(vgg(), "an image"), TypeError, "example_input is a str"),
    "a list of numbers": (lambda: accelerate(vgg(), [1, 2]), TypeError, "example_input is a list"),
    "an empty batch": (lambda: accelerate(vgg(), torch.zeros(0, 3, 8, 8)), ValueError, "is empty"),
    "a sparse example": (
        lambda: accelerate(vgg(), image().to_sparse()),
        ValueError,
        "sparse_coo; give a dense",
    ),
    "a nested example": (
        lambda: accelerate(vgg(), torch.nested.nested_tensor([image()[0], image(size=9)[0]])),
        ValueError,
        "is nested; give a dense tensor",
    ),
    "lazy layers": (
        lambda: accelerate(nn.Sequential(nn.LazyConv2d(8, 3)), image()),
        ValueError,
        "layer '0' is lazy and has no weights yet",
    ),
    "NaN example": (lambda: accelerate(vgg(), image() * float("nan")), ValueError, "NaN or infinity"),
    "another device": (
        lambda: accelerate(vgg(), image().to("meta")),
        ValueError,
        "|".join(["on meta", "meta"]),
    ),
    "unknown tune": (lambda: accelerate(vgg(), image(), tune="max"), ValueError, "tune='max'"),
    "unknown backend": (lambda: accelerate(vgg(), image(), backend="tpu"), ValueError, "backend='tpu'"),
    "missing backend": (
        lambda: accelerate(vgg(), image(), backend="triton"),
        ValueError,
        "layer '3' cannot run on the forced backend 'triton'",
    ),
    "no plan": (lambda: accelerate(vgg(), image(), plan={}), TypeError, "plan is a dict"),
    "plan of missing layers": (
        lambda: accelerate(vgg(), image(), plan=make_plan(resnet(), image())),
        ValueError,
        "the plan is for another model: layer 'layer1.0.conv1' is not in this model",
    ),
    "plan of other sizes": (
        lambda: accelerate(vgg(), image(), plan=_wider_plan()),
        ValueError,
        "the plan is for another model: layer '0' has in_channels 16 in the plan and 3 in the model",
    ),
    "plan that drops weights": (
        lambda: accelerate(vgg(), image(), plan=_thinner_plan()),
        ValueError,
        "layer '3' has .* live weights that the plan drops",
    ),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_line(case: str) -> None:
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_forced_triton_backend_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"layer '3' cannot run on the forced backend 'triton'.*CUDA"):
        accelerate(vgg(), image(), backend="triton", tune="off")


def test_wrong_channels_at_run_time_are_one_clear_error() -> None:
    fast = accelerate(vgg(), image(), backend="torch", tune="off")
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\]"):
        fast(image(channels=5))


def test_an_error_of_the_models_own_code_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = vgg()[:3], nn.Linear(16 * 144, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.body(x).flatten(1)).view(-1, 5)
            return y

    fast = accelerate(Classifier(), image(size=12), tune="off", backend="dense")
    assert fast.report()["traced"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(image(size=9))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_gradients_are_right_or_refused(backend: str) -> None:
    model = nn.Sequential(*vgg()[:6])  # sparse layers between dense ones
    fast = accelerate(model, image(), backend=backend, tune="off")
    mine, theirs = image(seed=4).requires_grad_(), image(seed=4).requires_grad_()
    model(theirs).sum().backward()
    total = fast(mine).sum()
    if backend == "torch":
        with pytest.raises(RuntimeError, match="is for inference only and has no backward"):
            total.backward()
        return
    total.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_derivatives_in_forward_mode_are_refused(backend: str) -> None:
    fast = accelerate(vgg(), image(), backend=backend, tune="off")
    with pytest.raises(RuntimeError, match="has no derivatives") as caught:
        torch.func.jvp(fast, (image(),), (image(seed=3),))
    assert "\n" not in str(caught.value)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no derivatives"):
        fast(forward_ad.make_dual(image(), image(seed=3)))
