"""One run of training: what its stages share, and the networks that they start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.training.checkpoints import load_checkpoint, restore
from lhc_triton.training.config import TrainConfig, read_config
from lhc_triton.training.data import Data, Source
from lhc_triton.training.distributed import World
from lhc_triton.training.identity import LAST, best_file, dense_twin, stages_of
from lhc_triton.training.logs import RunLog
from lhc_triton.training.metrics import EpochMetrics, best_epoch
from lhc_triton.training.networks import Make, apply_topology, build_network
from lhc_triton.training.progress import Progress
from lhc_triton.training.recipe import StageName


@dataclass(frozen=True)
class Run:
    """What the stages of one run share.

    ``identity`` is what a checkpoint has to be of; ``make`` makes a dense network that is none of ours.
    """

    config: TrainConfig
    out: Path
    identity: dict[str, Any]
    precision: str
    world: World
    data: Data
    training: Source
    validation: Source
    progress: Progress
    log: RunLog | None
    on_epoch: Callable[[EpochMetrics], None] | None
    between_stages: Callable[[nn.Module], None] | None
    make: Make | None

    def network(self, stage: StageName, take_over: Callable[[nn.Module], object] | None = None) -> nn.Module:
        """The network at its start: the same weights for the dense one and the one with a topology.

        Args:
            stage: the stage.
            take_over: gives it other weights while it is dense.
        """
        first = stage == stages_of(self.config)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            say = self.progress.say if first else lambda text: None
            model = build_network(self.config, self.data.format, say, self.make)
            if take_over is not None:
                take_over(model)
            if stage != "dense":
                apply_topology(model, self.config)
        if not self.config.channels_last:
            return model.to(self.world.device)
        placed: nn.Module = model.to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return placed

    def example(self) -> Tensor:
        """One image's worth of zeros, for the layers' output sizes."""
        form = self.data.format
        return torch.zeros(1, form.channels, form.size, form.size, device=self.world.device)

    def load_best(self, stage: StageName, rows: list[EpochMetrics], model: nn.Module) -> EpochMetrics:
        """Put the best checkpoint of a stage into a model; return the epoch it is of."""
        row = best_epoch(rows, stage, self.config.target)
        if row is None:
            raise ValueError(f"{self.out / LAST}: has no {stage} epoch to choose; delete it to start again")
        path = self.out / best_file(row)
        restore(path, load_checkpoint(path, self.identity), model)
        return row

    def load_dense(self, rows: list[EpochMetrics], model: nn.Module) -> tuple[EpochMetrics, TrainConfig]:
        """Put the best dense network, of this run or of the one it is taken from, into a model.

        Returns:
            The epoch that it is of, and the settings that trained it.
        """
        if self.config.dense_twin == "train":
            return self.load_best("dense", rows, model), self.config
        folder = Path(self.config.dense_twin)
        checkpoint = dense_twin(folder, self.config, self.identity, self.precision)
        restore(folder, checkpoint, model)
        return checkpoint.rows[-1], read_config(folder / "config.toml")
