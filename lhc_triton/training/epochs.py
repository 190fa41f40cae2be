"""Going through the stages of a run, epoch by epoch, each one kept before the next begins."""

from __future__ import annotations

import math
import time

from lhc_triton.consolidation import consolidate
from lhc_triton.conversion import freeze, lhc_layers, output_pixels
from lhc_triton.layers import LHCConv2d
from lhc_triton.schedule import TopologySchedule
from lhc_triton.training.averaging import WeightAverage
from lhc_triton.training.checkpoints import load_checkpoint, restore, save_checkpoint
from lhc_triton.training.entry_costs import entry_costs
from lhc_triton.training.failures import named_where_disk_fails
from lhc_triton.training.identity import LAST, best_file, finished, stages_of
from lhc_triton.training.metrics import (
    EpochMetrics,
    LayerMetrics,
    best_epoch,
    block_masks,
    joint_correlation,
    layer_metrics,
    write_metrics,
)
from lhc_triton.training.networks import prune_network, trim_network
from lhc_triton.training.recipe import StageName, make_optimiser, plateau, stage_epochs
from lhc_triton.training.run import Run
from lhc_triton.training.stage import EpochPlan, Trainee, accuracy, train_epoch


def all_stages(run: Run, rows: list[EpochMetrics]) -> list[EpochMetrics]:
    """Go through all stages, or what ``rows``, the epochs so far, have left of them."""
    for stage in stages_of(run.config):
        if not finished(run.config, stage, rows):
            rows = one_stage(run, stage, rows)
    return rows


def one_stage(run: Run, stage: StageName, rows: list[EpochMetrics]) -> list[EpochMetrics]:
    """Go through one stage, or what is left of it."""
    trainee = start_of(run, stage, rows)
    while not finished(run.config, stage, rows):
        epoch = sum(row.stage == stage for row in rows)
        drops = plateau(run.config, stage, rows).drops
        plan = EpochPlan(stage, epoch, run.precision, drops)
        row, layers = one_epoch(run, plan, trainee)
        rows = [*rows, row]
        keep(run, rows, trainee, layers)
        run.progress.epoch(row, stage_epochs(run.config, stage))
        if run.on_epoch is not None:
            run.on_epoch(row)
    return rows


def start_of(run: Run, stage: StageName, rows: list[EpochMetrics]) -> Trainee:
    """The network at the start of a stage, or as the last checkpoint has it where that has begun."""
    config = run.config
    begun = bool(rows) and rows[-1].stage == stage
    pruned = config.topology == "pruned"
    takes_over = not begun and config.from_twin and stage == ("fine" if pruned else "coarse")
    model = run.network(stage, (lambda dense: run.load_dense(rows, dense)) if takes_over else None)
    if stage == "fine":
        if not begun:
            if pruned:
                prune_network(model, run.example(), config)
            else:
                run.load_best("coarse", rows, model)
            if run.between_stages is not None:
                run.between_stages(model)
        if begun or not run.world.is_main:  # a checkpoint brings the topology; one process warns
            for layer in lhc_layers(model).values():
                layer.freeze()
        else:
            freeze(model, entry_costs=entry_costs(model, run.example(), config.penalty))
        if config.trim and not begun:
            trim_network(model, run.example(), config)
        if config.share is not None and not begun:
            consolidate(model, share=config.share)
    if config.sync_batchnorm:
        run.world.synchronise_batch_norm(model)
    schedule, effect_rate = None, None
    if stage != "dense":
        example = run.example()
        warmup = config.warmup if config.topology == "learned" else 0
        schedule = TopologySchedule(
            model,
            example,
            warmup,
            max(warmup, 1),
            config.seed,
            entry_costs=entry_costs(model, example, config.penalty),
            mac_share=config.mac_share,
            mac_budget=config.mac_budget,
            gradual=config.gradual,
            pattern_weight=config.pattern_weight if config.target is not None else 0.0,
        )
        if stage == "coarse" and config.effect_lr is None:
            steps, loss = len(run.training) // config.batch_size, math.log(len(run.data.format.classes))
            effect_rate = schedule.effect_rate(steps, loss, config.momentum)
    average = None if config.ema is None else WeightAverage(model, config.ema)
    pixels = output_pixels(model, run.example(), (LHCConv2d,))
    trainee = Trainee(model, make_optimiser(model, config, effect_rate), schedule, average, pixels)
    if begun:
        # Read again: what was read to find the run's place would stay in memory until here, and longer.
        last = load_checkpoint(run.out / LAST, run.identity)
        restore(run.out / LAST, last, model, trainee.optimiser, schedule, average)
    return trainee


def one_epoch(run: Run, plan: EpochPlan, trainee: Trainee) -> tuple[EpochMetrics, list[LayerMetrics]]:
    """Train and validate once."""
    start = time.perf_counter()
    config, schedule = run.config, trainee.schedule
    before = block_masks(trainee.model)
    epochs = stage_epochs(config, plan.stage)
    coarse = schedule if plan.learns_topology else None
    if coarse is not None:
        coarse.start_epoch(plan.epoch)
    losses = train_epoch(
        trainee,
        run.training,
        config,
        plan,
        run.world,
        lambda loss: run.progress.step(plan.stage, plan.epoch, epochs, loss),
    )
    if coarse is not None:
        coarse.end_epoch(task_loss=losses.task_loss)
    layers = layer_metrics(plan.stage, plan.epoch, trainee.model, before, trainee.pixels)
    size, precision, world = run.data.format.size, run.precision, run.world
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
        val_accuracy=accuracy(trainee.judged, run.validation, size, precision, world, config.workers),
        warming_up=coarse.warming_up if coarse is not None else False,
        rescued=sum(layer.rescued for layer in lhc_layers(trainee.model).values()),
        lr=losses.lr,
        seconds=time.perf_counter() - start,
    )
    return row, layers


def keep(run: Run, rows: list[EpochMetrics], trainee: Trainee, layers: list[LayerMetrics]) -> None:
    """Write what is known after an epoch. The main process does it; the others wait."""
    row, schedule = rows[-1], trainee.schedule
    if run.log is not None:
        with named_where_disk_fails(run.out):
            # The state last but for metrics.csv, which follows from it: a kill in between leaves a folder
            # from which this epoch is done again.
            run.log.write_layers(layers)
            best = best_epoch(rows, row.stage, run.config.target)
            if best is row:
                path = run.out / best_file(row)
                save_checkpoint(path, run.identity, rows, run.precision, trainee.judged, schedule=schedule)
            save_checkpoint(
                run.out / LAST,
                run.identity,
                rows,
                run.precision,
                trainee.model,
                trainee.optimiser,
                schedule,
                trainee.average,
            )
            # Only now: as long as the state before is the last one, its best epoch is needed.
            for file in run.out.glob(f"{row.stage}_best-*.safetensors"):
                if best is None or file.name != best_file(best):
                    file.unlink(missing_ok=True)
            write_metrics(run.out / "metrics.csv", rows)
            run.log.show(row, layers)
    run.world.barrier()
