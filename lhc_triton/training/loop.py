"""Both networks of a run: the dense one, then coarse and fine stage of the one that learns its topology."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lhc_triton.conversion import freeze, lhc_layers
from lhc_triton.models.pretrained import load_network, save_network
from lhc_triton.models.weights import write_beside
from lhc_triton.schedule import TopologySchedule
from lhc_triton.training.checkpoints import Checkpoint, load_checkpoint, restore, save_checkpoint
from lhc_triton.training.config import TrainConfig
from lhc_triton.training.data import FashionMNIST, ImageSet, validation_split
from lhc_triton.training.metrics import EpochMetrics, best_epoch, reached, write_metrics
from lhc_triton.training.networks import apply_topology, architecture_of, build_network
from lhc_triton.training.presets import command_of
from lhc_triton.training.progress import Progress, Silence, TerminalProgress
from lhc_triton.training.recipe import STAGES, StageName, make_optimiser, stage_epochs
from lhc_triton.training.stage import accuracy, choose_precision, train_epoch

LAST = "last.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; also written as result.json.

    Accuracies are shares, 0 to 1, of the weights in the two files (half precision), computed in fp32.

    Attributes:
        dense_accuracy, lhc_accuracy: on the test images, which were used for nothing else.
        dense_val_accuracy, lhc_val_accuracy: on the validation images, in the epochs that were chosen.
        density: live share of the converted convolutions' weights.
        density_reached: whether that is within 0.01 of the target.
        mac_density: live share of their MACs.
        weight_reduction, mac_reduction: one over the two densities.
        dense_epoch, coarse_epoch, fine_epoch: the epochs that were chosen, from 0.
        epochs: of each of the two networks.
        precision: "fp32" or "bf16", of training.
        seconds: spent on training and validation.
        files: paths by name: dense, lhc (for load_network), config, metrics, result.
    """

    dense_accuracy: float
    lhc_accuracy: float
    dense_val_accuracy: float
    lhc_val_accuracy: float
    density: float
    density_reached: bool
    mac_density: float
    weight_reduction: float
    mac_reduction: float
    dense_epoch: int
    coarse_epoch: int
    fine_epoch: int
    epochs: int
    precision: str
    seconds: float
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)


