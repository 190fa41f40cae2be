"""Checkpoints: everything a killed run needs to go on bit for bit, in one safetensors file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.models.weights import read_tensors, write_tensors
from lhc_triton.schedule import TopologySchedule
from lhc_triton.training.averaging import WeightAverage
from lhc_triton.training.metrics import EpochMetrics

CHECKPOINT_KIND = "training checkpoint"
CHECKPOINT_VERSION = 3

# Settings that are younger than the version, at what runs without them had.
_LATER = {"start": "random", "mac_budget": 0.0, "gradual": False, "trim": False, "share": None}

_MODEL, _MOMENTUM, _AVERAGE = "model/", "momentum/", "average/"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after an epoch.

    Attributes:
        run: what makes the run this one (settings, data): must be equal for the run to be resumed.
        rows: all epochs so far; the last one says the stage and the epoch.
        schedule: state of the TopologySchedule, or None for the dense network.
        precision: "fp32" or "bf16".
        tensors: the state of the model and of its average, and the optimiser's momentum, by prefixed names.
    """

    run: dict[str, Any]
    rows: list[EpochMetrics]
    schedule: dict[str, Any] | None
    precision: str
    tensors: dict[str, Tensor]

    @property
    def stage(self) -> str:
        """The stage of the last epoch."""
        return self.rows[-1].stage

    @property
    def epoch(self) -> int:
        """The last epoch that was finished."""
        return self.rows[-1].epoch


def save_checkpoint(
    path: str | Path,
    run: Mapping[str, Any],
    rows: list[EpochMetrics],
    precision: str,
    model: nn.Module,
    optimiser: torch.optim.Optimizer | None = None,
    schedule: TopologySchedule | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the safetensors file.
        run: what makes the run this one, as JSON can hold it.
        rows: all epochs so far.
        precision: "fp32" or "bf16".
        model: whose state is kept.
        optimiser: whose momentum is kept; without it the checkpoint serves as a stage's result only.
        schedule: whose state is kept.
        average: of the model's weights, kept too.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        tensors |= {_AVERAGE + name: tensor for name, tensor in average.model.state_dict().items()}
    if optimiser is not None:
        for name, parameter in model.named_parameters():
            buffer = optimiser.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                tensors[_MOMENTUM + name] = buffer
    document = {
        "kind": CHECKPOINT_KIND,
        "version": CHECKPOINT_VERSION,
        "run": dict(run),
        "rows": [asdict(row) for row in rows],
        "precision": precision,
        "schedule": None if schedule is None else schedule.state_dict(),
    }
    write_tensors(path, tensors, document)


def load_checkpoint(path: str | Path, run: Mapping[str, Any], ignore: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint of this run.

    Args:
        path: the safetensors file.
        run: what makes the run this one.
        ignore: keys that only the checkpoint's run may have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of a run with other settings or data; one line that names one.
    """
    tensors, document = read_tensors(path, CHECKPOINT_KIND, CHECKPOINT_VERSION)
    found = document.get("run")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: does not say which run it is of; delete it to start again")
    found = {**{name: value for name, value in _LATER.items() if name in run}, **found}
    differing = sorted(key for key in {*found, *run} - {*ignore} if found.get(key) != run.get(key))
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path}: is of another run ({key} {found.get(key)!r}, now {run.get(key)!r}); "
            "choose another folder, or the settings of that run"
        )
    try:
        rows = [EpochMetrics.from_dict(row) for row in document["rows"]]
        schedule, precision = document["schedule"], document["precision"]
        if not rows or precision not in ("fp32", "bf16") or not isinstance(schedule, dict | None):
            raise ValueError("no epoch, precision or schedule in it")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a damaged checkpoint ({error}); delete it to start again") from error
    return Checkpoint(found, rows, schedule, precision, tensors)


def restore(
    path: str | Path,
    checkpoint: Checkpoint,
    model: nn.Module,
    optimiser: torch.optim.Optimizer | None = None,
    schedule: TopologySchedule | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Put a checkpoint's state into a model, and where given into what goes along with it.

    Args:
        path: where it was read, for messages.
        checkpoint: what load_checkpoint gave.
        model: of the checkpoint's architecture; memory formats are kept.
        optimiser: SGD over the model's parameters.
        schedule: of the checkpoint's settings.
        average: of the model's weights.

    Raises:
        ValueError: the tensors do not fit the model.
    """
    try:
        _restore_state(checkpoint.tensors, _MODEL, model)
        if average is not None:
            _restore_state(checkpoint.tensors, _AVERAGE, average.model)
        if schedule is not None:
            if checkpoint.schedule is None:
                raise ValueError("it holds no schedule")
            schedule.load_state_dict(checkpoint.schedule)
        if optimiser is not None:
            _restore_momentum(checkpoint.tensors, model, optimiser)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: does not fit this run's network ({reason}); delete it to start again"
        ) from error


def _restore_state(tensors: Mapping[str, Tensor], prefix: str, model: nn.Module) -> None:
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    current = model.state_dict()
    for name, tensor in state.items():
        if name in current and tensor.dtype != current[name].dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, not {current[name].dtype}")
    model.load_state_dict(state)


def _restore_momentum(
    tensors: Mapping[str, Tensor], model: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    trained = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            continue
        saved = tensors.get(_MOMENTUM + name)
        if saved is None or saved.shape != parameter.shape or saved.dtype != parameter.dtype:
            raise ValueError(f"no momentum for {name}")
        buffer = torch.empty_like(parameter, requires_grad=False)
        buffer.copy_(saved)
        optimiser.state[parameter]["momentum_buffer"] = buffer
