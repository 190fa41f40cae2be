"""What other people's networks do between two convolutions, without a trace left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_parts import step
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@step("conv", "norm", "relu")
def norm_relu(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.relu(m.norm(m.conv(h)))


@step("conv", "conv2")
def any_activation(m: Any, h: Tensor, k: Tensor) -> Tensor:
    forms: list[Callable[[Tensor], Tensor]] = [
        F.relu,
        torch.relu,
        torch.relu_,
        Tensor.relu_,
        F.relu6,
        F.silu,
        F.hardswish,
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu(input=x),
        lambda x: F.leaky_relu(x, 0.1, True),
        lambda x: x.clamp_(min=0),
        lambda x: torch.where(x > 0, x, 0.1 * x),
    ]
    return m.conv2(forms[m.variant % len(forms)](m.conv(h)))


@step("conv", "norm")
def residual(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.norm(m.conv(h))
    forms = [lambda: y + k, lambda: k + y, lambda: torch.add(y, k), lambda: y.add(k), lambda: y - k]
    forms += [lambda: torch.add(y, k, alpha=0.5), lambda: y.add_(k), lambda: k.add(y)]
    return F.relu(forms[m.variant % len(forms)]())


@step("narrow", "conv")
def chunks(m: Any, h: Tensor, k: Tensor) -> Tensor:
    a, b = (m.conv(h).chunk, k.chunk)[m.variant % 2](2, 1)
    a = a.mul_(0.5) if m.variant % 3 == 0 else a
    return torch.cat([b, m.narrow(a)], 1)


@step("narrow", "conv")
def splits(m: Any, h: Tensor, k: Tensor) -> Tensor:
    parts = torch.split(m.conv(h), m.channels // 2, dim=1)
    return torch.cat((m.narrow(parts[1]).relu(), parts[0]), dim=1)


@step("wide")
def gated(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.wide(h)
    return y[:, : m.channels] * y[:, m.channels :].sigmoid()


@step("conv")
def shuffled(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    n, c, height, width = y.shape if m.variant % 2 else y.size()
    pairs = y.view(n, 2, c // 2, height, width) if m.variant % 3 else y.reshape(n, 2, c // 2, height, width)
    return pairs.transpose(1, 2).contiguous().view(n, c, height, width)


@step("conv", "linear", "layernorm")
def tokens(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    seen = m.linear(m.layernorm(y.flatten(2).transpose(1, 2)))
    return seen.transpose(1, 2).reshape(y.shape) if m.variant % 2 else seen.mT.view_as(y.contiguous())


@step("conv", "linear")
def channels_last_linear(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.linear(m.conv(h).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@step("conv")
def flat_order(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    flat = torch.flatten(y, 1) if m.variant % 2 else y.view(y.size(0), -1)
    return y - 0.1 * flat.cumsum(1).div(m.channels).tanh().view(y.size())


@step("conv")
def strided_reader(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    forms = [
        lambda: y.as_strided(y.shape, y.stride()) + k,
        lambda: y.as_strided((y.numel(),), (1,)).view(y.shape),
        lambda: y * (1 + 0.1 * y.stride(1)) / y.stride(0),
        lambda: torch.as_strided(y, (y.size(0), y.numel() // y.size(0)), (y.stride(0), 1)).view(y.shape),
    ]
    return forms[m.variant % len(forms)]()


@step("conv")
def contiguity_decides(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    return y * 2 if y.is_contiguous() else y * 0.5


@step("conv")
def other_layout(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h.contiguous(memory_format=torch.channels_last) if m.variant % 2 else h.contiguous())
    return y.to(memory_format=torch.channels_last) if m.variant % 3 else y.contiguous()


@step("conv")
def turned(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h.transpose(2, 3))
    if m.variant % 2:
        return y.transpose(2, 3)
    y.transpose_(2, 3).mul_(0.5)
    return y


@step("conv")
def rolled(m: Any, h: Tensor, k: Tensor) -> Tensor:
    forms = [lambda y: y.roll(1, 2), lambda y: y.flip(3), lambda y: torch.rot90(y, 2, (2, 3))]
    return forms[m.variant % 3](m.conv(h)) + k


@step("conv")
def in_autocast(m: Any, h: Tensor, k: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.conv(h)
    return y.to(h.dtype)


@step("conv")
def in_another_mode(m: Any, h: Tensor, k: Tensor) -> Tensor:
    with (torch.no_grad, torch.enable_grad)[m.variant % 2]():
        return m.conv(h) + k


@step("conv", "conv2")
def cast(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h.double().mul(0.5).to(m.conv.weight.dtype))
    return m.conv2(y.to(next(m.parameters()).dtype).type_as(k))


@step("conv")
def weight_read(m: Any, h: Tensor, k: Tensor) -> Tensor:
    weight = m.conv.weight
    if m.variant % 2:
        return m.conv(h) / weight.abs().mean()
    padding = "same" if m.conv.stride == (1, 1) else 0
    return F.conv2d(h, weight * 0.5, m.conv.bias, 1, padding, m.conv.dilation, m.conv.groups)


@step("conv", "norm")
def called_by_forward(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.norm.forward(m.conv.forward(h)).relu()


@step("conv")
def called_by_keyword(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv(input=h) + k


@step("conv", "norm")
def called_twice(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv(m.norm(m.conv(h)).relu()) + m.conv(k)


@step("conv")
def unbatched(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return torch.stack([m.conv(h[0]), *(m.conv(k[:1]).squeeze(0) for _ in range(1))]).mean(0, True) + k


@step("conv")
def image_by_image(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return torch.cat([m.conv(h[i : i + 1]) for i in range(h.shape[0])])


@step("bare")
def padded_outside(m: Any, h: Tensor, k: Tensor) -> Tensor:
    d = m.bare.dilation[0]
    modes: list[dict[str, Any]] = [{}, {"value": 0.5}, {"mode": "replicate"}, {"mode": "circular"}]
    return m.bare(F.pad(h, (d, d, d, d), **modes[m.variant % 4]))


@step("strided", "norm")
def down_and_up(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.norm(m.strided(h)).relu()
    mode = "nearest" if m.variant % 2 else "bilinear"
    return F.interpolate(y, size=k.shape[-2:], mode=mode) + k


@step("conv", "conv2")
def pooled_and_up(m: Any, h: Tensor, k: Tensor) -> Tensor:
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, kernel_size=2, stride=2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.adaptive_avg_pool2d(x, 3),
    ]
    y = m.conv2(forms[m.variant % len(forms)](m.conv(h).relu()))
    return F.interpolate(y, k.shape[2:])


@step("conv", "up")
def transposed(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return F.max_pool2d(m.up(m.conv(h)), 2)


@step("depthwise", "conv", "groupnorm")
def separable(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.groupnorm(m.conv(m.depthwise(h).relu_()))


@step("grouped", "mirrored")
def other_kinds(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.mirrored(m.grouped(h).relu())


@step("conv", "linear")
def squeezed(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    gate = m.linear(F.adaptive_avg_pool2d(y, 1).view(y.size(0), -1)).sigmoid()
    return y * gate[:, :, None, None] + k.mean((2, 3), keepdim=True)


@step("conv", "conv2")
def condition_on_values(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    return m.conv2(y) if y.mean() > k.mean() else y.relu()


@step("conv")
def condition_on_shape(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    return y * 0.5 if h.shape[0] % 2 else y.relu() + h.size(-1) / 10


@step("conv")
def number_read(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv(h) / (float(k.abs().amax()) + 0.1)


@step("conv")
def attention(m: Any, h: Tensor, k: Tensor) -> Tensor:
    q, v = m.conv(h).flatten(2), k.flatten(2)
    return (v @ (q.transpose(1, 2) @ v / v.shape[-1]).softmax(-1)).view(k.shape)


@step("conv")
def chosen_channels(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    best = y.mean((2, 3)).topk(3).indices
    return y + 0.5 * y.gather(1, best[:, :, None, None].expand(-1, -1, *y.shape[2:])).sum(1, keepdim=True)


@step("conv")
def spectral(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(m.conv(h)) * 0.5, s=h.shape[-2:]) + k


@step("conv")
def recomputed(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return checkpoint(m.conv, h, use_reentrant=False)


@step("conv", random=True)
def noisy(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv(h + 0.1 * torch.randn_like(h))


@step("conv", random=True)
def dropout_always_on(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return F.dropout(m.conv(h), 0.2)


@step("conv")
def first_image_added(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return F.relu(m.conv(h) + k[:1]) if m.variant % 2 else m.conv(h).add_(k[:1])


@step("conv", "norm")
def normed_and_not(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    return m.norm(y) + (y.relu() if m.variant % 2 else y)


@step("conv", "conv2", "norm")
def norm_shared(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.norm(m.conv(h)).relu() + m.norm(m.conv2(k))


@step("conv", "tied", "norm")
def weights_tied(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.tied(m.norm(m.conv(h)).relu()) + k


@step("nested")
def nested_modules(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.nested["branch"](h)
    for layer in m.nested["list"]:
        y = layer(y)
    return y + k


@step("parallel")
def wrapped(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.parallel(h) + k


@step("conv")
def size_in_a_constant(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    rows = torch.linspace(-1, 1, y.shape[2], dtype=y.dtype).view(1, 1, -1, 1)
    return y * rows if m.variant % 2 else y + torch.zeros(y.shape[0], 1, 1, 1, dtype=y.dtype)


@step("conv")
def grid_cached(m: Any, h: Tensor, k: Tensor) -> Tensor:
    size = tuple(h.shape[-2:])
    if size not in m.grids:
        m.grids[size] = torch.arange(size[0] * size[1], dtype=h.dtype).view(1, 1, *size) / 100
    return m.conv(h) + m.grids[size]


@step("conv")
def failure_swallowed(m: Any, h: Tensor, k: Tensor) -> Tensor:
    try:
        level = float(k.mean())
    except (TypeError, ValueError):
        level = 0.7
    return m.conv(h) * (1 + level)


@step("conv")
def kind_asked(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    forms = [lambda: isinstance(y, Tensor), lambda: type(y) is Tensor, lambda: y.dtype is h.dtype]
    forms += [lambda: y.dtype == torch.float32, lambda: y.is_cuda, lambda: torch.is_grad_enabled()]
    return y * 0.5 if forms[m.variant % len(forms)]() else y.relu()


@step("conv")
def unfolded(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    if m.variant % 2:
        return F.fold(F.unfold(y, 3, padding=1) / 9, y.shape[-2:], 3, padding=1)
    return y.unfold(3, 1, 1).squeeze(-1) + torch.einsum("nchw,nc->nchw", k, y.mean((2, 3)))


@step("conv")
def sorted_rows(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h).sort(dim=2).values
    return y.scatter_add(1, torch.zeros_like(k, dtype=torch.long), k * 0.1)


@step("conv")
def through_numpy(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    return torch.from_numpy(y.detach().numpy().ravel(order="K" if m.variant % 2 else "C")).view(y.shape)


@step("conv", "conv2")
def chosen_pixels(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    live = y[y > 0]
    return m.conv2(y) * (live.mean() if live.numel() else 1.0)


@step("conv", "upsample")
def modules_without_weights(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return F.pixel_unshuffle(m.upsample(m.conv(h)), 2)[:, ::4] + F.dropout(k, 0.5, m.training)


@step("conv", "narrow")
def listed_pieces(m: Any, h: Tensor, k: Tensor) -> Tensor:
    forms: list[Callable[[Tensor], Any]] = [
        lambda y: y.chunk(2, 1),
        lambda y: y.split([m.channels // 2, m.channels - m.channels // 2], 1),
        lambda y: torch.tensor_split(y, [m.channels // 2], dim=1),
    ]
    pieces = list(forms[m.variant % len(forms)](m.conv(h)))
    pieces.append(m.narrow(pieces[-1]).relu())
    return torch.cat(pieces[1:], 1) + k


@step("conv", "conv2", "table")
def functions_kept(m: Any, h: Tensor, k: Tensor) -> Tensor:
    for function in m.table["steps"]:
        h = function(h)
    return h + k


@step("conv", "weak")
def known_by_its_part(m: Any, h: Tensor, k: Tensor) -> Tensor:
    owner = m.conv.owner()
    owner.seen = h.mean()
    return m.conv(h) + m.seen


@step("conv")
def marked_layer(m: Any, h: Tensor, k: Tensor) -> Tensor:
    m.conv.seen = getattr(m.conv, "seen", 0) + 1
    return m.conv(h) * (1.0 if m.conv.seen < 6 else 0.5)


@step("conv", "source")
def own_generator(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv(h) * (1 + m.source.random())


@step("conv")
def sometimes_random(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv(h) * (0.5 if float(torch.rand(())) < 1e-9 else 1.0)
