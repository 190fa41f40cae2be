"""Memory formats: channels_last inside an accelerated network, the model's own wherever somebody can tell."""

from __future__ import annotations

import pytest
import torch
from oracle import norm_error
from runtime_networks import finish, image
from torch import Tensor, nn

from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.runtime.op.dense import FusedConv2d

BACKENDS = [
    "torch",
    "dense",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            unavailable("native", torch.float32, "cpu") is not None, reason="no C++ compiler"
        ),
    ),
]


class Flattened(nn.Module):
    """Ends as most classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(self.body(self.stem(x).relu()).relu(), 2)
        return self.head(y.view(y.size(0), -1))


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_of_a_feature_map_keeps_its_meaning_and_the_network_its_epilogues(backend: str) -> None:
    torch.manual_seed(0)
    model = finish(Flattened())
    fast = accelerate(model, image(size=12), tune="off", backend=backend)
    assert fast.report()["traced"]
    x = image(size=12, batch=3, seed=4)
    with torch.no_grad():
        assert norm_error(fast(x), model(x)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_outputs_have_the_strides_that_the_model_gives_them(
    backend: str, given: torch.memory_format, weights: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = finish(chain()).to(memory_format=weights)
    fast = accelerate(model, image(size=12), tune="off", backend=backend)
    for size in (12, 17, 1):
        x = image(size=size, seed=3).contiguous(memory_format=given)
        with torch.no_grad():
            mine, theirs = fast(x), model(x)
        matter = [axis for axis, length in enumerate(mine.shape) if length > 1]
        assert [mine.stride(axis) for axis in matter] == [theirs.stride(axis) for axis in matter]
        assert norm_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_between_the_layers_are_channels_last(backend: str) -> None:
    torch.manual_seed(0)
    fast = accelerate(finish(chain()), image(size=12), tune="off", backend=backend, graphs=False)
    seen = []
    for layer in fast.modules():
        if isinstance(layer, FusedConv2d):
            layer.register_forward_hook(lambda module, given, output: seen.append(output))
    fast(image(size=12))
    assert len(seen) == 2
    assert all(y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous() for y in seen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_images_with_their_channels_last_are_traced(backend: str, given: torch.memory_format) -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x.permute(0, 3, 1, 2))
            return y

    torch.manual_seed(0)
    model = finish(Turning())
    x = image(size=12).permute(0, 2, 3, 1).contiguous()
    fast = accelerate(model, x, tune="off", backend=backend)
    assert fast.report()["traced"]
    for seed in (3, 4):
        x = image(size=12 + seed, seed=seed).permute(0, 2, 3, 1).contiguous(memory_format=given)
        with torch.no_grad():
            mine, theirs = fast(x), model(x)
        assert mine.stride() == theirs.stride()
        assert norm_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("hooked", [False, True])
def test_what_is_left_of_a_layer_may_be_one_filter(hooked: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        chain(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
    )
    finish(model)
    with torch.no_grad():
        model[1].weight[1:] = 0
        model[1].bias[1:] = -1
    if hooked:
        model[2].register_forward_hook(lambda module, given, output: None)
    fast = accelerate(model, image(size=12), tune="off")
    for given in (torch.contiguous_format, torch.channels_last):
        x = image(size=15, seed=3).contiguous(memory_format=given)
        with torch.no_grad():
            mine, theirs = fast(x), model(x)
        assert mine.stride() == theirs.stride()
        assert norm_error(mine, theirs) < 1e-5
