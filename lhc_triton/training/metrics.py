"""What is recorded of an epoch, its CSV file, and the rule that picks the best epoch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from lhc_triton.models.weights import write_beside

DENSITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.csv.

    Attributes:
        stage: "dense", "coarse" or "fine".
        epoch: from 0, within the stage.
        task_loss: mean cross-entropy over the training steps.
        penalty: mean density penalty over the training steps.
        ramp: the penalty's ramp, 0 to 4.
        density: live share of the converted convolutions' weights after the epoch; 1 for the dense network.
        mac_density: the same of their MACs.
        val_accuracy: on the validation images, 0 to 1.
        warming_up: whether the masks were a mixture or the ramp not full: such an epoch may not be chosen.
        rescued: filter groups that the effects alone would have left empty.
        lr: learning rate of the last step.
        seconds: wall time of the epoch with its validation.
    """

    stage: str
    epoch: int
    task_loss: float
    penalty: float
    ramp: float
    density: float
    mac_density: float
    val_accuracy: float
    warming_up: bool
    rescued: int
    lr: float
    seconds: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochMetrics:
        """Build from what asdict() gave.

        Raises:
            ValueError: a field is missing, unknown, of another type, or not finite.
        """
        hints = get_type_hints(cls)
        if set(values) != set(hints):
            raise ValueError(f"epoch with the fields {sorted(values)}; {sorted(hints)} are needed")
        for name, wanted in hints.items():
            value = values[name]
            if type(value) is not wanted or (wanted is float and not math.isfinite(value)):
                raise ValueError(f"epoch with {name}={value!r}; a finite {wanted.__name__} is needed")
        return cls(**values)


def write_metrics(path: str | Path, rows: Sequence[EpochMetrics]) -> None:
    """Write all epochs as CSV, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow({**values, "warming_up": int(row.warming_up), "seconds": f"{row.seconds:.2f}"})
    write_beside(path, text.getvalue().encode())


def best_epoch(rows: Sequence[EpochMetrics], stage: str, target: float | None) -> EpochMetrics | None:
    """The best epoch of a stage: the highest validation accuracy among those that may be chosen.

    Epochs of a warm-up may not. In the coarse stage only those within DENSITY_TOLERANCE of the target may;
    where there is none, the one of the nearest density is taken. A tie goes to the earlier epoch.

    Args:
        rows: epochs of any stage.
        stage: whose best is wanted.
        target: the density that was aimed at; None for none.

    Returns:
        The epoch, or None as long as there is none to choose.
    """
    free = [row for row in rows if row.stage == stage and not row.warming_up]
    if stage == "coarse" and target is not None:
        near = [row for row in free if reached(row.density, target)]
        if not near:
            return min(free, key=lambda row: abs(row.density - target), default=None)
        free = near
    return max(free, key=lambda row: row.val_accuracy, default=None)


def reached(density: float, target: float | None) -> bool:
    """Whether a density counts as the target's."""
    return target is None or abs(density - target) <= DENSITY_TOLERANCE
