"""What learning a topology costs: a training step of an LHC network against its dense twin's, paired.

A step is that of `lhc-triton train`, augmentation, penalty and optimiser included, on random images of
CIFAR-10's kind. "learning" is the coarse stage after its warm-up, "frozen" the fine stage.

Run: python bench/ablations/step_cost.py --out OUT.json [--network vgg16] [--width 0.25] [--precision bf16]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from lhc_bench.files import write_text
from lhc_bench.measure.rows import environment
from lhc_triton.conversion import lhc_layers
from lhc_triton.runtime.choosing.timing import time_paired
from lhc_triton.schedule import TopologySchedule
from lhc_triton.training import ImageSet, TrainConfig
from lhc_triton.training.data.source import ImageFormat
from lhc_triton.training.distributed import World, joined
from lhc_triton.training.networks import apply_topology, build_network
from lhc_triton.training.recipe import StageName, make_optimiser
from lhc_triton.training.stage import EpochPlan, Trainee, train_epoch

STEPS = 4  # of one timing
FORMAT = ImageFormat(3, 32, tuple(map(str, range(10))), mean=(0.5,) * 3, std=(0.25,) * 3)
STAGES: dict[str, StageName] = {"dense": "dense", "learning": "coarse", "frozen": "fine"}


def epoch_of(name: str, config: TrainConfig, images: ImageSet, world: World) -> Callable[[], None]:
    """Return a function that trains one of the three networks for STEPS steps."""
    torch.manual_seed(0)
    model = build_network(config, images.format).to(memory_format=torch.channels_last)
    schedule = None
    if name != "dense":
        apply_topology(model, config)
        schedule = TopologySchedule(model, torch.zeros(1, 3, 32, 32), 1, 1)
        schedule.start_epoch(0)
        schedule.end_epoch(task_loss=2.3)
        schedule.start_epoch(1)
    if name == "frozen":
        for layer in lhc_layers(model).values():  # not freeze(), which warns: nothing was trained
            layer.freeze()
    trainee = Trainee(model, make_optimiser(model, config), schedule)
    plan = EpochPlan(STAGES[name], 1, config.precision)

    def train() -> None:
        with torch.inference_mode(False):
            train_epoch(trainee, images, config, plan, world, lambda loss: None)

    return train


parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True, help="a JSON file")
parser.add_argument("--network", default="vgg16")
parser.add_argument("--width", type=float, default=0.25)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
parser.add_argument("--rounds", type=int, default=15)
options = parser.parse_args()

config = TrainConfig(
    data="cifar10",
    network=options.network,
    width=options.width,
    batch_size=options.batch,
    precision=options.precision,
    augmentation="standard",
    density=0.1,
    lr=0.01,
)
count = STEPS * config.batch_size
pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
images = ImageSet(pixels, torch.arange(count) % 10, FORMAT)
with joined("cpu") as world:
    times = time_paired(
        {name: epoch_of(name, config, images, world) for name in STAGES}, rounds=options.rounds
    )
env = environment(suite="step-cost", network=options.network, width=options.width, batch=options.batch)
dense = times["dense"].median_us
rows = [
    {
        "network": name,
        "step_ms": timing.median_us / STEPS / 1e3,
        "of_dense": timing.median_us / dense,
        "samples_ms": [sample / STEPS / 1e3 for sample in timing.samples_us],
    }
    for name, timing in times.items()
]
for row in rows:
    print(f"{row['network']:>8} {row['step_ms']:8.1f} ms a step, {row['of_dense']:.3f} of the dense twin's")
document = {"env": {**env, "precision": options.precision, "rounds": options.rounds}, "rows": rows}
print(write_text(options.out, json.dumps(document, indent=2) + "\n"))
