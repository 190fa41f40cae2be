"""One stage of training: its steps, its validation, and the arithmetic both run in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lhc_triton.schedule import TopologySchedule
from lhc_triton.training.averaging import WeightAverage
from lhc_triton.training.config import Precision, TrainConfig
from lhc_triton.training.data import Source
from lhc_triton.training.distributed import World, exchanging
from lhc_triton.training.recipe import StageName, learning_rate

_EVAL_IMAGES, _EVAL_PIXELS = 500, 1 << 22
_CUDA_STEPS_SHOWN = 20  # reading a loss waits for the device, so only every so many are read


@dataclass(frozen=True)
class Trainee:
    """A network in a stage, with what goes along.

    Attributes:
        model: the network in training.
        optimiser: over its parameters.
        schedule: of a network with a topology, learned or frozen; None for the dense one.
        average: of its weights, where the run wants one.
        pixels: output positions of each converted convolution for one image, by name.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: TopologySchedule | None = None
    average: WeightAverage | None = None
    pixels: Mapping[str, int] = field(default_factory=dict)

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the average where there is one."""
        return self.model if self.average is None else self.average.model


@dataclass(frozen=True)
class EpochPlan:
    """Which epoch is to be trained, and how.

    Attributes:
        stage: which stage.
        epoch: from 0, within the stage.
        precision: "fp32" or "bf16".
        drops: how often the plateau rule has lowered the rate.
    """

    stage: StageName
    epoch: int
    precision: str
    drops: int = 0

    @property
    def learns_topology(self) -> bool:
        """Whether the schedule's penalty is part of the loss."""
        return self.stage == "coarse"

    def seed(self, config: TrainConfig) -> int:
        """Of all that is random in the epoch."""
        # Dense and coarse stage start alike: the twins see the same batches as long as both run.
        return (config.seed * 1_000_003 + (self.stage == "fine") * 100_003 + self.epoch) % (1 << 63)


@dataclass(frozen=True)
class EpochLosses:
    """Means over the steps of an epoch, and the last step's learning rate."""

    task_loss: float
    penalty: float
    lr: float


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


def batch_shares(order: Tensor, config: TrainConfig, world: World) -> list[Tensor]:
    """Cut an epoch's images into this process's batches.

    A step takes the next ``batch_size`` images, in ``accumulate`` parts, each of which is shared among the
    processes: what a step sees does not depend on how many there are.

    Args:
        order: int64 [N], the images in the epoch's order; the rest that fills no step is left out.
        config: the run.
        world: the processes.

    Returns:
        ``accumulate`` index tensors for each step.
    """
    steps = len(order) // config.batch_size
    return [
        world.share(part)
        for step in order[: steps * config.batch_size].split(config.batch_size)
        for part in step.tensor_split(config.accumulate)
    ]


def train_epoch(
    trainee: Trainee,
    images: Source,
    config: TrainConfig,
    plan: EpochPlan,
    world: World,
    on_step: Callable[[float | None], None],
) -> EpochLosses:
    """Train for one epoch. What is random in it depends on (seed, stage, epoch); dropout on the rank too.

    Args:
        trainee: its model is left in training mode.
        images: the training images.
        config: the run.
        plan: the epoch.
        world: the processes that share each step.
        on_step: called after each step, with its task loss where that is at hand.

    Returns:
        The means over the epoch, equal on all processes.

    Raises:
        ValueError: the loss is not finite.
    """
    seed = plan.seed(config)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = iter(
        images.batches(
            batch_shares(order, config, world),
            augmentation=config.augmentation,
            epoch_seed=seed,
            device=world.device,
            workers=config.workers,
        )
    )
    steps = len(order) // config.batch_size
    every = 1 if world.device.type == "cpu" else _CUDA_STEPS_SHOWN
    task_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    penalty_sum = torch.zeros_like(task_sum)
    rate = config.lr
    trainee.model.train()
    # Wrapped anew in each epoch: the order of its sums changes after a first step, in a resumed run as well.
    parallel = world.parallel(trainee.model)
    with _seeded(seed + 7_919_117 * world.rank, world.device):
        for step in range(steps):
            rate = learning_rate(config, plan.stage, plan.epoch, step, steps, plan.drops)
            for group in trainee.optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            task_loss, penalty = _step(trainee, parallel, batches, config, plan, world)
            task_sum += task_loss
            penalty_sum += penalty
            if trainee.average is not None:
                trainee.average.update(plan.epoch * steps + step)
            value = float(task_loss) * world.size if step % every == 0 else None
            if value is not None:
                _check_finite(value, config, plan)
            on_step(value)
    if not config.sync_batchnorm:
        # Once where they are one; in the same order on all processes, which exchange buffer by buffer.
        for model in dict.fromkeys((trainee.model, trainee.judged)):
            world.average_batch_norm(model)
    mean = float(world.sum(task_sum)) / steps
    _check_finite(mean, config, plan)
    return EpochLosses(mean, float(penalty_sum) / steps, rate)


def _step(
    trainee: Trainee,
    parallel: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    config: TrainConfig,
    plan: EpochPlan,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Take one step of the optimiser; return this process's part of the task loss, and the penalty."""
    task_sum = torch.zeros((), device=world.device)
    penalty = torch.zeros((), device=world.device)
    trainee.optimiser.zero_grad(set_to_none=True)
    for part in range(config.accumulate):
        last = part == config.accumulate - 1
        with exchanging(parallel, last):
            pixels, labels = next(batches)
            with autocast(plan.precision, world.device):
                scores = parallel(pixels)
            task_loss = nn.functional.cross_entropy(
                scores.float(), labels, label_smoothing=config.label_smoothing
            ) * (len(labels) / config.batch_size)
            # Gradients become means over the processes, but this process's loss is a part of the step's sum.
            loss = task_loss * world.size
            if plan.learns_topology and last and trainee.schedule is not None:
                penalty = trainee.schedule.penalty()
                loss = loss + penalty
            loss.backward()
            task_sum += task_loss.detach()
    trainee.optimiser.step()
    return task_sum, penalty.detach()


def _check_finite(loss: float, config: TrainConfig, plan: EpochPlan) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss became {loss} in {plan.stage} epoch {plan.epoch}; lower lr {config.lr}, "
            "or use precision fp32, in another folder"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, which dropout draws from, and put them back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Source, size: int, precision: str, world: World, workers: int = 0
) -> float:
    """Share of images that the model classifies rightly, equal on all processes.

    Args:
        model: left in eval mode.
        images: shared among the processes.
        size: their side in pixels.
        precision: "fp32" or "bf16".
        world: the processes.
        workers: threads that load images; 0 for none.
    """
    model.eval()
    batch = max(1, min(_EVAL_IMAGES, _EVAL_PIXELS // size**2))
    share = world.share(torch.arange(len(images)))
    right = torch.zeros((), dtype=torch.int64, device=world.device)
    steps = share.split(batch) if len(share) else ()
    for pixels, labels in images.batches(steps, epoch_seed=0, device=world.device, workers=workers):
        with autocast(precision, world.device):
            scores = model(pixels)
        right += (scores.float().argmax(1) == labels).sum()
    return int(world.sum(right)) / len(images)
