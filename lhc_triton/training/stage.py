"""One stage of training: its steps, its validation, and the arithmetic both run in."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lhc_triton.schedule import TopologySchedule
from lhc_triton.training.config import Precision, TrainConfig
from lhc_triton.training.data import ImageSet, augment, normalise
from lhc_triton.training.recipe import StageName, learning_rate

_EVAL_BATCH = 500


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Settle "auto": bf16 where the hardware multiplies it in matrix units, else fp32.

    On CPUs those units are AMX. AVX512-BF16 alone does not count: a step of the small VGG took longer with it
    than in fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _capabilities().get("amx_bf16", False) else "fp32"


def _capabilities() -> dict[str, object]:
    # Older supported versions of torch do not have the function.
    query = getattr(torch.cpu, "get_capabilities", dict)
    return dict(query())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context in which forward passes run."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class EpochLosses:
    """Means over the steps of an epoch, and the last step's learning rate."""

    task_loss: float
    penalty: float
    lr: float


def train_epoch(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: TopologySchedule | None,
    images: ImageSet,
    config: TrainConfig,
    stage: StageName,
    epoch: int,
    precision: str,
    on_step: Callable[[float], None],
) -> EpochLosses:
    """Train for one epoch. What is random in it depends on (seed, stage, epoch) alone.

    Args:
        model: in any mode; left in training mode.
        optimiser: over its parameters.
        schedule: gives the penalty in the coarse stage.
        images: the training images.
        config: the run.
        stage: which stage this is.
        epoch: from 0.
        precision: "fp32" or "bf16".
        on_step: called with the task loss after each step.

    Returns:
        The means over the epoch.

    Raises:
        RuntimeError: the loss is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(_epoch_seed(config.seed, stage, epoch))
    order = torch.randperm(len(images), generator=generator)
    steps = len(images) // config.batch_size
    loss_sum = penalty_sum = 0.0
    rate = config.lr
    model.train()
    for step in range(steps):
        rate = learning_rate(config, stage, epoch, step, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
        pixels = images.images[chosen]
        if config.augmentation != "none":
            pixels = augment(pixels, generator)
        with autocast(precision, device):
            scores = model(_as_input(pixels, device))
        task_loss = nn.functional.cross_entropy(scores.float(), images.labels[chosen].to(device))
        loss = task_loss
        if schedule is not None and stage == "coarse":
            penalty = schedule.penalty()
            loss = loss + penalty
            penalty_sum += float(penalty.detach())
        value = float(task_loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(
                f"the loss became {value} in {stage} epoch {epoch}, step {step}; lower lr {config.lr}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        loss_sum += value
        on_step(value)
    return EpochLosses(loss_sum / steps, penalty_sum / steps, rate)


def _epoch_seed(seed: int, stage: StageName, epoch: int) -> int:
    # Dense and coarse stage start alike: the twins see the same batches as long as both run.
    return (seed * 1_000_003 + (stage == "fine") * 100_003 + epoch) % (1 << 63)


def _as_input(pixels: Tensor, device: torch.device) -> Tensor:
    return normalise(pixels.to(device)).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, precision: str) -> float:
    """Share of images that the model classifies rightly; the model is left in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    for start in range(0, len(images), _EVAL_BATCH):
        with autocast(precision, device):
            scores = model(_as_input(images.images[start : start + _EVAL_BATCH], device))
        labels = images.labels[start : start + _EVAL_BATCH].to(device)
        right += int((scores.float().argmax(1) == labels).sum())
    return right / len(images)
