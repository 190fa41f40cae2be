"""The end of a run: both networks written, what was written tested, and all of it summed up."""

from __future__ import annotations

import json

import torch
from torch import nn

from lhc_triton.files import write_beside
from lhc_triton.training.config import TrainConfig
from lhc_triton.training.identity import LAST, stages_of
from lhc_triton.training.metrics import EpochMetrics, best_epoch
from lhc_triton.training.networks import described
from lhc_triton.training.presets import command_of, without_places
from lhc_triton.training.result import Chosen, TrainResult, summed_up, write_and_test
from lhc_triton.training.run import Run


def finish(run: Run, rows: list[EpochMetrics]) -> TrainResult:
    """Write the two networks, test what was written, and sum up."""
    config, world = run.config, run.world
    coarse = best_epoch(rows, "coarse", config.target)
    if coarse is None and "coarse" in stages_of(config):
        raise ValueError(f"{run.out / LAST}: has no coarse epoch to choose; delete it to start again")
    dense = _tested_dense(run, rows)
    model = run.network("fine")
    fine = run.load_best("fine", rows, model)
    chosen = Chosen(fine, _tested(run, "lhc", model, config))
    result = summed_up(
        config, run.out, rows, run.precision, world.size, dense, coarse, chosen, run.data.bad_files
    )
    if not result.density_reached:
        run.progress.say(
            f"no epoch came within 0.01 of the density {config.target}; took the nearest, "
            f"{result.steered_density:.4f}"
        )
    if world.is_main:
        text = json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"
        write_beside(run.out / "result.json", text.encode())
    world.barrier()
    return result


def _tested_dense(run: Run, rows: list[EpochMetrics]) -> Chosen | None:
    """The dense network, tested; None in a run without one."""
    if run.config.dense_twin == "none":
        return None
    model = run.network("dense")
    row, trained_by = run.load_dense(rows, model)
    return Chosen(row, _tested(run, "dense", model, trained_by))


def _tested(run: Run, kind: str, model: nn.Module, config: TrainConfig) -> float:
    """Write a network that a run with ``config`` trained, and return its accuracy on the test images."""
    architecture = described(config, run.data.format)
    notes = {
        "command": command_of(config),
        "config": without_places(config).to_dict(),
        "precision": run.precision,
        "seed": config.seed,
        "torch": str(torch.__version__),
        "training_images": len(run.training),
    }
    path = run.out / f"{kind}.safetensors"
    return write_and_test(
        model, path, architecture, notes, run.data.test, run.world, run.config.workers, run.make
    )
