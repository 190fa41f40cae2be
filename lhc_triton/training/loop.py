"""train(): prepares a run, goes through its stages, and tests what comes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lhc_triton.files import write_beside
from lhc_triton.models.weights import read_tensors, write_tensors
from lhc_triton.training.config import TrainConfig
from lhc_triton.training.data import BadFile, Data, Source, balanced_indices, open_data, validation_split
from lhc_triton.training.distributed import World, joined
from lhc_triton.training.epochs import all_stages
from lhc_triton.training.failures import named_where_disk_fails, named_where_memory_ends
from lhc_triton.training.finishing import finish
from lhc_triton.training.identity import (
    LAST,
    OWN_TWIN,
    dense_twin,
    find_checkpoint,
    identity,
    stages_of,
)
from lhc_triton.training.logs import RunLog
from lhc_triton.training.metrics import (
    EpochMetrics,
    write_metrics,
)
from lhc_triton.training.networks import check_topology, given_model, maker, outline_of
from lhc_triton.training.progress import Progress, Silence, TerminalProgress
from lhc_triton.training.recipe import stage_epochs
from lhc_triton.training.result import TrainResult
from lhc_triton.training.run import Run
from lhc_triton.training.stage import choose_precision

START = "start.safetensors"
START_KIND = "start of a run"


def train(
    config: TrainConfig,
    out_dir: str | Path,
    progress: bool = True,
    data: Data | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    between_stages: Callable[[nn.Module], None] | None = None,
    model: nn.Module | None = None,
) -> TrainResult:
    """Train the dense network, then the network with a topology in both stages, and test both.

    After each epoch the whole state is written to ``out_dir``. A run that was killed is resumed from there by
    the same call, and gives the same numbers as one that was not, bit for bit, on the same machine with the
    same number of threads and processes. A run that is complete is only tested again.

    Under torchrun the processes share every step: ``batch_size`` images are taken by all of them together,
    and batch norm sees them together (``sync_batchnorm``), so that the numbers are those of one process but
    for rounding; dropout draws differently. The first process writes; all must see ``out_dir`` and the data.

    Files in ``out_dir``: config.toml, metrics.csv, layers.csv, result.json; dense.safetensors and
    lhc.safetensors (the results, for load_network); last.safetensors and the best of each stage
    (checkpoints); of a given model start.safetensors, the weights that all stages start from.

    Args:
        config: the run; see TrainConfig and PRESETS.
        out_dir: folder of the run, made where missing.
        progress: whether to show progress on stderr.
        data: images to use in place of those that ``config.data`` names.
        on_epoch: called on every process with each epoch's metrics once its state is on disk.
        between_stages: called on every process with the best network of the coarse stage before the fine
            stage starts, to change its topology (LHCConv2d.set_topology): it must do the same on all of them.
        model: one's own dense network, trained in place of the one that ``config`` names, from the weights
            that it has; it is copied. To resume, give one of the same structure: the weights are the run's.

    Returns:
        Accuracies, densities, reductions and paths.

    Raises:
        FileNotFoundError: the data, pretrained weights or the dense twin's folder are missing.
        OSError: ``out_dir`` cannot be made or written: the disk is full, for example.
        TypeError: ``model`` is no module.
        ValueError: a data file is damaged; too few images; ``model`` does not suit the images, or is given
            beside the setting factory; ``out_dir`` holds a damaged checkpoint, or one of another run; the
            device is not there; the loss is not finite.
        ConnectionError: another process of the run was lost.
        MemoryError: a step does not fit into the device's memory.
    """
    with joined(config.device) as world, ExitStack() as closing:
        out = Path(out_dir)
        data = _open(config) if data is None else data
        if model is not None:
            config, model = given_model(config, model)
        make = maker(config) if model is None else partial(copy.deepcopy, model)
        check_topology(config, data.format, make)
        training, validation = _split(config, data)
        _check_steps(config, len(training), world)
        known = identity(config, training, validation)
        if model is not None:
            known["model"] = outline_of(model)
        if between_stages is not None:
            known["between stages"] = getattr(between_stages, "__qualname__", "given")
        rows, precision = _begun(out, config, known, world)
        if config.dense_twin not in OWN_TWIN:
            dense_twin(config.dense_twin, config, known, precision)  # refuses one that will not do
        world.check_same("run", json.dumps([known, len(rows), precision]))
        if world.is_main:
            _prepare(out, config, rows)
        world.check_shared(out)
        if model is not None:
            _start_alike(out / START, model, bool(rows), world)
        steps = len(training) // config.batch_size
        shown = closing.enter_context(_progress(config, progress and world.is_main, steps, len(rows)))
        _say_what_was_found(shown, out, rows, data.bad_files)
        log = RunLog(out, rows, config.tensorboard) if world.is_main else None
        if log is not None:
            closing.callback(log.close)
        run = Run(
            config,
            out,
            known,
            precision,
            world,
            data,
            training,
            validation,
            shown,
            log,
            on_epoch,
            between_stages,
            make,
        )
        with named_where_memory_ends(config):
            rows = all_stages(run, rows)
            with named_where_disk_fails(out):
                return finish(run, rows)


def _open(config: TrainConfig) -> Data:
    return open_data(
        config.data, config.data_folder, image_size=config.image_size, on_bad_file=config.on_bad_file
    )


def _split(config: TrainConfig, data: Data) -> tuple[Source, Source]:
    """The images to train on, and those that choose the epoch."""
    if data.validation is None:
        return validation_split(data.train, config.validation_images, config.seed, config.train_images)
    if config.train_images is None:
        return data.train, data.validation
    generator = torch.Generator().manual_seed(config.seed)
    chosen = balanced_indices(data.train.labels, config.train_images, generator)
    return data.train.subset(chosen), data.validation


def _begun(
    out: Path, config: TrainConfig, run: dict[str, Any], world: World
) -> tuple[list[EpochMetrics], str]:
    """The epochs that are done, and the arithmetic of the whole run: one that goes on keeps its own."""
    checkpoint = find_checkpoint(out / LAST, config, run)
    if checkpoint is None:
        return [], choose_precision(config.precision, world.device)
    if config.precision not in ("auto", checkpoint.precision):
        raise ValueError(
            f"{out / LAST}: was trained in {checkpoint.precision}, now precision is {config.precision}; "
            "choose another folder, or that precision"
        )
    return checkpoint.rows, checkpoint.precision


def _check_steps(config: TrainConfig, images: int, world: World) -> None:
    if images < config.batch_size:
        raise ValueError(f"{images} training images fill no batch of {config.batch_size}")
    if config.batch_size // config.accumulate < world.size:
        raise ValueError(
            f"batch_size {config.batch_size} in {config.accumulate} parts has no image for some of "
            f"{world.size} processes; raise batch_size or lower accumulate"
        )


def _progress(config: TrainConfig, wanted: bool, steps: int, done: int) -> Progress:
    if not wanted:
        return Silence()
    return TerminalProgress(
        sum(stage_epochs(config, stage) for stage in stages_of(config)) * steps, done * steps
    )


def _start_alike(path: Path, model: nn.Module, begun: bool, world: World) -> None:
    """Give a model the weights that the run starts from: a new run's first process brings them."""
    if world.is_main and not begun:
        with named_where_disk_fails(path.parent):
            write_tensors(path, model.state_dict(), {"kind": START_KIND, "version": 1})
    world.barrier()
    model.load_state_dict(read_tensors(path, START_KIND, 1)[0])


def _say_what_was_found(
    shown: Progress, out: Path, rows: list[EpochMetrics], bad_files: Sequence[BadFile]
) -> None:
    if rows:
        shown.say(f"going on after {len(rows)} epochs found in {out}")
    if bad_files:
        first = bad_files[0]
        shown.say(
            f"left out {len(bad_files)} files, which result.json will name; the first is "
            f"{first.path} ({first.reason})"
        )


def _prepare(out: Path, config: TrainConfig, rows: list[EpochMetrics]) -> None:
    """Make the folder and try to write in it, before hours are spent."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder for the run")
    out.mkdir(parents=True, exist_ok=True)
    for begun in out.glob(".*.tmp"):  # what a kill left of a write
        begun.unlink(missing_ok=True)
    with named_where_disk_fails(out):
        write_beside(out / "config.toml", config.to_toml().encode())
        if rows:  # a kill may have come between the checkpoint and its metrics
            write_metrics(out / "metrics.csv", rows)
