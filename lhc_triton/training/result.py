"""What a run came to: the two networks written, tested as they were written, and summed up in result.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lhc_triton.models.architecture import Architecture, OwnArchitecture
from lhc_triton.models.pretrained import load_network, save_network
from lhc_triton.training.config import TrainConfig
from lhc_triton.training.data import BadFile, Source
from lhc_triton.training.distributed import World
from lhc_triton.training.metrics import EpochMetrics, reached
from lhc_triton.training.networks import network_name
from lhc_triton.training.presets import command_of
from lhc_triton.training.stage import accuracy

TOPOLOGY_SETTINGS = (
    "topology",
    "start",
    "parts",
    "density",
    "in_block",
    "out_block",
    "block_rule",
    "shapes",
    "pointwise_layers",
    "penalty",
    "mac_share",
    "mac_budget",
    "gradual",
    "pattern_weight",
    "trim",
    "share",
)
FILES = {
    "lhc": "lhc.safetensors",
    "config": "config.toml",
    "metrics": "metrics.csv",
    "layers": "layers.csv",
    "result": "result.json",
}


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; also written as result.json.

    Accuracies are shares, 0 to 1, of the weights in the two files (half precision), computed in fp32. What is
    said of the dense network is None in a run without one.

    Attributes:
        network: for people, such as "VGG16 x 0.5".
        data: name of the data set.
        settings: of the topology, by their names in TrainConfig.
        seed: of everything random.
        dense_accuracy, lhc_accuracy: on the test images, which were used for nothing else.
        dense_val_accuracy, lhc_val_accuracy: on the validation images, in the epochs that were chosen.
        density: live share of the converted convolutions' weights.
        density_reached: whether the density that is steered is within 0.01 of its target.
        mac_density: live share of their MACs.
        steered_density: live share of what the penalty steers: weights, MACs or predicted time.
        weight_reduction, mac_reduction: one over the first two densities.
        patterns: distinct patterns of the converted convolutions, summed over them.
        dense_epoch, coarse_epoch, fine_epoch: the epochs that were chosen, from 0; None without such a stage.
        epochs: how many were trained, by stage; of a dense network that was taken over, none.
        precision: "fp32" or "bf16", of training.
        processes: how many trained together in the end.
        seconds: spent on training and validation.
        bad_files: image files that were left out, and why.
        command: the command line that makes the run.
        files: paths by name: dense, lhc (for load_network), config, metrics, layers, result.
    """

    network: str
    data: str
    settings: dict[str, Any]
    seed: int
    dense_accuracy: float | None
    lhc_accuracy: float
    dense_val_accuracy: float | None
    lhc_val_accuracy: float
    density: float
    density_reached: bool
    mac_density: float
    steered_density: float
    weight_reduction: float
    mac_reduction: float
    patterns: int
    dense_epoch: int | None
    coarse_epoch: int | None
    fine_epoch: int
    epochs: dict[str, int]
    precision: str
    processes: int
    seconds: float
    bad_files: tuple[BadFile, ...]
    command: str | None
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "bad_files": [asdict(file) for file in self.bad_files]}


@dataclass(frozen=True)
class Chosen:
    """A network of a run in the epoch that was chosen, with its share of right answers on the test images."""

    row: EpochMetrics
    test_accuracy: float


def write_and_test(
    model: nn.Module,
    path: Path,
    architecture: Architecture | OwnArchitecture,
    notes: Mapping[str, Any],
    test: Source,
    world: World,
    workers: int,
    make: Callable[[], nn.Module] | None = None,
) -> float:
    """Write a network as the main process, and test what was written: after the rounding to half precision.

    Args:
        model: dense, or with a frozen topology.
        path: the safetensors file.
        architecture: of the model.
        notes: how it was made; written with the accuracy.
        test: the test images, shared among the processes.
        world: the processes.
        workers: threads that load the images; 0 for none.
        make: builds the dense network, where that is none of this package's.

    Returns:
        The share of right answers, 0 to 1.
    """
    if world.is_main:
        save_network(model, path, architecture, notes)
    world.barrier()
    written = load_network(path, make).model
    written.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    share = accuracy(written, test, architecture.image_size, "fp32", world, workers)
    world.barrier()
    if world.is_main:
        save_network(model, path, architecture, {**notes, "test_accuracy": share})
    return share


def summed_up(
    config: TrainConfig,
    out: Path,
    rows: list[EpochMetrics],
    precision: str,
    processes: int,
    dense: Chosen | None,
    coarse: EpochMetrics | None,
    fine: Chosen,
    bad_files: tuple[BadFile, ...],
) -> TrainResult:
    """The result of a run whose networks were chosen and tested."""
    files = FILES if dense is None else {"dense": "dense.safetensors", **FILES}
    row = fine.row
    return TrainResult(
        network=network_name(config),
        data=config.data,
        settings={name: getattr(config, name) for name in TOPOLOGY_SETTINGS},
        seed=config.seed,
        dense_accuracy=None if dense is None else dense.test_accuracy,
        lhc_accuracy=fine.test_accuracy,
        dense_val_accuracy=None if dense is None else dense.row.val_accuracy,
        lhc_val_accuracy=row.val_accuracy,
        density=row.density,
        density_reached=reached(row.steered_density, config.target),
        mac_density=row.mac_density,
        steered_density=row.steered_density,
        weight_reduction=1 / row.density,
        mac_reduction=1 / row.mac_density,
        patterns=row.patterns,
        dense_epoch=None if dense is None else dense.row.epoch,
        coarse_epoch=None if coarse is None else coarse.epoch,
        fine_epoch=row.epoch,
        epochs={stage: sum(r.stage == stage for r in rows) for stage in ("dense", "coarse", "fine")},
        precision=precision,
        processes=processes,
        seconds=sum(r.seconds for r in rows),
        bad_files=bad_files,
        command=command_of(config),
        files={name: str(out / file) for name, file in files.items()},
    )
