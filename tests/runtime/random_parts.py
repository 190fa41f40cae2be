"""The parts that random networks are made of, and what a step between two maps is.

A step reads one or two feature maps [N, C, H, W] of equal shape and gives one of that shape. Which maps they
are is drawn at random, so that later steps see, or do not see, what this one does to them in place.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

Body = Callable[[Any, Tensor, Tensor], Tensor]

STEPS: dict[str, tuple[Body, tuple[str, ...], bool]] = {}
"""By name: what it computes, the parts that it needs, and whether it is random at every call."""


class Subclassed(nn.Conv2d):
    """Adds nothing to its parent."""


class Collector:
    """Collects what modules compute, by hooks that are closures."""

    def __init__(self, module: nn.Module) -> None:
        self.features: list[Tensor] = []

        def collect(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.features.append(output * 0.5)

        module.register_forward_hook(collect)


class Features:
    """Keeps what a convolution computed, by a hook of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.stored: Tensor | None = None
        module.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.stored = output


def pruned(conv: nn.Conv2d, rng: random.Random, blocks: tuple[int, int] | None, density: float) -> nn.Conv2d:
    """Zero blocks of (in, out) channels, one entry of each filter group left at least; keep the variance."""
    o, i, kh, kw = conv.weight.shape
    gain = 1.7
    with torch.no_grad():
        if blocks is not None and conv.groups == 1:
            grid = torch.rand(-(-o // blocks[1]), -(-i // blocks[0]), kh, kw) < density
            grid[:, rng.randrange(grid.shape[1]), kh // 2, kw // 2] = True
            gain *= float(grid.float().mean()) ** -0.5
            conv.weight.mul_(grid.repeat_interleave(blocks[1], 0).repeat_interleave(blocks[0], 1)[:o, :i])
        conv.weight.mul_(gain)
    return conv


class Recipe:
    """Draws the parts of one network: its convolutions share the shape of their blocks of zeros."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.blocks = rng.choice([(32, 16), (16, 16), (32, 32), (8, 16), (16, 8)])
        self.density = rng.uniform(0.1, 0.5)
        self.plain = rng.random() < 0.5

    def conv(self, inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
        """Return a convolution that keeps the image's size, unless options say otherwise."""
        rng = self.rng
        kernel = options.pop("kernel", None) or rng.choice([1, 3, 3, 3, 3, 3, 5, (3, 1), (1, 3)])
        dilation = 1 if self.plain else rng.choice([1, 1, 1, 2])
        reach = [dilation * (k - 1) // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel))]
        same = "stride" not in options and rng.random() < 0.1
        kind = nn.Conv2d if self.plain or rng.random() < 0.9 else Subclassed
        options = {"padding": "same" if same else tuple(reach), "bias": rng.random() < 0.7} | options
        conv = kind(inputs, outputs, kernel, dilation=dilation, **options)
        blocks = None if rng.random() < 0.1 else self.blocks
        return pruned(conv, rng, blocks, self.density)

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """Return a batch norm with statistics worth folding, or without any."""
        kind = self.rng.choice(["full"] * 4 + ["no affine", "no statistics", "flag", "momentum"])
        norm = nn.BatchNorm2d(
            channels,
            affine=kind != "no affine",
            track_running_stats=kind != "no statistics",
            momentum=None if kind == "momentum" else 0.1,
        )
        if norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
        norm.track_running_stats &= kind != "flag"
        return norm


class Step(nn.Module):
    """One step of a network.

    Args:
        name: of the step's kind.
        recipe: draws its parts.
        channels: C of the maps.
        sources: places, in the list of maps made so far, of the two that it reads.
    """

    def __init__(self, name: str, recipe: Recipe, channels: int, sources: Sequence[int]) -> None:
        super().__init__()
        rng = recipe.rng
        self.name = name
        self.body, parts, self.random = STEPS[name]
        self.sources = tuple(sources)
        self.channels = channels
        self.variant = rng.randrange(1 << 20)
        self.calls = 0
        self.grids: dict[Any, Tensor] = {}
        for part in parts:
            setattr(self, part, self._part(part, recipe, channels))
        if "hook" in parts:
            HOOKS[self.variant % len(HOOKS)](self)
        if "tap" in parts:
            self._tap()

    def _part(self, part: str, recipe: Recipe, channels: int) -> Any:
        half = channels // 2
        made: dict[str, Callable[[], Any]] = {
            "conv": lambda: recipe.conv(channels, channels),
            "conv2": lambda: recipe.conv(channels, channels),
            "narrow": lambda: recipe.conv(half, half),
            "wide": lambda: recipe.conv(channels, 2 * channels),
            "bare": lambda: recipe.conv(channels, channels, kernel=3, padding=0),
            "strided": lambda: recipe.conv(channels, channels, kernel=3, stride=2),
            "depthwise": lambda: recipe.conv(channels, channels, groups=channels),
            "grouped": lambda: recipe.conv(channels, channels, groups=2),
            "mirrored": lambda: recipe.conv(channels, channels, kernel=3, padding_mode="reflect"),
            "up": lambda: nn.ConvTranspose2d(channels, channels, 2, 2),
            "norm": lambda: recipe.norm(channels),
            "tied": lambda: self._tied(),
            "nested": lambda: self._nested(recipe),
            "parallel": lambda: nn.DataParallel(
                nn.Sequential(recipe.conv(channels, channels), nn.ReLU(True))
            ),
            "upsample": lambda: nn.Upsample(scale_factor=2),
            "linear": lambda: nn.Linear(channels, channels),
            "layernorm": lambda: nn.LayerNorm(channels),
            "groupnorm": lambda: nn.GroupNorm(2, channels),
            "relu": lambda: nn.ReLU(inplace=recipe.rng.random() < 0.5),
            "gain": lambda: nn.Parameter(torch.rand(channels, 1, 1) + 0.5),
            "scale": lambda: nn.Buffer(torch.rand(channels, 1, 1) + 0.5),
            "count": lambda: nn.Buffer(torch.zeros((), dtype=torch.long)),
            "peak": lambda: nn.Buffer(torch.full((), 0.01)),
            "mean": lambda: nn.Buffer(torch.zeros(channels)),
            "var": lambda: nn.Buffer(torch.ones(channels)),
            "last": lambda: None,
            "kept": dict,
            "history": list,
            "array": lambda: np.zeros(1, dtype=np.int64),
            "caller": lambda: Collector(self.conv),
            "table": lambda: {"steps": [self.conv, F.relu, lambda x: self.conv2(x)]},
            "weak": lambda: setattr(self.conv, "owner", weakref.ref(self)),
            "source": lambda: random.Random(recipe.rng.randrange(100)),
            "hook": lambda: None,
            "tap": lambda: None,
        }
        return made[part]()

    def _tied(self) -> nn.Conv2d:
        """Return a convolution with the weight of another one."""
        conv = self.conv
        tied = nn.Conv2d(
            self.channels, self.channels, conv.kernel_size, padding=conv.padding, dilation=conv.dilation
        )
        tied.weight = conv.weight
        return tied

    def _nested(self, recipe: Recipe) -> nn.ModuleDict:
        block = nn.Sequential(
            recipe.conv(self.channels, self.channels), recipe.norm(self.channels), nn.ReLU(True)
        )
        last = recipe.conv(self.channels, self.channels)
        return nn.ModuleDict({"branch": block, "list": nn.ModuleList([nn.Identity(), last, nn.Dropout(0.5)])})

    def _tap(self) -> None:
        """Keep what the convolution computes: in an object's attribute, in a dict, or in a closure's one."""
        kept: dict[str, Tensor] = {}
        if self.variant % 3 == 0:
            self.tap = Features(self.conv)
            self.read = lambda owner: owner.tap.stored
        elif self.variant % 3 == 1:
            self.conv.register_forward_hook(lambda module, arguments, output: kept.update(y=output))
            self.read = lambda owner: kept["y"]
        else:
            self.tap = kept
            self.conv.register_forward_hook(lambda module, arguments, output: kept.update(y=output))
            self.read = lambda owner: owner.tap["y"]

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """Compute the step on two of the maps made so far."""
        first, second = self.sources
        return self.body(self, values[first], values[second])


def step(*parts: str, random: bool = False) -> Callable[[Body], Body]:
    """Enter a function of (step, one map, another) as a kind of steps."""

    def enter(body: Body) -> Body:
        STEPS[body.__name__] = (body, parts, random)
        return body

    return enter


def _soften(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.clamp(-0.5, 0.5)


def _halve(module: nn.Module, arguments: Any) -> Any:
    return (arguments[0] * 0.5,)


def _shift(module: nn.Module, arguments: Any, keywords: Any) -> Any:
    return tuple(value + 0.25 for value in arguments), keywords


def _double_in_place(module: nn.Module, arguments: Any, output: Tensor) -> None:
    output.mul_(2)


def _mask_weight(owner: Step) -> None:
    mask = torch.ones_like(owner.conv.weight)
    mask[: owner.channels // 2] = 0
    prune.custom_from_mask(owner.conv, "weight", mask)


HOOKS: tuple[Callable[[Step], Any], ...] = (
    lambda owner: owner.conv.register_forward_hook(_soften),
    lambda owner: owner.conv.register_forward_hook(_double_in_place),
    lambda owner: owner.conv.register_forward_pre_hook(_halve),
    lambda owner: owner.conv.register_forward_pre_hook(_shift, with_kwargs=True),
    lambda owner: owner.relu.register_forward_hook(lambda module, arguments, output: output - 0.1),
    lambda owner: owner.register_forward_hook(lambda module, arguments, output: output.tanh()),
    lambda owner: owner.norm.register_forward_pre_hook(_halve),
    _mask_weight,
    lambda owner: parametrizations.weight_norm(owner.conv),
    lambda owner: owner.conv.register_forward_hook(lambda module, arguments, output: None),
)
