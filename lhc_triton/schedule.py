"""TopologySchedule: the coarse stage's mask warm-up and density penalty."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .conversion import check_amount, checked_costs, far_from, lhc_layers, output_pixels
from .finite import all_finite
from .layers import LHCConv2d
from .topology import effect_spread, pattern_distance

# The method's constants (arXiv 2301.05440, authors' code): the MACs' share of R, the height of the ramp.
MAC_SHARE = 0.01
RAMP_TOP = 4.0
# Ours: the filters that should have a pattern in common where the penalty aims for fewer patterns.
SHARED_FILTERS = 64
# Ours: by how many of their first spreads the penalty moves effects while its ramp rises (`effect_rate`).
SPREADS = 3.0
# Ours: epochs with a penalty after which effects that learn have moved. One may hold no optimiser step.
_EPOCHS_TO_MOVE = 2
# What a state that was kept before there were these has for them.
_LATER = {"mac_budget": 0.0, "gradual": False}


def least_density(layers: Mapping[str, LHCConv2d], costs: Mapping[str, float] | None = None) -> float:
    """Return the live share of weights, or of their costs, below which layers cannot come.

    Each filter group keeps an entry: at least the last input block, which may be smaller. What is frozen
    stays as it is.
    """
    least = whole = 0.0
    for name, layer in layers.items():
        cost = 1.0 if costs is None else costs[name]
        channels = layer.in_channels % layer.config.in_block or min(layer.config.in_block, layer.in_channels)
        kept = layer.density * layer.weight.numel() if layer.frozen else layer.out_channels * channels
        least += cost * kept
        whole += cost * layer.weight.numel()
    return least / whole


class TopologySchedule:
    """Steers a network through the coarse stage.

    In epoch e < warmup_epochs a filter uses its mask with probability e / warmup_epochs and is dense
    otherwise, redrawn each epoch; later all use their masks. The penalty, over all LHC layers together, is
    ``scale * ramp * R`` with

    - R = 0.01 * live MACs / MACs + 0.99 * abs(target - live weights / weights), from the learned masks of
      all filters,
    - ramp = 4 * min(epoch / penalty_epochs, 1),
    - scale = mean task loss of epoch 0 / (0.01 + 0.99 * max(target, 1 - target)).

    Five additions of ours, all off by default, change R. ``mac_share`` takes the place of 0.01, and its
    rest to 1 that of 0.99: more of it moves what is kept to layers where a weight costs fewer MACs. With
    ``mac_budget`` b > 0 its term is ``max(live MACs / MACs - b, 0)``: MACs within the budget are free.
    With ``gradual`` target and budget come down from 1 to their values along a cubic over the
    ``penalty_epochs`` (`aim`; M. Zhu, S. Gupta, arXiv 1710.01878), so that entries go one after the
    other. With ``entry_costs`` the 0.99 term steers the live share of the cost, ``sum(live weights *
    cost) / sum(weights * cost)`` over the layers, in place of the live share of the weights. With
    ``pattern_weight`` w > 0, R grows by ``w * D``: D is the mean over the layers, each counted by its
    weights, of the share of entries in which a filter group differs from its nearest ones, so many that
    together they have 64 filters (see `topology.pattern_distance`). It is 0 where every pattern is shared
    by 64 filters, the width from which tiles run well.

    Use it as::

        schedule.start_epoch(epoch)
        loss = task_loss + schedule.penalty()
        schedule.end_epoch(task_loss=mean_loss)

    A warning says so where the blocks do not let the density come to its target, since each filter group
    keeps an entry; and, once, where the effects have not moved at all over the first two epochs with a
    penalty: no optimiser has them. Most often it was made before `convert`.

    Args:
        model: a converted network.
        example_input: an input of the model (or the tuple of its inputs), for the output sizes.
        warmup_epochs: epochs of the mask warm-up; 0 for none.
        penalty_epochs: epochs until the penalty's ramp is full, 1 or more.
        seed: of the warm-up's draws, which depend on (seed, epoch, layer index) only.
        entry_costs: cost of one live weight of each LHC layer, by the layer's name, in any unit (see
            `training.entry_costs`); None steers the weights, as the method does.
        mac_share: share of the term of the MACs, at least 0 and below 1.
        mac_budget: live share of the MACs up to which they cost nothing, 0 to 1.
        gradual: whether target and budget come down from 1 over the penalty's epochs.
        pattern_weight: weight of the aim for fewer patterns, 0 or more.

    Raises:
        ValueError: the model has no LHCConv2d, its layers have different density targets, the example
            reaches none of them, a number is out of range, the costs are not those of the LHC layers, or
            there is a pattern weight without a density target.
        TypeError: a number is not an int, or not a number.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Tensor, ...],
        warmup_epochs: int = 20,
        penalty_epochs: int = 20,
        seed: int = 0,
        *,
        entry_costs: Mapping[str, float] | None = None,
        mac_share: float = MAC_SHARE,
        mac_budget: float = 0.0,
        gradual: bool = False,
        pattern_weight: float = 0.0,
    ) -> None:
        for name, value, least in (
            ("warmup_epochs", warmup_epochs, 0),
            ("penalty_epochs", penalty_epochs, 1),
            ("seed", seed, 0),
        ):
            _check_count(name, value, least)
        layers = lhc_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no LHCConv2d: call convert() first")
        targets = {layer.config.density for layer in layers.values()}
        if len(targets) > 1:
            raise ValueError(
                f"the layers have different density targets {sorted(targets, key=str)}: the penalty takes the"
                " network as a whole, convert all layers with one density"
            )
        pixels = output_pixels(model, example_input, (LHCConv2d,))
        if not any(pixels.values()):
            raise ValueError("example_input reaches no LHCConv2d of the model: give an input that does")
        check_amount("mac_share", mac_share)
        if mac_share >= 1:
            raise ValueError(
                f"mac_share={mac_share} leaves nothing that steers the density: give less than 1"
            )
        check_amount("mac_budget", mac_budget)
        if mac_budget > 1:
            raise ValueError(f"mac_budget={mac_budget} is not supported: give a share of the MACs, 0 to 1")
        if not isinstance(gradual, bool):
            raise TypeError(f"gradual={gradual!r} is not supported: give True or False")
        check_amount("pattern_weight", pattern_weight)
        if pattern_weight > 0 and targets == {None}:
            raise ValueError(
                f"pattern_weight={pattern_weight} has no penalty to join: give the layers a density target"
            )
        self.warmup_epochs = warmup_epochs
        self.penalty_epochs = penalty_epochs
        self.seed = seed
        self.target = targets.pop()
        self.entry_costs = None if entry_costs is None else checked_costs(entry_costs, layers)
        self.mac_share = float(mac_share)
        self.mac_budget = float(mac_budget)
        self.gradual = gradual
        self.pattern_weight = float(pattern_weight)
        self._model = model
        self._names = list(layers)
        self._layers = list(layers.values())
        self._pixels = [pixels[name] for name in layers]
        self._weights = [layer.weight.numel() for layer in self._layers]
        self._total_weights = sum(self._weights)
        self._total_macs = sum(w * p for w, p in zip(self._weights, self._pixels, strict=True))
        self._epoch: int | None = None
        self._first_loss: float | None = None
        self._watch = _Watch()
        self._warn_where_out_of_reach(layers)

    def start_epoch(self, epoch: int) -> None:
        """Begin epoch 0, 1, ...: draw which filters use their masks.

        Raises:
            RuntimeError: the model's LHC layers are no longer those that the schedule was made for.
            ValueError: effects have NaN or infinity: training has diverged.
        """
        _check_count("epoch", epoch, 0)
        self._check_layers()
        self._warn_where_still()
        self._epoch = epoch
        for index, layer in enumerate(self._layers):
            if layer.frozen or epoch >= self.warmup_epochs:
                layer.masked_filters.fill_(True)
                continue
            draws = np.random.default_rng([self.seed, epoch, index]).random(layer.out_channels)
            layer.masked_filters.copy_(torch.from_numpy(draws < epoch / self.warmup_epochs))

    def effect_rate(self, steps: int, task_loss: float, momentum: float = 0.0) -> float:
        """Return a learning rate for the effects, after the network, its blocks and the length of training.

        With it the penalty alone moves an effect by three times the spread that effects start with while its
        ramp rises, on the average over all entries: so far that nearly each can change sides. One step moves
        an effect by its block's share of all weights: where blocks are small, the network wide or epochs
        short, a rate that suits another run leaves too much alive. The rule is ours; see docs/training.md.

        Args:
            steps: steps of the optimiser in an epoch.
            task_loss: mean of epoch 0 or about that: the logarithm of the classes for cross-entropy.
            momentum: of SGD.

        Raises:
            ValueError: an argument is out of its range.
            TypeError: one has another type.
        """
        _check_count("steps", steps, 1)
        check_amount("task_loss", task_loss)
        check_amount("momentum", momentum)
        if task_loss == 0 or momentum >= 1:
            raise ValueError(
                f"task_loss={task_loss}, momentum={momentum} are not supported: give more than 0, less than 1"
            )
        spreads = 0.0
        for layer, weights in zip(self._layers, self._weights, strict=True):
            block = min(layer.config.in_block, layer.in_channels) * min(
                layer.config.out_block, layer.out_channels
            )
            spreads += weights / block * effect_spread(layer.effects)
        pull = (1 - self.mac_share) * task_loss / self._highest * self.penalty_epochs * RAMP_TOP / 2
        return SPREADS * spreads * (1 - momentum) / (pull * steps)

    def penalty(self) -> Tensor:
        """Return what to add to the task loss: a float32 scalar, differentiable in the effects.

        It is 0 in epoch 0, without a density target, and for a frozen network.

        Raises:
            RuntimeError: no epoch was started, or its scale is unknown because end_epoch() of epoch 0 had no
                task_loss.
        """
        if self._epoch is None:
            raise RuntimeError("penalty() was called before start_epoch(): start an epoch first")
        device = self._layers[0].effects.device
        if self.aim is None or self.ramp == 0 or all(layer.frozen for layer in self._layers):
            return torch.zeros((), device=device)
        scale = self.scale
        if scale is None:
            raise RuntimeError(
                f"penalty() in epoch {self._epoch} needs the mean task loss of epoch 0: call"
                " end_epoch(task_loss=...) at its end, or load the state_dict of the run that you resume"
            )
        live = self._live_weights()
        macs = self._mac_share(live)
        if self.mac_budget > 0:
            macs = (macs - self._eased(self.mac_budget)).clamp_min(0)
        gap = (self.aim - self._steered(live)).abs()
        regulariser = self.mac_share * macs + (1 - self.mac_share) * gap
        if self.pattern_weight > 0:
            regulariser = regulariser + self.pattern_weight * self._pattern_distance()
        penalty = (scale * self.ramp * regulariser).to(torch.float32)
        if penalty.requires_grad:
            self._watch.penalised(self._learning())
        return penalty

    def end_epoch(self, task_loss: float | Tensor | None = None) -> None:
        """End the epoch; epoch 0 needs its mean task loss (penalty not included), others ignore it.

        Raises:
            RuntimeError: no epoch was started.
            ValueError: the loss of epoch 0 is negative, NaN or infinite.
        """
        if self._epoch is None:
            raise RuntimeError("end_epoch() was called before start_epoch(): start an epoch first")
        if self._epoch == 0 and task_loss is not None:
            self._first_loss = _check_loss(float(task_loss))
        self._warn_where_still()

    def _check_layers(self) -> None:
        held = dict(zip(self._names, self._layers, strict=True))
        found = lhc_layers(self._model)
        other = [n for n in sorted({*held, *found}) if held.get(n) is not found.get(n)]
        if other:
            raise RuntimeError(
                f"layer {other[0]!r} is not the one that the schedule was made for: make a schedule after the"
                " last change of the model, and load this one's state_dict() into it"
            )
        for name, layer in held.items():
            if not layer.frozen and not all_finite(layer.effects):
                raise ValueError(
                    f"layer {name!r} has NaN or infinity in its effects: go back to an earlier checkpoint"
                )

    def _warn_where_out_of_reach(self, layers: Mapping[str, LHCConv2d]) -> None:
        if self.target is None or all(layer.frozen for layer in self._layers):
            return
        least = least_density(layers, self.entry_costs)
        if least > self.target + far_from(self.target):
            warnings.warn(
                f"the density target {self.target:g} is out of reach: each filter group keeps one entry, and"
                f" in these blocks that is {least:.3f} in all. Take smaller blocks (in_block, out_block)",
                stacklevel=3,
            )

    def _learning(self) -> dict[str, Tensor]:
        """The effects that a penalty should move, by layer."""
        named = zip(self._names, self._layers, strict=True)
        return {n: layer.effects for n, layer in named if not layer.frozen and layer.effects.requires_grad}

    def _warn_where_still(self) -> None:
        still = self._watch.still_after_epoch(self._learning())
        if still:
            names = ", ".join(map(repr, still[:3])) + (f" and {len(still) - 3} more" if still[3:] else "")
            warnings.warn(
                f"the effects of {names} have not moved at all in {_EPOCHS_TO_MOVE} epochs with a penalty:"
                " their topology does not learn. Make the optimiser after convert(), over all of"
                " model.parameters(), with a learning rate above 0",
                stacklevel=3,
            )

    def _live_weights(self) -> Tensor:
        """Live weights of each layer, float64 [layers], differentiable."""
        device = self._layers[0].effects.device
        return torch.stack([layer.live_weights().to(device) for layer in self._layers])

    def _weight_share(self, live: Tensor) -> Tensor:
        return live.sum() / self._total_weights

    def _mac_share(self, live: Tensor) -> Tensor:
        return (live * live.new_tensor(self._pixels)).sum() / self._total_macs

    def _steered(self, live: Tensor) -> Tensor:
        """The share that is steered to the target."""
        if self.entry_costs is None:
            return self._weight_share(live)
        costs = list(self.entry_costs.values())
        total = math.fsum(w * c for w, c in zip(self._weights, costs, strict=True))
        return (live * live.new_tensor(costs)).sum() / total

    def _pattern_distance(self) -> Tensor:
        """The layers' pattern distances, weighted by their weights."""
        device = self._layers[0].effects.device
        distances = [
            pattern_distance(layer.block_mask(), math.ceil(SHARED_FILTERS / layer.config.out_block)).to(
                device
            )
            for layer in self._layers
        ]
        return self._weight_share(torch.stack(distances) * torch.tensor(self._weights, device=device))

    @property
    def epoch(self) -> int | None:
        """The epoch that was started last, or None."""
        return self._epoch

    @property
    def ramp(self) -> float:
        """The penalty's ramp in this epoch, 0 to 4; 0 before the first one."""
        return RAMP_TOP * min((self._epoch or 0) / self.penalty_epochs, 1.0)

    @property
    def aim(self) -> float | None:
        """The share that this epoch's penalty steers to; the target, unless it comes down gradually."""
        return None if self.target is None else self._eased(self.target)

    def _eased(self, share: float) -> float:
        """What is asked for in this epoch, where ``share`` is in the end."""
        left = 1 - min((self._epoch or 0) / self.penalty_epochs, 1.0) if self.gradual else 0.0
        return share + (1 - share) * left**3

    @property
    def scale(self) -> float | None:
        """The penalty's scale, or None while the task loss of epoch 0 is unknown or without a target."""
        return None if self.target is None or self._first_loss is None else self._first_loss / self._highest

    @property
    def _highest(self) -> float:
        """What the regulariser can be at most."""
        gap = 1.0 if self.target is None else max(self.target, 1 - self.target)
        return self.mac_share + (1 - self.mac_share) * gap

    @property
    def warming_up(self) -> bool:
        """Whether this epoch's network may not be chosen: it is a mixture, or the ramp is not full."""
        epoch = -1 if self._epoch is None else self._epoch
        return epoch < self.warmup_epochs or (self.target is not None and epoch < self.penalty_epochs)

    @property
    def density(self) -> float:
        """Live share of the LHC layers' weights, by the masks of all filters."""
        with torch.no_grad():
            return float(self._weight_share(self._live_weights()))

    @property
    def mac_density(self) -> float:
        """Live share of the LHC layers' MACs, by the masks of all filters."""
        with torch.no_grad():
            return float(self._mac_share(self._live_weights()))

    @property
    def steered_density(self) -> float:
        """The live share that the penalty steers to the target: of the entry costs, else of the weights."""
        with torch.no_grad():
            return float(self._steered(self._live_weights()))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers (ready for JSON)."""
        return {
            "warmup_epochs": self.warmup_epochs,
            "penalty_epochs": self.penalty_epochs,
            "seed": self.seed,
            "entry_costs": None if self.entry_costs is None else dict(self.entry_costs),
            "mac_share": self.mac_share,
            "mac_budget": self.mac_budget,
            "gradual": self.gradual,
            "pattern_weight": self.pattern_weight,
            "epoch": self._epoch,
            "first_loss": self._first_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the filters' mixture comes with the model's own state_dict.

        Raises:
            ValueError: a key is missing or unknown, a value is out of range, or the state is of a schedule
                with other arguments.
            TypeError: a value has the wrong type.
        """
        expected = self.state_dict()
        state = {**_LATER, **state}
        if set(state) != set(expected):
            raise ValueError(
                f"the schedule's state has the keys {sorted(state)}, expected {sorted(expected)}"
            )
        for name in expected:
            if name not in ("epoch", "first_loss") and state[name] != expected[name]:
                raise ValueError(
                    f"the state is of a schedule with {name}={state[name]!r}, this one has {expected[name]}:"
                    " make the schedule with the same arguments"
                )
        epoch, loss = state["epoch"], state["first_loss"]
        if epoch is not None:
            _check_count("epoch", epoch, 0)
        if loss is not None:
            if isinstance(loss, bool) or not isinstance(loss, int | float):
                raise TypeError(f"first_loss={loss!r} is not a number: the schedule's state is damaged")
            _check_loss(loss)
        self._epoch = epoch
        self._first_loss = None if loss is None else float(loss)
        self._watch = _Watch()  # the effects may be of another run: what moved is seen anew


