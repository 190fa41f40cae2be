"""The recipe of a run: its stages, the optimiser and its parameter groups, the learning rate, the plateau."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lhc_triton.conversion import lhc_layers
from lhc_triton.training.config import TrainConfig
from lhc_triton.training.metrics import EpochMetrics, reached

StageName = Literal["dense", "coarse", "fine"]
STAGES: tuple[StageName, ...] = ("dense", "coarse", "fine")
DROP = 0.1  # by what the plateau rule multiplies the learning rate


def stage_epochs(config: TrainConfig, stage: StageName) -> int:
    """How many epochs a stage has; the dense network's are those of the other two together."""
    epochs = {"coarse": config.coarse_epochs, "fine": config.fine_epochs}
    return epochs.get(stage, config.coarse_epochs + config.fine_epochs)


def make_optimiser(
    model: nn.Module, config: TrainConfig, effect_rate: float | None = None
) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay for weights of convolutions and linear layers only.

    Args:
        model: the network.
        config: the run.
        effect_rate: highest rate of the effects, where config.effect_lr leaves it open.
    """
    factor = config.effect_lr
    if factor is None:
        factor = 1.0 if effect_rate is None or config.lr == 0 else effect_rate / config.lr
    effects = [layer.effects for layer in lhc_layers(model).values()]
    known = {id(effect) for effect in effects}
    others = [p for p in model.parameters() if id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "factor": 1.0},
        {"params": effects, "weight_decay": 0.0, "factor": factor},
    ]
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)


def learning_rate(
    config: TrainConfig, stage: StageName, epoch: int, step: int, steps: int, drops: int = 0
) -> float:
    """The rate of one step: half of it in epoch 0 of the dense and the coarse stage.

    Args:
        config: the run.
        stage: which stage.
        epoch: from 0.
        step: from 0, within the epoch.
        steps: of an epoch.
        drops: plateau rule: how often the rate fell before this epoch, Plateau.drops of the epochs so far.
    """
    top = config.fine_lr if stage == "fine" else config.lr
    if config.lr_schedule == "plateau":
        rate = top * DROP**drops
    else:
        floor = config.coarse_floor if stage == "coarse" else 0.0
        done = (epoch * steps + step) / (stage_epochs(config, stage) * steps)
        rate = top * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    return 0.5 * rate if epoch == 0 and stage != "fine" else rate


@dataclass(frozen=True)
class Plateau:
    """How a stage's accuracy goes, after some of its epochs.

    It follows from the epochs alone, so that a resumed run, and every process of a distributed one, agree on
    it. Warm-up epochs do not count. An epoch gains where its validation accuracy is higher than of all
    before. The rate asks for no density, as in the paper. A stage ends only for want of a better epoch among
    those that may be chosen (as in metrics.best_epoch): not while the density is on its way to the target.

    Attributes:
        drops: how often the plateau rule lowered the rate.
        waiting: epochs since the last gain or drop.
        stalled: epochs since the last gain among those that may be chosen; 0 before the first of them.
    """

    drops: int = 0
    waiting: int = 0
    stalled: int = 0


def plateau(config: TrainConfig, stage: StageName, rows: Sequence[EpochMetrics]) -> Plateau:
    """Where the stage stands after its epochs among ``rows``."""
    highest, best = -1.0, -1.0  # of all epochs, and of those that may be chosen
    drops = waiting = stalled = 0
    for row in rows:
        if row.stage != stage or row.warming_up:
            continue
        waiting = 0 if row.val_accuracy > highest else waiting + 1
        highest = max(highest, row.val_accuracy)
        aimed = stage != "coarse" or reached(row.steered_density, config.target)
        if aimed and row.val_accuracy > best:
            best, stalled = row.val_accuracy, 0
        elif best >= 0:
            stalled += 1
        if config.lr_schedule == "plateau" and waiting >= config.plateau_patience:
            drops, waiting = drops + 1, 0
    return Plateau(drops, waiting, stalled)


def ends_early(config: TrainConfig, stage: StageName, rows: Sequence[EpochMetrics]) -> bool:
    """Whether early_stop ends the stage after its epochs among ``rows``."""
    return config.early_stop is not None and plateau(config, stage, rows).stalled >= config.early_stop
