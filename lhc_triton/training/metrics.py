"""What is recorded of an epoch and of its layers, and the rule that picks the best epoch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from lhc_triton.conversion import lhc_layers
from lhc_triton.files import write_beside
from lhc_triton.topology import mask_correlation, shape_counts

DENSITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.csv.

    Attributes:
        stage: "dense", "coarse" or "fine".
        epoch: from 0, within the stage.
        task_loss: mean cross-entropy over the training steps.
        penalty: mean penalty of the topology over the training steps.
        ramp: the penalty's ramp, 0 to 4.
        density: live share of the converted convolutions' weights after the epoch; 1 for the dense network.
        mac_density: the same of their MACs.
        steered_density: the share that the penalty steers to the target: of weights, MACs or predicted time.
        patterns: distinct patterns of the converted convolutions, summed over them; 0 for the dense network.
        mask_correlation: Pearson correlation of all block masks with those before the epoch, -1 to 1.
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
    steered_density: float
    patterns: int
    mask_correlation: float
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
        target: the steered density that was aimed at; None for none.

    Returns:
        The epoch, or None as long as there is none to choose.
    """
    free = [row for row in rows if row.stage == stage and not row.warming_up]
    if stage == "coarse" and target is not None:
        near = [row for row in free if reached(row.steered_density, target)]
        if not near:
            return min(free, key=lambda row: abs(row.steered_density - target), default=None)
        free = near
    return max(free, key=lambda row: row.val_accuracy, default=None)


def reached(density: float, target: float | None) -> bool:
    """Whether a density counts as the target's."""
    return target is None or abs(density - target) <= DENSITY_TOLERANCE


@dataclass(frozen=True)
class LayerMetrics:
    """One line of layers.csv: a converted convolution after an epoch.

    Attributes:
        stage, epoch: as in EpochMetrics.
        layer: the module's name.
        density: live share of its weights, and so of its MACs.
        mac_share: its part of the live MACs of all converted convolutions.
        patterns: distinct patterns among its filter groups.
        correlation: Pearson correlation of its block mask with that before the epoch, -1 to 1.
        shapes: how many blocks have each kernel shape, as topology.shape_counts names them.
    """

    stage: str
    epoch: int
    layer: str
    density: float
    mac_share: float
    patterns: int
    correlation: float
    shapes: Mapping[str, int]


def block_masks(model: nn.Module) -> dict[str, Tensor]:
    """The block masks in force by layer, bool [Go, Gi, kh, kw], on the CPU."""
    with torch.no_grad():
        return {name: (layer.block_mask() != 0).cpu() for name, layer in lhc_layers(model).items()}


def layer_metrics(
    stage: str, epoch: int, model: nn.Module, before: Mapping[str, Tensor], pixels: Mapping[str, int]
) -> list[LayerMetrics]:
    """What layers.csv says of an epoch.

    Args:
        stage: its stage.
        epoch: its number.
        model: after the epoch.
        before: block_masks() before the epoch.
        pixels: output positions of each layer for one image.
    """
    layers = lhc_layers(model)
    live = {name: layer.density * layer.weight.numel() * pixels[name] for name, layer in layers.items()}
    total = math.fsum(live.values())
    return [
        LayerMetrics(
            stage=stage,
            epoch=epoch,
            layer=name,
            density=layers[name].density,
            mac_share=live[name] / total if total else 0.0,
            patterns=len(torch.unique(mask.flatten(1), dim=0)),
            correlation=mask_correlation(before[name], mask),
            shapes=shape_counts(mask),
        )
        for name, mask in block_masks(model).items()
    ]


def joint_correlation(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Mask correlation of all layers together; 1 where there is none."""
    if not after:
        return 1.0
    first, second = (torch.cat([masks[name].flatten() for name in after]) for masks in (before, after))
    return mask_correlation(first, second)
