"""Folders as a finished training leaves them, of networks that nobody trained."""

import csv
import json
import math
import random
from pathlib import Path

import torch

from lhc_triton.conversion import convert, freeze, lhc_layers
from lhc_triton.models import save_network
from lhc_triton.models.architecture import Architecture
from lhc_triton.training import TrainConfig

WIDTHS = (8, 16, "M", 16)
SMALL = {"widths": WIDTHS, "in_block": 8, "out_block": 8, "density": 0.3}
COARSE, FINE = 3, 2


def fabricated_run(folder: Path, *, with_layers: bool = True, with_twin: bool = True, **settings) -> Path:
    """Write a run folder of these settings; accuracies and curves are drawn from its seed."""
    config = TrainConfig(**{**SMALL, **settings})
    chance = random.Random(str(sorted(settings.items())))
    folder.mkdir(parents=True)
    architecture = Architecture("small-vgg", WIDTHS, "cifar", 1, 10, 28)
    torch.manual_seed(chance.randrange(1000))
    model = architecture.build()
    if with_twin:
        save_network(model, folder / "dense.safetensors", architecture)
    convert(model, config.lhc)
    freeze(model)
    save_network(model, folder / "lhc.safetensors", architecture, {"training_images": 1234})
    (folder / "config.toml").write_text(config.to_toml())
    result = {
        "dense_accuracy": chance.uniform(0.9, 0.91) if with_twin else None,
        "lhc_accuracy": chance.uniform(0.89, 0.91),
        "density_reached": False,
        "seconds": 12.5,
        "command": "lhc-triton train --preset <quick> --out DIR",
    }
    (folder / "result.json").write_text(json.dumps(result))
    stages = {
        "dense": COARSE + FINE if with_twin and config.dense_twin == "train" else 0,
        "coarse": COARSE,
        "fine": FINE,
    }
    epochs = [
        {
            "stage": stage,
            "epoch": epoch,
            "task_loss": math.exp(-epoch),
            "density": 1.0 if stage == "dense" else 0.5,
            "mac_density": 1.0 if stage == "dense" else 0.6,
            "val_accuracy": chance.uniform(0.8, 0.9),
        }
        for stage, count in stages.items()
        for epoch in range(count)
    ]
    write_table(folder / "metrics.csv", epochs)
    if with_layers:
        layers = [
            {
                "stage": "coarse",
                "epoch": epoch,
                "layer": name,
                "density": 0.5,
                "correlation": chance.uniform(0.5, 1),
            }
            for epoch in range(COARSE)
            for name in lhc_layers(model)
        ]
        write_table(folder / "layers.csv", layers)
    return folder


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
