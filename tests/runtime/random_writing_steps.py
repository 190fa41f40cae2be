"""Steps that write to what others read: in place, through aliases, into constants, buffers and attributes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from random_parts import step
from torch import Tensor


@step("conv", "norm", "relu", "hook")
def hooked(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.relu(m.norm(m.conv(h))) + k


@step("conv")
def residual_in_place(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    y += k
    return y.relu_()


@step("conv")
def other_grows(m: Any, h: Tensor, k: Tensor) -> Tensor:
    k += m.conv(h)
    return k


@step("conv", "conv2")
def alias_grows(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    t = y
    t += k
    return m.conv2(y).relu() + t


@step("conv")
def alias_rectified(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    kept = y.detach() if m.variant % 2 else y
    rectified = y.relu_() if m.variant % 3 else F.relu(y, inplace=True)
    return rectified + 0.5 * kept


@step("conv", "conv2")
def rectified_late(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    z = m.conv2(y)
    y.relu_()
    return z + y


@step("conv")
def out_argument(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    if m.variant % 2:
        return torch.mul(y, 0.5, out=k)
    torch.add(y, k, out=y)
    return y


@step("conv")
def doubled_by_itself(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    y += y
    return y + y if m.variant % 2 else y


@step("conv", "scale")
def captured_buffer_scaled(m: Any, h: Tensor, k: Tensor) -> Tensor:
    s = m.scale
    s *= 0.9
    return m.conv(h) * s


@step("conv", "gain", "scale")
def captured_tensors(m: Any, h: Tensor, k: Tensor) -> Tensor:
    s = m.gain * m.scale
    s += 0.1
    return m.conv(h * s) * m.gain


@step("conv")
def view_rectified(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    y.view(y.size(0), -1).relu_()
    return y + k


@step("conv")
def slice_written(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    c = m.channels // 2
    y[:, :c] += k[:, c:]
    y[:, c:, ::2] = 0.5
    return y


@step("conv")
def slice_of_input_scaled(m: Any, h: Tensor, k: Tensor) -> Tensor:
    k[:, ::2].mul_(0.5)
    return m.conv(h)


@step("conv", "linear")
def constant_written(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    means = y.mean((0, 2, 3))
    canvas = torch.zeros(m.channels, dtype=y.dtype)
    order = torch.arange(m.channels - 1, -1, -1)
    form = m.variant % 7
    if form == 0:
        canvas.copy_(means)
    elif form == 1:
        canvas[order] = means
    elif form == 2:
        canvas.index_copy_(0, order, means)
    elif form == 3:
        torch.amax(y, (0, 2, 3), out=canvas)
    elif form == 4:
        canvas += means
    elif form == 5:
        torch.maximum(canvas, means, out=canvas)
    else:
        canvas.index_add_(0, order, means)
    return y * m.linear(canvas).view(1, -1, 1, 1)


@step("conv")
def new_tensor_written(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    forms = [torch.empty_like, torch.zeros_like, torch.ones_like, lambda t: t.new_zeros(t.shape)]
    made = forms[m.variant % len(forms)](y)
    made.copy_(y)
    made[:, 0].fill_(0.25)
    return made


@step("conv")
def masked(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    if m.variant % 3 == 0:
        y[k > 0.5] = 0.0
        return y
    return y.masked_fill(k > 0.5, -0.1) if m.variant % 3 == 1 else torch.where(k > 0, y, k)


@step("conv", "count")
def counted(m: Any, h: Tensor, k: Tensor) -> Tensor:
    m.count += 1
    return m.conv(h) * (1 + 0.2 * (m.count % 3))


@step("conv", "peak")
def running_peak(m: Any, h: Tensor, k: Tensor) -> Tensor:
    if m.variant % 2:
        m.peak = torch.maximum(m.peak, h.abs().amax())
    else:
        m.peak.copy_(torch.maximum(m.peak, h.abs().amax()))
    return m.conv(h) / m.peak


@step("conv")
def counted_in_python(m: Any, h: Tensor, k: Tensor) -> Tensor:
    m.calls += 1
    return m.conv(h) * (1 + 0.5 * (m.calls % 2))


@step("conv", "array")
def counted_in_an_array(m: Any, h: Tensor, k: Tensor) -> Tensor:
    m.array[0] += 1
    return m.conv(h) * (1.0 if m.array[0] < 6 else 0.5)


@step("conv", "last")
def kept_until_next_call(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    before = m.last
    m.last = y.mean().detach()
    return y if before is None else y + before


@step("conv", "kept")
def kept_in_a_dict(m: Any, h: Tensor, k: Tensor) -> Tensor:
    m.kept["y"] = m.conv(h)
    return m.kept["y"].relu() + 0.1 * m.kept["y"]


@step("conv", "conv2", "tap")
def features_of_a_hook(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv2(m.conv(h)) + m.read(m)


@step("conv", "relu")
def other_rectified(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return m.conv(h) + m.relu(k)


@step("conv", "conv2")
def scaled_between(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    h.mul_(0.5) if m.variant % 2 else k.div_(2)
    return m.conv2(h).relu_().add_(y)


@step("conv")
def data_written(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    if m.variant % 2:
        y.data.mul_(0.5)
    else:
        y.detach()[:, 0] = 1.0
    return y + k


@step("conv")
def reshaped_in_place(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    z = y.unsqueeze_(0).mul_(0.5) if m.variant % 2 else y.squeeze_(0)
    return (z.squeeze_(0) if m.variant % 2 else z).reshape(k.shape) + k


@step("conv")
def parts_written(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    for place, part in enumerate(y.unbind(0) if m.variant % 2 else torch.tensor_split(y, 2, dim=1)):
        part.mul_(1 + place / 2)
    return y


@step("conv")
def scattered(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    forms = [
        lambda: y.select(1, 0).copy_(k[:, 1]),
        lambda: y.narrow(1, 0, 2).zero_(),
        lambda: y.index_fill_(1, torch.tensor([1, 3]), 0.5),
        lambda: y[..., 0].fill_(1),
        lambda: y.permute(0, 2, 3, 1).clamp_(-1, 1),
        lambda: y.flatten(1)[:, :5].add_(1),
        lambda: y.masked_fill_(k > 0.5, 0.0),
        lambda: y.swapaxes(2, 3).cumsum_(2).div_(8),
    ]
    forms[m.variant % len(forms)]()
    return y


@step("conv", "last")
def first_call_decides(m: Any, h: Tensor, k: Tensor) -> Tensor:
    if m.last is None:
        m.last = h.detach().mean((0, 2, 3)).view(1, -1, 1, 1)
    return m.conv(h) - m.last


@step("conv")
def later_calls_differ(m: Any, h: Tensor, k: Tensor) -> Tensor:
    m.calls += 1
    return m.conv(h) * (1.0 if m.calls < 5 else 0.5)


@step("conv", "mean", "var")
def batch_statistics(m: Any, h: Tensor, k: Tensor) -> Tensor:
    return F.batch_norm(m.conv(h), m.mean, m.var, training=True, momentum=0.5) + m.mean.view(-1, 1, 1)


@step("conv", "history")
def history_kept(m: Any, h: Tensor, k: Tensor) -> Tensor:
    m.history.append(h.mean((2, 3), keepdim=True).sum(0, keepdim=True))
    return m.conv(h) + sum(m.history) / len(m.history)


@step("conv", "kept")
def kept_by_key(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv(h)
    m.kept.setdefault("first", y.detach().mean((0, 2, 3)).view(1, -1, 1, 1))
    return y + m.kept["first"]


@step("conv", "conv2", "caller")
def output_collected(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.conv2(m.conv(h))
    return y + m.caller.features.pop()


@step("conv")
def weight_written(m: Any, h: Tensor, k: Tensor) -> Tensor:
    with torch.no_grad():
        m.conv.weight.mul_(0.9)
    return m.conv(h) + k


@step("conv", "norm")
def hidden_writes(m: Any, h: Tensor, k: Tensor) -> Tensor:
    y = m.norm(m.conv(h))
    if m.variant % 2:
        torch._foreach_mul_([y, k], 0.5)
    else:
        torch.max(y, dim=1, keepdim=True, out=(k[:, :1], torch.empty(k[:, :1].shape, dtype=torch.long)))
    return y + k