def train(
    config: TrainConfig,
    out_dir: str | Path,
    progress: bool = True,
    data: FashionMNIST | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> TrainResult:
    """Train the dense network, then the LHC network in both stages, and test both.

    After each epoch the whole state is written to ``out_dir``. A run that was killed is resumed from there by
    the same call, and gives the same numbers as one that was not, bit for bit, on the same machine with the
    same number of threads. A run that is complete is only tested again.

    Files in ``out_dir``: config.json, metrics.csv, result.json; dense.safetensors and lhc.safetensors (the
    results, for load_network); last.safetensors and the best of each stage (checkpoints).

    Args:
        config: the run; see TrainConfig and PRESETS.
        out_dir: folder of the run, made where missing.
        progress: whether to show progress on stderr.
        data: images to use in place of those that ``config.data`` names.
        on_epoch: called with each epoch's metrics once its state is on disk.

    Returns:
        Accuracies, densities, reductions and paths.

    Raises:
        FileNotFoundError: ``config.data`` or a file in it is missing.
        OSError: ``out_dir`` cannot be made or written.
        ValueError: a data file is damaged; too few images; ``out_dir`` holds a damaged checkpoint, or one of
            another run; the device is not there.
        RuntimeError: the loss is not finite.
    """
    device = _device(config.device)
    out = Path(out_dir)
    if data is None:
        data = (
            FashionMNIST.packaged()
            if config.data_folder is None
            else FashionMNIST.from_folder(config.data_folder)
        )
    _prepare(out, config)
    run = _identity(config, data)
    checkpoint = _checkpoint(out / LAST, config, run)
    training, validation = validation_split(
        data.train, config.validation_images, config.seed, config.train_images
    )
    steps = len(training) // config.batch_size
    if steps == 0:
        raise ValueError(f"{len(training)} training images fill no batch of {config.batch_size}")
    precision = checkpoint.precision if checkpoint else choose_precision(config.precision, device)
    write_beside(out / "config.json", _json(config.to_dict()))
    done = len(checkpoint.rows) if checkpoint else 0
    shown: Progress = Silence()
    if progress:
        total = sum(stage_epochs(config, stage) for stage in STAGES)
        shown = TerminalProgress(total * steps, done * steps)
    with shown:
        if done:
            shown.say(f"going on after {done} epochs found in {out}")
        work = _Work(config, out, run, precision, device, training, validation, shown, on_epoch)
        rows = work.stages(checkpoint)
        return _finish(work, data.test, rows)


@dataclass(frozen=True)
class _Work:
    """What the stages of one run share."""

    config: TrainConfig
    out: Path
    run: dict[str, Any]
    precision: str
    device: torch.device
    training: ImageSet
    validation: ImageSet
    progress: Progress
    on_epoch: Callable[[EpochMetrics], None] | None

    def stages(self, checkpoint: Checkpoint | None) -> list[EpochMetrics]:
        """Go through all stages from where the checkpoint left off."""
        rows = list(checkpoint.rows) if checkpoint else []
        for stage in STAGES:
            if sum(row.stage == stage for row in rows) < stage_epochs(self.config, stage):
                here = checkpoint if checkpoint is not None and checkpoint.stage == stage else None
                rows = self.stage(stage, rows, here)
        return rows

    def stage(
        self, stage: StageName, rows: list[EpochMetrics], checkpoint: Checkpoint | None
    ) -> list[EpochMetrics]:
        """Go through one stage, or what is left of it."""
        config = self.config
        model = self.network(stage)
        if stage == "fine" and checkpoint is None:
            self.load_best("coarse", model)
            freeze(model)
        schedule = None
        if stage != "dense":
            example = torch.zeros(1, 1, *self.training.images.shape[2:], device=self.device)
            schedule = TopologySchedule(model, example, config.warmup, config.warmup, config.seed)
        if checkpoint is not None and stage == "fine":
            freeze(model)
        optimiser = make_optimiser(model, config)
        if checkpoint is not None:
            restore(self.out / LAST, checkpoint, model, optimiser, schedule)
        epochs = stage_epochs(config, stage)
        for epoch in range(checkpoint.epoch + 1 if checkpoint else 0, epochs):
            rows = [*rows, self.epoch(stage, epoch, epochs, model, optimiser, schedule)]
            # The best first: a kill between the two leaves a state from which this epoch is done again.
            if best_epoch(rows, stage, config.density) is rows[-1]:
                save_checkpoint(self.best(stage), self.run, rows, self.precision, model, schedule=schedule)
            save_checkpoint(self.out / LAST, self.run, rows, self.precision, model, optimiser, schedule)
            write_metrics(self.out / "metrics.csv", rows)
            self.progress.epoch(rows[-1], epochs)
            if self.on_epoch is not None:
                self.on_epoch(rows[-1])
        return rows

    def epoch(
        self,
        stage: StageName,
        epoch: int,
        epochs: int,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        schedule: TopologySchedule | None,
    ) -> EpochMetrics:
        """Train and validate once."""
        start = time.perf_counter()
        coarse = schedule if stage == "coarse" else None
        if coarse is not None:
            coarse.start_epoch(epoch)
        losses = train_epoch(
            model,
            optimiser,
            coarse,
            self.training,
            self.config,
            stage,
            epoch,
            self.precision,
            lambda loss: self.progress.step(stage, epoch, epochs, loss),
        )
        if coarse is not None:
            coarse.end_epoch(task_loss=losses.task_loss)
        val_accuracy = accuracy(model, self.validation, self.precision)
        return EpochMetrics(
            stage=stage,
            epoch=epoch,
            task_loss=losses.task_loss,
            penalty=losses.penalty,
            ramp=float(coarse.ramp) if coarse is not None else 0.0,
            density=schedule.density if schedule is not None else 1.0,
            mac_density=schedule.mac_density if schedule is not None else 1.0,
            val_accuracy=val_accuracy,
            warming_up=coarse.warming_up if coarse is not None else False,
            rescued=sum(layer.rescued for layer in lhc_layers(model).values()),
            lr=losses.lr,
            seconds=time.perf_counter() - start,
        )

    def network(self, stage: StageName) -> nn.Module:
        """The network at its start: the same weights for the dense and the LHC one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = build_network(self.config, self.training.format, self.progress.say)
            if stage != "dense":
                apply_topology(model, self.config)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def best(self, stage: StageName) -> Path:
        """Where the best checkpoint of a stage lies."""
        return self.out / f"{stage}_best.safetensors"

    def load_best(self, stage: StageName, model: nn.Module) -> None:
        """Put the best checkpoint of a stage into a model."""
        path = self.best(stage)
        restore(path, load_checkpoint(path, self.run), model)


def _finish(work: _Work, test: ImageSet, rows: list[EpochMetrics]) -> TrainResult:
    """Write the two networks, and test what was written."""
    config, out = work.config, work.out
    chosen = {stage: best_epoch(rows, stage, config.density) for stage in STAGES}
    dense, coarse, fine = (chosen[stage] for stage in STAGES)
    if dense is None or coarse is None or fine is None:
        raise ValueError(f"{out / LAST}: lacks a stage; delete it to start again")
    if not reached(fine.density, config.density):
        work.progress.say(
            f"no epoch came within 0.01 of the density {config.density}; took the nearest, {fine.density:.4f}"
        )
    seconds = sum(row.seconds for row in rows)
    epochs = config.coarse_epochs + config.fine_epochs
    accuracies = {}
    for kind, stage in (("dense", STAGES[0]), ("lhc", STAGES[2])):
        model = work.network(stage)
        work.load_best(stage, model)
        architecture = architecture_of(config, work.training.format)
        path = out / f"{kind}.safetensors"
        notes: dict[str, Any] = {
            "command": command_of(config),
            "config": {**config.to_dict(), "data_folder": None if config.data_folder is None else "FOLDER"},
            "epochs": epochs,
            "precision": work.precision,
            "seed": config.seed,
            "torch": str(torch.__version__),
            "training_images": len(work.training),
        }
        save_network(model, path, architecture, notes)
        # What is tested is what was written: after the rounding to half precision.
        written = load_network(path).model
        written.to(work.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        accuracies[kind] = accuracy(written, test, "fp32")
        save_network(model, path, architecture, {**notes, "test_accuracy": accuracies[kind]})
    names = {name: f"{name}.safetensors" for name in ("dense", "lhc")}
    names |= {"config": "config.json", "metrics": "metrics.csv", "result": "result.json"}
    result = TrainResult(
        dense_accuracy=accuracies["dense"],
        lhc_accuracy=accuracies["lhc"],
        dense_val_accuracy=dense.val_accuracy,
        lhc_val_accuracy=fine.val_accuracy,
        density=fine.density,
        density_reached=reached(fine.density, config.density),
        mac_density=fine.mac_density,
        weight_reduction=1 / fine.density,
        mac_reduction=1 / fine.mac_density,
        dense_epoch=dense.epoch,
        coarse_epoch=coarse.epoch,
        fine_epoch=fine.epoch,
        epochs=epochs,
        precision=work.precision,
        seconds=seconds,
        files={name: str(out / file) for name, file in names.items()},
    )
    write_beside(out / "result.json", _json(result.to_dict()))
    return result


def _prepare(out: Path, config: TrainConfig) -> None:
    """Make the folder and try to write in it, before hours are spent."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder for the run")
    out.mkdir(parents=True, exist_ok=True)
    write_beside(out / "config.json", _json(config.to_dict()))


def _identity(config: TrainConfig, data: FashionMNIST) -> dict[str, Any]:
    """What must be equal for two runs to be the same; the place of the data is not, their content is."""
    identity = config.to_dict()
    for name in ("data_folder", "device", "precision"):
        del identity[name]
    return {**identity, "data": data.train.digest()}


def _checkpoint(path: Path, config: TrainConfig, run: dict[str, Any]) -> Checkpoint | None:
    """The state to go on from, if there is one, its epochs checked against the settings."""
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path, run)
    order = [(stage, epoch) for stage in STAGES for epoch in range(stage_epochs(config, stage))]
    if [(row.stage, row.epoch) for row in checkpoint.rows] != order[: len(checkpoint.rows)]:
        raise ValueError(f"{path}: its epochs are not those of this run; delete it to start again")
    return checkpoint


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one of cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there; {torch.cuda.device_count()} CUDA devices are")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not one of cpu, cuda, cuda:N")
    return device


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()
