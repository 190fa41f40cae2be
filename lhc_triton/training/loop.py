"""Both networks of a run: the dense one, then coarse and fine stage of the one with a topology."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.conversion import freeze, lhc_layers, output_pixels
from lhc_triton.layers import LHCConv2d
from lhc_triton.models.weights import write_beside
from lhc_triton.schedule import TopologySchedule
from lhc_triton.training.averaging import WeightAverage
from lhc_triton.training.checkpoints import load_checkpoint, restore, save_checkpoint
from lhc_triton.training.config import TrainConfig, read_config
from lhc_triton.training.data import BadFile, Data, Source, balanced_indices, open_data, validation_split
from lhc_triton.training.distributed import World, joined
from lhc_triton.training.entry_costs import entry_costs
from lhc_triton.training.identity import (
    LAST,
    OWN_TWIN,
    best_file,
    dense_twin,
    find_checkpoint,
    finished,
    identity,
    stages_of,
)
from lhc_triton.training.logs import RunLog
from lhc_triton.training.metrics import (
    EpochMetrics,
    LayerMetrics,
    best_epoch,
    block_masks,
    joint_correlation,
    layer_metrics,
    write_metrics,
)
from lhc_triton.training.networks import apply_topology, build_network, check_topology, described, maker
from lhc_triton.training.presets import command_of, without_places
from lhc_triton.training.progress import Progress, Silence, TerminalProgress
from lhc_triton.training.recipe import StageName, make_optimiser, plateau, stage_epochs
from lhc_triton.training.result import Chosen, TrainResult, summed_up, write_and_test
from lhc_triton.training.stage import EpochPlan, Trainee, accuracy, choose_precision, train_epoch


def train(
    config: TrainConfig,
    out_dir: str | Path,
    progress: bool = True,
    data: Data | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    between_stages: Callable[[nn.Module], None] | None = None,
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
    (checkpoints).

    Args:
        config: the run; see TrainConfig and PRESETS.
        out_dir: folder of the run, made where missing.
        progress: whether to show progress on stderr.
        data: images to use in place of those that ``config.data`` names.
        on_epoch: called on every process with each epoch's metrics once its state is on disk.
        between_stages: called on every process with the best network of the coarse stage before the fine
            stage starts, to change its topology (LHCConv2d.set_topology): it must do the same on all of them.

    Returns:
        Accuracies, densities, reductions and paths.

    Raises:
        FileNotFoundError: the data, pretrained weights or the dense twin's folder are missing.
        OSError: ``out_dir`` cannot be made or written: the disk is full, for example.
        ValueError: a data file is damaged; too few images; ``out_dir`` holds a damaged checkpoint, or one of
            another run; the device is not there; the loss is not finite.
        ConnectionError: another process of the run was lost.
        MemoryError: a step does not fit into the device's memory.
    """
    with joined(config.device) as world, ExitStack() as closing:
        out = Path(out_dir)
        data = _open(config) if data is None else data
        check_topology(config, data.format)
        training, validation = _split(config, data)
        _check_steps(config, len(training), world)
        run = identity(config, training, validation)
        if between_stages is not None:
            run["between stages"] = getattr(between_stages, "__qualname__", "given")
        rows, precision = _begun(out, config, run, world)
        if config.dense_twin not in OWN_TWIN:
            dense_twin(config.dense_twin, config, run, precision)  # refuses one that will not do
        world.check_same("run", json.dumps([run, len(rows), precision]))
        if world.is_main:
            _prepare(out, config, rows)
        world.check_shared(out)
        steps = len(training) // config.batch_size
        shown = closing.enter_context(_progress(config, progress and world.is_main, steps, len(rows)))
        _say_what_was_found(shown, out, rows, data.bad_files)
        log = RunLog(out, rows, config.tensorboard) if world.is_main else None
        if log is not None:
            closing.callback(log.close)
        work = _Work(
            config,
            out,
            run,
            precision,
            world,
            data,
            training,
            validation,
            shown,
            log,
            on_epoch,
            between_stages,
        )
        with _named_where_memory_ends(config):
            rows = work.stages(rows)
            with _named_where_disk_fails(out):
                return work.finish(rows)


