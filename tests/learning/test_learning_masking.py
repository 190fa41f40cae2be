"""Products of weights and block masks, against loops and the product with the masks of all weights."""

import itertools

import pytest
import torch
from blocked_masks import blocked_convolutions, effects_of, mask_by_loops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from lhc_triton.layers import LHCConv2d
from lhc_triton.masking import apply_mask
from lhc_triton.topology import LHCConfig, block_grid, expand_mask

quick = settings(max_examples=40, deadline=None)
formats = pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
LARGE = (352, 128, 3, 3)  # more than one piece on a CPU, the last one smaller


@quick
@given(blocked_convolutions())
def test_filters_that_do_not_use_their_mask_stay_whole(case):
    out_channels, in_channels, in_block, out_block, kernel, seed = case
    grid = block_grid(out_channels, in_channels, in_block, out_block)
    weight = effects_of((out_channels, in_channels), kernel, seed + 1).requires_grad_()
    block_mask = (effects_of(grid, kernel, seed) > 0).double().requires_grad_()
    used = effects_of((out_channels,), (), seed + 2) > 0
    mask = mask_by_loops(block_mask.detach(), out_channels, in_channels, in_block, out_block)
    mask = torch.where(used[:, None, None, None], mask, 1)
    result = apply_mask(weight, block_mask, in_block, out_block, used)
    assert torch.equal(result, weight * mask)
    pull = effects_of((out_channels, in_channels), kernel, seed + 3)
    result.backward(pull)
    assert torch.equal(weight.grad, pull * mask)
    products = torch.where(used[:, None, None, None], pull * weight.detach(), 0)
    for group, block in itertools.product(*map(range, grid)):
        rows = slice(group * out_block, (group + 1) * out_block)
        columns = slice(block * in_block, (block + 1) * in_block)
        expected = products[rows, columns].sum((0, 1))
        assert torch.allclose(block_mask.grad[group, block], expected, rtol=1e-12, atol=1e-12)


@quick
@given(blocked_convolutions(), st.booleans())
def test_apply_mask_is_the_product_in_the_weights_memory_format(case, channels_last):
    out_channels, in_channels, in_block, out_block, kernel, seed = case
    block_mask = (
        effects_of(block_grid(out_channels, in_channels, in_block, out_block), kernel, seed) > 0
    ).double()
    weight = effects_of((out_channels, in_channels), kernel, seed + 1)
    form = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.to(memory_format=form)
    result = apply_mask(weight, block_mask, in_block, out_block)
    expected = weight * mask_by_loops(block_mask, out_channels, in_channels, in_block, out_block)
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=form)


