"""Which blocks of trained layers stay: the best by score and what they cost, until a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import LHCConv2d
from .planning.cost import CostModel, itemsize_of
from .planning.extract import MAX_BLOCK
from .planning.grouping import candidate_widths
from .planning.planner import plan_layer
from .planning.schema import ConvGeometry, LayerTopology
from .topology import LHCConfig, block_means, count_weights, rigid_shapes

Masks = dict[str, Tensor]
Share = Callable[[Sequence["Choices"], Masks], float]


@dataclass(frozen=True, eq=False)
class Choices:
    """One layer's blocks, and what speaks for and against each.

    Attributes:
        name: the layer's.
        config: its blocks and shapes.
        size: (O, I) of its weight.
        scores: float64 [Go, Gi, kh, kw], the mean score of each block's weights.
        allowed: bool [Go, Gi, kh, kw], the blocks that may stay.
        total: the layer's score, over all of its weights.
        unit: what one weight costs.
    """

    name: str
    config: LHCConfig
    size: tuple[int, int]
    scores: Tensor
    allowed: Tensor
    total: float
    unit: float

    @classmethod
    def of(cls, name: str, conv: nn.Conv2d, config: LHCConfig, weight_scores: Tensor, unit: float) -> Choices:
        """Read a layer; of an LHCConv2d only the blocks that live may stay.

        Args:
            name: the layer's.
            conv: the layer.
            config: the blocks and shapes that it gets.
            weight_scores: [O, I, kh, kw], 0 or more.
            unit: what one weight costs.
        """
        allowed = None
        if isinstance(conv, LHCConv2d):
            with torch.no_grad():
                allowed = conv.block_mask() != 0
                weight_scores = weight_scores * conv.mask()
        scores = block_means(weight_scores, config.in_block, config.out_block).cpu()
        allowed = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.cpu()
        total = float(weight_scores.sum(dtype=torch.float64))
        return cls(name, config, (conv.out_channels, conv.in_channels), scores, allowed, total, unit)

    @property
    def weights(self) -> int:
        """Weights of the dense layer."""
        return math.prod(self.size) * math.prod(self.scores.shape[2:])

    def live_weights(self, mask: Tensor) -> int:
        """Weights that a mask [Go, Gi, kh, kw] keeps."""
        return int(count_weights(mask, *self.size, self.config.in_block, self.config.out_block))

    def block_weights(self) -> Tensor:
        """Weights of every block, float64 [Go, Gi, kh, kw]."""
        filters, channels = (
            (size - block * torch.arange(count, dtype=torch.float64)).clamp(max=block)
            for size, block, count in zip(
                self.size, (self.config.out_block, self.config.in_block), self.scores.shape[:2], strict=True
            )
        )
        return (filters[:, None] * channels)[:, :, None, None].expand(self.scores.shape)

    def lost(self, mask: Tensor) -> float:
        """Share of the layer's score that a mask gives up."""
        kept = float((self.scores * self.block_weights() * mask).sum())
        return max(0.0, 1 - kept / self.total) if self.total else 0.0

    def prices(self) -> Tensor:
        """Score for what it costs, of every block that may stay; 1-D."""
        return (self.scores / self.unit)[self.allowed] if self.unit else self.scores.new_empty(0)

    def mask(self, price: float) -> Tensor:
        """Return the blocks that are worth more than a price, bool [Go, Gi, kh, kw].

        Of rigid shapes each block gets the one that is worth most at this price. A filter group that would
        lose every entry keeps the best one that it may.
        """
        price = min(price * self.unit, float(self.scores.max()) + 1) if self.unit else 0.0
        if self.config.shapes == "free":
            mask = self.scores > price
            best = torch.where(self.allowed, self.scores, -math.inf).flatten(1).argmax(dim=1)
            rescue = nn.functional.one_hot(best, mask[0].numel()).view(mask.shape).bool()
        else:
            shapes = rigid_shapes(self.scores.shape[2:])  # type: ignore[arg-type]
            clipped = self.scores.where(self.allowed, 0.0)
            sums = torch.einsum("gbrc,src->gbs", clipped, shapes.to(torch.float64))
            taps = shapes.flatten(1).sum(dim=1)
            mask = shapes[(sums - price * taps).argmax(dim=-1)]
            means = (sums / taps.clamp(min=1)).masked_fill(taps == 0, -math.inf)
            block = nn.functional.one_hot(means.amax(dim=2).argmax(dim=1), means.shape[1]).bool()
            rescue = shapes[means.argmax(dim=-1)] & block[:, :, None, None]
        dead = ~(mask & self.allowed).flatten(1).any(dim=1)
        return (mask | (rescue & dead[:, None, None, None])) & self.allowed


