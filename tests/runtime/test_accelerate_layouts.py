"""Who writes which memory format between the layers of a CPU network."""

from __future__ import annotations

import copy

import pytest
import torch
from runtime_networks import finish, image, norm_error
from torch import nn

from lhc_triton.runtime.accelerate import accelerate
from lhc_triton.runtime.backends import unavailable
from lhc_triton.runtime.epilogue import layer_layout
from lhc_triton.runtime.modules import DenseConv2d, GroupedConv2d

needs_native = pytest.mark.skipif(
    unavailable("native", torch.float32, "cpu") is not None, reason="no C++ compiler"
)


def chain(pooled: bool) -> nn.Sequential:
    """A dense layer, pooled or not, before two that the native kernel is predicted to speed up."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
    if pooled:
        layers.append(nn.MaxPool2d(3, 2, 1))
    for _ in range(2):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("network", "backend", "readers", "layout"),
    [
        ("contiguous", "dense", (), "contiguous"),
        ("channels_last", "native", ("native",), "channels_last"),
        ("mixed", "native", ("dense",), "contiguous"),
        ("mixed", "dense", (), "channels_last"),
        ("mixed", "dense", ("native", "native"), "contiguous"),
        ("mixed", "dense", ("native", "dense"), "channels_last"),
        ("mixed", "torch", ("dense",), "channels_last"),
    ],
)
def test_a_layer_writes_what_its_kernel_or_its_readers_like(network, backend, readers, layout):
    assert layer_layout(network, backend, readers) == layout


@needs_native
def test_native_runs_a_small_dense_layer_that_only_native_layers_read():
    model = finish(chain(pooled=False), density=0.1)
    x = image(channels=3, size=56)
    fast = accelerate(model, x, tune="off")
    first, *others = fast.report()["layers"]
    assert (first["backend"], first["density"]) == ("native", 1.0)
    assert "only native layers read it" in first["reason"]
    assert [row["backend"] for row in others] == ["native", "native"]
    assert fast.report()["totals"]["sparse_layers"] == 2
    assert [layer.name for layer in fast.plan.layers] == ["0", "2", "5"]
    with torch.no_grad():
        y = fast(x)
        assert norm_error(y, copy.deepcopy(model).double()(x.double())) < 1e-5
    assert all(m.layout == "contiguous" for m in fast.modules() if isinstance(m, GroupedConv2d))


@needs_native
@pytest.mark.parametrize(("pooled", "backend"), [(True, "auto"), (False, "dense")])
def test_other_dense_layers_stay_with_torch(pooled, backend):
    fast = accelerate(
        finish(chain(pooled), density=0.1), image(channels=3, size=56), tune="off", backend=backend
    )
    dense = [m for m in fast.modules() if isinstance(m, DenseConv2d)]
    assert dense
    assert all(m.layout == "channels_last" for m in dense)