@quick
@given(
    st.tuples(*[st.integers(1, 4)] * 6), st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans()
)
def test_a_product_with_a_learned_mask_has_the_gradients_of_one_with_the_masks_of_all_weights(
    sizes, seed, weight_last, pull_last, weight_learns
):
    groups, blocks, in_block, out_block, *kernel = sizes
    filters, channels = groups * out_block, blocks * in_block
    forms = [torch.channels_last if last else torch.contiguous_format for last in (weight_last, pull_last)]
    weight = effects_of((filters, channels), kernel, seed).to(memory_format=forms[0])
    weight.requires_grad_(weight_learns)
    mask = (effects_of((groups, blocks), kernel, seed + 1) > 0).double().requires_grad_()
    pull = effects_of((filters, channels), kernel, seed + 2).to(memory_format=forms[1])
    result = apply_mask(weight, mask, in_block, out_block)
    assert result.is_contiguous(memory_format=forms[0])
    wanted = [weight, mask] if weight_learns else [mask]
    found = torch.autograd.grad(result, wanted, pull)
    whole = weight * expand_mask(mask, filters, channels, in_block, out_block)
    assert torch.equal(result, whole)
    for mine, expected in zip(found, torch.autograd.grad(whole, wanted, pull), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def large_layer(form, frozen=False):
    torch.manual_seed(0)
    filters, channels, *kernel = LARGE
    layer = LHCConv2d(channels, filters, kernel, config=LHCConfig(in_block=32, out_block=16))
    if frozen:
        layer.freeze()
    return layer.to(memory_format=form)


@formats
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_large_weight_is_the_same_product_with_the_same_gradients(form, mixed, dtype):
    filters, channels, *kernel = LARGE
    weight = effects_of((filters, channels), kernel, 1).float().to(memory_format=form).requires_grad_()
    mask = (effects_of((filters // 16, channels // 32), kernel, 2) > 0).float().requires_grad_()
    used = effects_of((filters,), (), 3) > 0 if mixed else None
    result = apply_mask(weight, mask, 32, 16, used, dtype)
    assert result.is_contiguous(memory_format=form)
    whole = expand_mask(mask, filters, channels, 32, 16)
    if mixed:
        whole = torch.where(used[:, None, None, None], whole, 1)
    expected = (weight * whole).to(dtype or torch.float32)
    assert torch.equal(result, expected)
    pull = effects_of((filters, channels), kernel, 4).to(expected.dtype)
    found = torch.autograd.grad(result, [weight, mask], pull)
    wanted = torch.autograd.grad(expected, [weight, mask], pull)
    assert torch.equal(found[0], wanted[0])
    assert found[0].is_contiguous(memory_format=form)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    for index, operands in enumerate([(weight, mask.detach()), (weight.detach(), mask)]):  # one learns alone
        alone = torch.autograd.grad(apply_mask(*operands, 32, 16, used, dtype), operands[index], pull)[0]
        assert torch.equal(alone, found[index])


@formats
def test_a_large_weight_can_be_differentiated_twice(form):
    layer, x = large_layer(form, frozen=True), torch.randn(1, LARGE[1], 3, 3)
    gradients = []
    for convolve in (layer, lambda x: nn.functional.conv2d(x, layer.weight * layer.mask(), layer.bias)):
        first = torch.autograd.grad(convolve(x).square().sum(), layer.weight, create_graph=True)[0]
        gradients.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@formats
@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_a_layer_computes_what_a_convolution_of_its_weight_does(form, frozen):
    layer, x = large_layer(form, frozen), torch.randn(2, LARGE[1], 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        expected = nn.functional.conv2d(x, layer.weight * layer.mask(), layer.bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_a_subclass_with_a_masked_weight_of_its_own_is_run_with_it():
    class Doubled(LHCConv2d):
        def masked_weight(self):
            return 2 * super().masked_weight()

    layer, x = Doubled(8, 8, 3, bias=False), torch.randn(1, 8, 5, 5)
    layer.freeze()
    torch.testing.assert_close(layer(x), 2 * nn.functional.conv2d(x, layer.weight * layer.mask()))


def test_autocast_leaves_double_precision_alone():
    layer = LHCConv2d(4, 4, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(1, 4, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_transforms_of_a_large_layer_are_those_of_its_product():
    layer, x = large_layer(torch.channels_last, frozen=True), torch.randn(3, LARGE[1], 3, 3)
    weight, tangent = layer.weight.detach(), torch.randn(LARGE)

    def found(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, (x[None],))

    def expected(weight, x):
        return nn.functional.conv2d(x[None], weight * layer.mask(), layer.bias)

    def loss(convolve):
        return lambda weight, x: convolve(weight, x).square().sum()

    close = {"rtol": 1e-3, "atol": 1e-3}
    for convolve in (found, loss(found)):
        plain = expected if convolve is found else loss(expected)
        each = [torch.func.vmap(function, (None, 0))(weight, x) for function in (convolve, plain)]
        torch.testing.assert_close(*each, **close)
    per_sample = [torch.func.vmap(torch.func.grad(loss(f)), (None, 0))(weight, x) for f in (found, expected)]
    torch.testing.assert_close(*per_sample, **close)
    pushed = [torch.func.jvp(lambda w, f=f: f(w, x[0]), (weight,), (tangent,)) for f in (found, expected)]
    torch.testing.assert_close(*pushed, **close)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        ahead = torch.autograd.forward_ad.unpack_dual(found(dual, x[0])).tangent
    torch.testing.assert_close(ahead, pushed[1][1], **close)


@formats
@pytest.mark.parametrize("channels", [64, 1024])
def test_a_1x1_weight_keeps_its_strides_and_its_gradient_has_them(form, channels):
    layer = LHCConv2d(channels, 512, 1).to(memory_format=form)
    product = layer.masked_weight()
    assert product.stride() == layer.weight.stride()
    layer(torch.randn(1, channels, 4, 4)).sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_a_layer_that_learns_runs_on_the_meta_device():
    layer = LHCConv2d(8, 8, 3, device="meta")
    assert layer(torch.zeros(1, 8, 5, 5, device="meta")).shape == (1, 8, 3, 3)


def test_a_layer_that_learns_runs_on_fake_tensors():
    with FakeTensorMode():
        layer = LHCConv2d(8, 8, 3)
        assert layer(torch.zeros(1, 8, 5, 5)).shape == (1, 8, 3, 3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_large_frozen_layer_is_traced_as_plain_operators():
    layer, x = large_layer(torch.contiguous_format, frozen=True), torch.randn(1, LARGE[1], 3, 3)
    traced = torch.jit.trace(layer, x)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(x), layer(x))
