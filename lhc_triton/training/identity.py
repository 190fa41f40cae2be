"""What makes a run the run it is, and two dense networks twins: settings and images, not the machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lhc_triton.training.checkpoints import Checkpoint, load_checkpoint
from lhc_triton.training.config import TrainConfig
from lhc_triton.training.data import Source
from lhc_triton.training.metrics import EpochMetrics, best_epoch
from lhc_triton.training.recipe import STAGES, StageName, ends_early, stage_epochs

LAST = "last.safetensors"
OWN_TWIN = ("train", "none")
"""Values of TrainConfig.dense_twin that are no folder."""

# Settings that may differ between the two parts of a run that was resumed.
# What on_bad_file changes shows in the images' digests.
_MACHINE = ("data_folder", "on_bad_file", "device", "precision", "workers", "tensorboard")
# Settings that the dense network knows nothing of.
TOPOLOGY_ONLY = (
    "topology",
    "start",
    "parts",
    "pointwise_layers",
    "density",
    "in_block",
    "out_block",
    "block_rule",
    "shapes",
    "penalty",
    "mac_share",
    "mac_budget",
    "gradual",
    "pattern_weight",
    "trim",
    "share",
    "warmup_epochs",
    "coarse_floor",
    "fine_lr",
    "effect_lr",
    "dense_twin",
    "latency on",
    "between stages",
)


def identity(config: TrainConfig, training: Source, validation: Source) -> dict[str, Any]:
    """What must be equal for two runs to be the same, as JSON can hold it.

    Raises:
        OSError: the file of pretrained weights cannot be read.
    """
    known = {name: value for name, value in config.to_dict().items() if name not in _MACHINE}
    if config.factory is None:
        del known["factory"]  # runs of earlier versions do not have it
    if config.pretrained is not None:
        with Path(config.pretrained).open("rb") as file:
            known["pretrained"] = hashlib.file_digest(file, "sha256").hexdigest()
    if config.dense_twin != "train":
        known["dense_twin"] = "none"  # one that was trained without a twin may take one over later
    if config.penalty == "latency":
        known["latency on"] = torch.device(config.device).type
    return {**known, "training images": training.digest(), "validation images": validation.digest()}


def stages_of(config: TrainConfig) -> tuple[StageName, ...]:
    """The stages that a run trains itself."""
    stages = STAGES if config.dense_twin == "train" else STAGES[1:]
    return tuple(stage for stage in stages if stage != "coarse" or config.topology != "pruned")


def finished(config: TrainConfig, stage: StageName, rows: Sequence[EpochMetrics]) -> bool:
    """Whether a stage has all its epochs among ``rows``, or was ended early."""
    trained = sum(row.stage == stage for row in rows)
    return trained > 0 and (trained == stage_epochs(config, stage) or ends_early(config, stage, rows))


def find_checkpoint(path: Path, config: TrainConfig, run: dict[str, Any]) -> Checkpoint | None:
    """The state to go on from, if there is one, its epochs checked against the settings.

    Raises:
        ValueError: the file is damaged, or of another run.
    """
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path, run)
    order = []
    for stage in stages_of(config):
        trained = sum(row.stage == stage for row in checkpoint.rows)
        order += [(stage, epoch) for epoch in range(min(trained, stage_epochs(config, stage)))]
        if not finished(config, stage, checkpoint.rows):
            break
    if [(row.stage, row.epoch) for row in checkpoint.rows] != order:
        raise ValueError(f"{path}: its epochs are not those of this run; delete it to start again")
    return checkpoint


def best_file(row: EpochMetrics) -> str:
    """The name of a stage's best checkpoint, whose last epoch is ``row``.

    It holds the epoch: a kill may come between this file and the run's last state, and the epoch that is done
    again may come out otherwise.
    """
    return f"{row.stage}_best-{row.epoch}.safetensors"


def dense_twin(folder: str | Path, config: TrainConfig, run: dict[str, Any], precision: str) -> Checkpoint:
    """The best dense network of another run, which must have been trained as this run would have.

    Args:
        folder: of the other run.
        config: of this run.
        run: identity() of this run.
        precision: of this run, "fp32" or "bf16".

    Returns:
        Its checkpoint; the last row is the epoch that was chosen.

    Raises:
        FileNotFoundError: the folder holds no dense network.
        ValueError: it is damaged, not trained to the end, or of another network, recipe, precision, seed or
            images.
    """
    folder = Path(folder)
    mine = {name: value for name, value in run.items() if name not in TOPOLOGY_ONLY}
    last = load_checkpoint(folder / LAST, mine, ignore=TOPOLOGY_ONLY)
    if last.run.get("dense_twin") != "train":
        raise ValueError(f"{folder}: has no dense network of its own; give the run that trained it")
    if not finished(config, "dense", last.rows):
        raise ValueError(f"{folder}: its dense network is not trained to the end; resume that run first")
    if last.precision != precision:
        raise ValueError(
            f"{folder}: its dense network was trained in {last.precision}, this run is to be in {precision}; "
            f"set precision={last.precision}, or give another run"
        )
    best = best_epoch(last.rows, "dense", None)
    assert best is not None  # every dense epoch may be chosen, and finished() has seen some
    return load_checkpoint(folder / best_file(best), mine, ignore=TOPOLOGY_ONLY)