class _Watch:
    """Whether the effects move in the first epochs with a penalty.

    Nothing of it is in the schedule's state: a run that goes on starts a watch of its own.
    """

    def __init__(self) -> None:
        self.over = False
        self.epochs = 0
        self.in_force = False
        self.before: dict[str, Tensor] = {}

    def penalised(self, effects: Mapping[str, Tensor]) -> None:
        """Note that this epoch has a penalty, and where the effects stand at the first one."""
        if self.over:
            return
        self.in_force = True
        if not self.before:
            self.before = {name: value.detach().clone() for name, value in effects.items()}

    def still_after_epoch(self, effects: Mapping[str, Tensor]) -> list[str]:
        """Return the layers whose effects stand still, once, after enough epochs with a penalty."""
        if not self.in_force:
            return []
        self.in_force = False
        self.epochs += 1
        still = [
            name
            for name, value in self.before.items()
            if name in effects and torch.equal(value, effects[name].detach().to(value.device))
        ]
        if still and self.epochs < _EPOCHS_TO_MOVE:
            return []
        self.over, self.before = True, {}
        return still


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not an int: give {least} or more")
    if value < least:
        raise ValueError(f"{name}={value} is not supported: give {least} or more")


def _check_loss(loss: float) -> float:
    if not (math.isfinite(loss) and loss >= 0):
        raise ValueError(f"task_loss={loss} is not supported: give the finite mean task loss of the epoch")
    return loss