def share_of_costs(layers: Sequence[Choices], masks: Masks) -> float:
    """Return the share of the layers' costs that masks leave, each weight counted at its layer's unit."""
    whole = math.fsum(layer.unit * layer.weights for layer in layers)
    left = math.fsum(layer.unit * layer.live_weights(masks[layer.name]) for layer in layers)
    return left / whole if whole else 0.0


def select(layers: Sequence[Choices], budget: float, share: Share, *, fill: bool) -> Masks:
    """Return the masks of the best blocks that a budget pays for.

    All layers are held against one price, the lowest that the budget allows: found by bisection over the
    blocks' own prices.

    Args:
        layers: whose blocks compete.
        budget: the share that may be left.
        share: the share that masks leave; hardly ever more at a higher price.
        fill: whether the rest of the budget goes to blocks of equal price, one by one: only where a share is
            the sum of what the weights cost.

    Returns:
        The masks; if even one entry in each filter group takes more than the budget, those.
    """

    def masks_at(price: float) -> Masks:
        return {layer.name: layer.mask(price) for layer in layers}

    prices = torch.unique(torch.cat([torch.zeros(1, dtype=torch.float64), *(la.prices() for la in layers)]))
    low, high = -1, len(prices)
    best = masks_at(math.inf)
    while high - low > 1:
        middle = (low + high) // 2
        masks = masks_at(float(prices[middle]))
        if share(layers, masks) <= budget:
            high, best = middle, masks
        else:
            low = middle
    if fill and low >= 0:
        _fill(layers, best, masks_at(float(prices[low])), budget)
    return best


def _fill(layers: Sequence[Choices], masks: Masks, more: Masks, budget: float) -> None:
    """Add blocks of other masks in their order, as far as the budget goes; free shapes only."""
    whole = math.fsum(layer.unit * layer.weights for layer in layers)
    left = math.fsum(layer.unit * layer.live_weights(masks[layer.name]) for layer in layers)
    for layer in layers:
        if layer.config.shapes == "free":
            added = more[layer.name] & ~masks[layer.name]
            costs = layer.unit * layer.block_weights()[added]
            fits = left + costs.cumsum(dim=0) <= budget * whole * (1 + 1e-12)
            masks[layer.name][added] = fits
            left += float(costs[fits].sum())


class Clock:
    """What layers take, by the planner's model.

    Args:
        cost: the device's model.
        calls: the shapes of each layer's call; a layer that is not called takes no time.
    """

    def __init__(self, cost: CostModel, calls: Mapping[str, ConvGeometry]) -> None:
        self._cost = cost
        self._calls = calls

    def weight_us(self, name: str, config: LHCConfig, dtype: str) -> float:
        """Return the us of one entry of a filter group, shared among its weights."""
        if name not in self._calls:
            return 0.0
        call = self._calls[name]
        in_block, filters = min(config.in_block, call.in_channels), min(config.out_block, call.out_channels)
        width = candidate_widths(config.out_block, call.out_channels)[0]
        times = self._cost.entry_times(call, in_block, [filters], width, itemsize_of(dtype))
        return float(times[0]) / (in_block * filters)

    def share(self, dtypes: Mapping[str, str], layers: Sequence[Choices], masks: Masks) -> float:
        """Return the predicted time of layers under their masks, each at its best, by that of dense ones."""
        dense = left = 0.0
        for layer in layers:
            if layer.name in self._calls:
                call, config = self._calls[layer.name], layer.config
                topology = LayerTopology.from_mask(
                    layer.name, call, config.in_block, config.out_block, masks[layer.name].numpy()
                ).split(MAX_BLOCK)
                predicted = plan_layer(topology, self._cost, dtype=dtypes[layer.name]).predicted_us
                dense += predicted["dense"]
                left += min(predicted.values())
        return left / dense if dense else 0.0