@dataclass(frozen=True)
class _Work:
    """What the stages of one run share."""

    config: TrainConfig
    out: Path
    run: dict[str, Any]
    precision: str
    world: World
    data: Data
    training: Source
    validation: Source
    progress: Progress
    log: RunLog | None
    on_epoch: Callable[[EpochMetrics], None] | None
    between_stages: Callable[[nn.Module], None] | None

    def stages(self, rows: list[EpochMetrics]) -> list[EpochMetrics]:
        """Go through all stages, or what ``rows``, the epochs so far, have left of them."""
        for stage in stages_of(self.config):
            if not finished(self.config, stage, rows):
                rows = self.stage(stage, rows)
        return rows

    def stage(self, stage: StageName, rows: list[EpochMetrics]) -> list[EpochMetrics]:
        """Go through one stage, or what is left of it."""
        trainee = self.trainee(stage, rows)
        while not finished(self.config, stage, rows):
            epoch = sum(row.stage == stage for row in rows)
            drops = plateau(self.config, stage, rows).drops
            plan = EpochPlan(stage, epoch, self.precision, drops)
            row, layers = self.epoch(plan, trainee)
            rows = [*rows, row]
            self.keep(rows, trainee, layers)
            self.progress.epoch(row, stage_epochs(self.config, stage))
            if self.on_epoch is not None:
                self.on_epoch(row)
        return rows

    def trainee(self, stage: StageName, rows: list[EpochMetrics]) -> Trainee:
        """The network at the start of a stage, or as the last checkpoint has it where that has begun."""
        config = self.config
        begun = bool(rows) and rows[-1].stage == stage
        model = self.network(stage)
        if stage == "fine":
            if not begun:
                self.load_best("coarse", rows, model)
                if self.between_stages is not None:
                    self.between_stages(model)
            if begun or not self.world.is_main:  # a checkpoint brings the topology; one process warns
                for layer in lhc_layers(model).values():
                    layer.freeze()
            else:
                freeze(model, entry_costs=entry_costs(model, self.example(), config.penalty))
        if config.sync_batchnorm:
            self.world.synchronise_batch_norm(model)
        schedule = None
        if stage != "dense":
            example = self.example()
            warmup = config.warmup if config.topology == "learned" else 0
            schedule = TopologySchedule(
                model,
                example,
                warmup,
                max(warmup, 1),
                config.seed,
                entry_costs=entry_costs(model, example, config.penalty),
                mac_share=config.mac_share,
                pattern_weight=config.pattern_weight if config.target is not None else 0.0,
            )
        average = None if config.ema is None else WeightAverage(model, config.ema)
        pixels = output_pixels(model, self.example(), (LHCConv2d,))
        trainee = Trainee(model, make_optimiser(model, config), schedule, average, pixels)
        if begun:
            # Read again: what was read to find the run's place would stay in memory until here, and longer.
            last = load_checkpoint(self.out / LAST, self.run)
            restore(self.out / LAST, last, model, trainee.optimiser, schedule, average)
        return trainee

    def epoch(self, plan: EpochPlan, trainee: Trainee) -> tuple[EpochMetrics, list[LayerMetrics]]:
        """Train and validate once."""
        start = time.perf_counter()
        config, schedule = self.config, trainee.schedule
        before = block_masks(trainee.model)
        epochs = stage_epochs(config, plan.stage)
        coarse = schedule if plan.learns_topology else None
        if coarse is not None:
            coarse.start_epoch(plan.epoch)
        losses = train_epoch(
            trainee,
            self.training,
            config,
            plan,
            self.world,
            lambda loss: self.progress.step(plan.stage, plan.epoch, epochs, loss),
        )
        if coarse is not None:
            coarse.end_epoch(task_loss=losses.task_loss)
        layers = layer_metrics(plan.stage, plan.epoch, trainee.model, before, trainee.pixels)
        size, precision, world = self.data.format.size, self.precision, self.world
        row = EpochMetrics(
            stage=plan.stage,
            epoch=plan.epoch,
            task_loss=losses.task_loss,
            penalty=losses.penalty,
            ramp=float(coarse.ramp) if coarse is not None and config.target is not None else 0.0,
            density=schedule.density if schedule is not None else 1.0,
            mac_density=schedule.mac_density if schedule is not None else 1.0,
            steered_density=schedule.steered_density if schedule is not None else 1.0,
            patterns=sum(layer.patterns for layer in layers),
            mask_correlation=joint_correlation(before, block_masks(trainee.model)),
            val_accuracy=accuracy(trainee.judged, self.validation, size, precision, world, config.workers),
            warming_up=coarse.warming_up if coarse is not None else False,
            rescued=sum(layer.rescued for layer in lhc_layers(trainee.model).values()),
            lr=losses.lr,
            seconds=time.perf_counter() - start,
        )
        return row, layers

    def keep(self, rows: list[EpochMetrics], trainee: Trainee, layers: list[LayerMetrics]) -> None:
        """Write what is known after an epoch. The main process does it; the others wait."""
        row, schedule = rows[-1], trainee.schedule
        if self.log is not None:
            with _named_where_disk_fails(self.out):
                # The state last but for metrics.csv, which follows from it: a kill in between leaves a folder
                # from which this epoch is done again.
                self.log.write_layers(layers)
                best = best_epoch(rows, row.stage, self.config.target)
                if best is row:
                    path = self.out / best_file(row)
                    save_checkpoint(path, self.run, rows, self.precision, trainee.judged, schedule=schedule)
                save_checkpoint(
                    self.out / LAST,
                    self.run,
                    rows,
                    self.precision,
                    trainee.model,
                    trainee.optimiser,
                    schedule,
                    trainee.average,
                )
                # Only now: as long as the state before is the last one, its best epoch is needed.
                for file in self.out.glob(f"{row.stage}_best-*.safetensors"):
                    if best is None or file.name != best_file(best):
                        file.unlink(missing_ok=True)
                write_metrics(self.out / "metrics.csv", rows)
                self.log.show(row, layers)
        self.world.barrier()

    def network(self, stage: StageName) -> nn.Module:
        """The network at its start: the same weights for the dense one and the one with a topology."""
        first = stage == stages_of(self.config)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = build_network(self.config, self.data.format, *([self.progress.say] if first else []))
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
        restore(path, load_checkpoint(path, self.run), model)
        return row

    def finish(self, rows: list[EpochMetrics]) -> TrainResult:
        """Write the two networks, test what was written, and sum up."""
        config, world = self.config, self.world
        coarse = best_epoch(rows, "coarse", config.target)
        if coarse is None:
            raise ValueError(f"{self.out / LAST}: has no coarse epoch to choose; delete it to start again")
        dense = self.tested_dense(rows)
        model = self.network("fine")
        fine = self.load_best("fine", rows, model)
        chosen = Chosen(fine, self.tested("lhc", model, config))
        result = summed_up(
            config, self.out, rows, self.precision, world.size, dense, coarse, chosen, self.data.bad_files
        )
        if not result.density_reached:
            self.progress.say(
                f"no epoch came within 0.01 of the density {config.target}; took the nearest, "
                f"{result.steered_density:.4f}"
            )
        if world.is_main:
            text = json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"
            write_beside(self.out / "result.json", text.encode())
        world.barrier()
        return result

    def tested_dense(self, rows: list[EpochMetrics]) -> Chosen | None:
        """The dense network, of this run or of the one it is taken from."""
        if self.config.dense_twin == "none":
            return None
        model = self.network("dense")
        if self.config.dense_twin == "train":
            row = self.load_best("dense", rows, model)
            return Chosen(row, self.tested("dense", model, self.config))
        folder = Path(self.config.dense_twin)
        checkpoint = dense_twin(folder, self.config, self.run, self.precision)
        restore(folder, checkpoint, model)
        trained_by = read_config(folder / "config.toml")
        return Chosen(checkpoint.rows[-1], self.tested("dense", model, trained_by))

    def tested(self, kind: str, model: nn.Module, config: TrainConfig) -> float:
        """Write a network that a run with ``config`` trained, and return its accuracy on the test images."""
        architecture = described(config, self.data.format)
        notes = {
            "command": command_of(config),
            "config": without_places(config).to_dict(),
            "precision": self.precision,
            "seed": config.seed,
            "torch": str(torch.__version__),
            "training_images": len(self.training),
        }
        path = self.out / f"{kind}.safetensors"
        return write_and_test(
            model,
            path,
            architecture,
            notes,
            self.data.test,
            self.world,
            self.config.workers,
            maker(config),
        )


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
    with _named_where_disk_fails(out):
        write_beside(out / "config.toml", config.to_toml().encode())
        if rows:  # a kill may have come between the checkpoint and its metrics
            write_metrics(out / "metrics.csv", rows)


@contextmanager
def _named_where_disk_fails(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        inside = error.filename is not None and Path(error.filename).is_relative_to(out)
        if not (full or inside):
            raise  # of something that was read
        raise OSError(
            f"{out}: cannot be written ({error.strerror or error}); what lies there is whole: "
            f"{'make room' if full else 'mend that'}, and the same command goes on from it"
        ) from error


@contextmanager
def _named_where_memory_ends(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for CUDA only.
        signs = ("can't allocate memory", "not enough memory", "bad allocation")
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
        ):
            raise
        raise MemoryError(
            f"no memory for steps of {config.batch_size} images in parts of "
            f"{config.batch_size // config.accumulate}; raise accumulate or lower batch_size, "
            "in another folder"
        ) from error
