"""An exponential moving average of a network's weights, kept beside the one in training."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from lhc_triton.conversion import lhc_layers


class WeightAverage:
    """A second network whose weights and statistics follow those of the first, smoothed.

    After step n (from 0) each is ``d * average + (1 - d) * value`` with d = min(decay, (1 + n) / (10 + n)):
    the random start is soon forgotten. Effects and masks are taken over as they are, so that the average has
    the topology of the network in training.

    Args:
        model: the network in training, its topology frozen already if it is to be.
        decay: d in the long run, between 0 and 1.

    Attributes:
        model: the averaged network; trained by nothing else.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        effects = {id(layer.effects) for layer in lhc_layers(model).values()}
        pairs = zip(
            itertools.chain(self.model.parameters(), self.model.buffers()),
            itertools.chain(model.parameters(), model.buffers()),
            strict=True,
        )
        self._smoothed: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        for mine, theirs in pairs:
            smooth = theirs.is_floating_point() and id(theirs) not in effects
            (self._smoothed if smooth else self._copied).append((mine, theirs))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the network after its step number ``step`` of the stage, from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in self._smoothed:
            mine.lerp_(theirs, weight)
        for mine, theirs in self._copied:
            mine.copy_(theirs)
