"""Fused convolutions: same numbers, round trips, and moves that are refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import norm_error
from torch import Tensor, nn

from lhc_triton.planning import ConvGeometry, LayerPlan, LayerTopology, Tile
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.op import prepacked
from lhc_triton.runtime.op.dense import DenseConv2d


def layer_plan(geometry: ConvGeometry, seed: int = 0, density: float = 0.4) -> LayerPlan:
    """Every filter group in a tile of its own; the first group is empty."""
    rng = np.random.default_rng(seed)
    shape = (-(-geometry.out_channels // 8), -(-geometry.in_channels // 8), *geometry.kernel)
    mask = rng.random(shape) < density
    mask[0] = False
    topology = LayerTopology.from_mask("conv", geometry, 8, 8, mask)
    tiles = tuple(Tile((group,), topology.pattern_of(group)) for group in range(topology.groups))
    return LayerPlan(topology, tiles, 8, "torch", "test")


def live_weight(layer: LayerPlan, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    topology = layer.topology
    geometry = topology.geometry
    mask = torch.from_numpy(topology.block_mask()).repeat_interleave(8, 0).repeat_interleave(8, 1)
    mask = mask[: geometry.out_channels, : geometry.in_channels]
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weight * mask).to(dtype)


GEOMETRY = ConvGeometry(2, 20, 28, 9, 7, (3, 3), (2, 1), (1, 0, 2, 1), (1, 1))


def example(dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    x = torch.randn(2, 20, 9, 7, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


def grouped(backend: str = "torch", dtype: torch.dtype = torch.float32, **options: Any) -> GroupedConv2d:
    layer = layer_plan(GEOMETRY)
    bias = torch.linspace(-1, 1, 28, dtype=dtype)
    return GroupedConv2d.from_weight(layer, live_weight(layer, dtype=dtype), bias, backend=backend, **options)


def expected(module: GroupedConv2d | DenseConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    weight = module.dense_weight() if isinstance(module, GroupedConv2d) else module.weight
    top, bottom, left, right = module.padding
    bias = None if module.bias is None else module.bias.double()
    y = F.conv2d(
        F.pad(x.double(), (left, right, top, bottom)),
        weight.double(),
        bias,
        module.stride,
        0,
        module.dilation,
        module.groups,
    )
    y = y if residual is None else y + residual.double()
    y = y.relu() if module.activation == "relu" else y
    return F.max_pool2d(y, 2) if module.pool == "max2x2" else y


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pool", ["none", "max2x2"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_grouped_convolution_runs_its_whole_epilogue(backend: str, pool: str, with_residual: bool) -> None:
    module = grouped(backend, activation="relu", pool=pool)
    x = example()
    residual = torch.randn(2, 28, 4, 8) if with_residual else None
    assert norm_error(module(x, residual), expected(module, x, residual)) < 1e-5


@pytest.mark.parametrize("make", [grouped, None], ids=["grouped", "dense"])
def test_a_residual_that_broadcasts_is_added_as_torch_would(make: Any) -> None:
    module = grouped(activation="relu") if make else DenseConv2d(torch.randn(4, 20, 3, 3), None)
    x = example()
    residual = torch.randn(1, module.out_channels, 1, 1)
    assert norm_error(module(x, residual), expected(module, x, residual)) < 1e-5


@pytest.mark.parametrize("padding", [(1, 1, 2, 2), (0, 1, 2, 0)], ids=str)
def test_a_dense_convolution_runs_its_whole_epilogue(padding: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = DenseConv2d(
        torch.randn(6, 10, 3, 2),
        torch.randn(6),
        padding=padding,
        dilation=(1, 2),
        groups=2,
        activation="relu",
        pool="max2x2",
    )
    assert norm_error(module(example()), expected(module, example())) < 1e-5


def test_only_canonical_blocks_and_bias_are_stored() -> None:
    assert set(grouped().state_dict()) == {"blocks", "bias"}


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_packs_it(assign: bool) -> None:
    module, other = grouped(), grouped()
    other.blocks.mul_(2.0)
    module.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    x = example()
    assert norm_error(module(x), expected(module, x)) < 1e-5
    assert torch.equal(module.blocks, other.blocks)


def test_loading_blocks_of_another_size_is_an_error() -> None:
    state = grouped().state_dict()
    state["blocks"] = state["blocks"][1:]
    with pytest.raises(RuntimeError, match="size mismatch for blocks"):
        grouped().load_state_dict(state)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_a_change_of_type_packs_again(dtype: torch.dtype, tolerance: float) -> None:
    module = grouped().to(dtype)
    x = example(dtype)
    y = module(x)
    assert module.packed.dtype == y.dtype == dtype
    assert norm_error(y, expected(module, x)) < tolerance


def test_a_deep_copy_stands_alone() -> None:
    module = grouped()
    twin = copy.deepcopy(module)
    module.blocks.zero_()
    module.load_state_dict(module.state_dict())
    x = example()
    assert float(module(x).abs().sum()) != float(twin(x).abs().sum())
    assert norm_error(twin(x), expected(twin, x)) < 1e-5


def test_a_type_that_the_backend_cannot_serve_is_refused_before_anything_moves() -> None:
    module = grouped()
    with pytest.raises(ValueError, match=r"layer 'conv' cannot move .*does not serve float8_e4m3fn"):
        module.to(torch.float8_e4m3fn)
    assert module.blocks.dtype == module.packed.dtype == torch.float32


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match='backend "cuda graphs" is unknown'):
        grouped("cuda graphs")


@pytest.mark.parametrize("shape", [(2, 19, 9, 7), (19, 9, 7), (9, 7)], ids=str)
def test_an_input_of_other_channels_is_one_clear_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 20, H, W\]"):
        grouped()(torch.zeros(shape))


@pytest.mark.parametrize("name", ["activation", "pool"])
def test_an_unknown_epilogue_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='gelu'"):
        DenseConv2d(torch.zeros(1, 1, 1, 1), None, **{name: "gelu"})


def test_fused_convolutions_stay_in_eval_mode() -> None:
    holder = nn.Sequential(grouped(), DenseConv2d(torch.zeros(1, 28, 1, 1), None)).train()
    assert holder.training
    assert not any(module.training for module in holder)


def test_backward_says_what_to_do() -> None:
    x = example().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        grouped()(x).sum().backward()


def test_dense_weights_keep_their_layout_when_a_state_is_assigned() -> None:
    torch.manual_seed(0)
    module = DenseConv2d(torch.randn(8, 20, 3, 3), None)
    state = {"weight": module.weight.contiguous()}
    module.load_state_dict(state, assign=True)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


def dense(dtype: torch.dtype = torch.float32, groups: int = 1) -> DenseConv2d:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(28, 20 // groups, 3, 3, generator=generator).to(dtype) / 13
    bias = torch.linspace(-1, 1, 28, dtype=dtype)
    return DenseConv2d(
        weight, bias, stride=(2, 1), padding=(1, 1, 2, 2), dilation=(1, 2), groups=groups, activation="relu"
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_dense_layer_keeps_its_weight_in_onednn_s_order(dtype, limit, groups):
    module, x = dense(dtype, groups), example(dtype)
    served = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert prepacked.serves(x) == served
    y = module(x)
    assert (module._prepacked is not None) == served
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert norm_error(y, expected(module, x)) <= limit
    other = example(dtype, seed=4)[:, :, :6].repeat(2, 1, 1, 1)
    assert norm_error(module(other), expected(module, other)) <= limit


def test_a_prepacked_weight_follows_its_weight():
    module, x = dense(), example()
    module(x)
    with torch.no_grad():
        module.weight.mul_(2)
    assert norm_error(module(x), expected(module, x)) <= 1e-6
    module.load_state_dict({name: value * 3 for name, value in module.state_dict().items()})
    assert norm_error(module(x), expected(module, x)) <= 1e-6
    copied = copy.deepcopy(module)
    assert copied._prepacked is None
    assert torch.equal(copied(x), module(x))
    assert norm_error(module.double()(x.double()), expected(module, x.double())) <= 1e-12


def test_a_weight_written_to_in_inference_mode_is_not_taken_for_the_old_one():
    with torch.inference_mode():
        module, x = dense(), example()
        module(x)
        module.weight.mul_(2)
        assert norm_error(module(x), expected(module, x)) <= 1e-6
        module.to(torch.float64).to(torch.float32)  # now its tensors are of inference mode, too
        assert module.weight.is_inference()
        module(x)
        module.weight.mul_(2)
        assert norm_error(module(x), expected(module, x)) <= 1e-6


def test_nan_and_infinity_pass_a_prepacked_layer_as_they_pass_torch():
    module, x = dense(), example()
    x[0, 3, 4, 4], x[1, 7, 2, 2] = float("nan"), float("inf")
    assert torch.equal(module(x).isnan(), expected(module, x).isnan())
    assert torch.equal(module(x).isinf(), expected(module, x).isinf())
