"""The rival that the ablation on CIFAR-10 is held against: a dense twin with whole filters pruned."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from dataset_files import write_cifar
from torch import nn

from lhc_triton.conversion import output_pixels
from lhc_triton.models import load_network
from lhc_triton.training import TrainConfig, train

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "ablations" / "channel_pruned.py"


CONFIG = TrainConfig(
    data="cifar10",
    network="vgg16",
    width=0.125,
    validation_images=20,
    train_images=40,
    density=0.3,
    mac_share=0.3,
    in_block=8,
    out_block=8,
    coarse_epochs=2,
    fine_epochs=5,
    batch_size=20,
    precision="fp32",
)


def macs(model):
    pixels = output_pixels(model, torch.zeros(1, 3, 32, 32), (nn.Conv2d,))
    return sum([model.get_submodule(name).weight.numel() * count for name, count in pixels.items()][1:])


def test_a_twin_with_its_least_filters_pruned_trains_on_within_the_budget_of_macs(tmp_path):
    write_cifar(tmp_path / "data", "cifar10", binary=True, packed=False)
    train(replace(CONFIG, data_folder=str(tmp_path / "data")), tmp_path / "twin", progress=False)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "twin"), "--out", str(tmp_path / "out"), "--budget=0.3"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = int(done.stdout.split(" MACs an image")[0].split()[-1].replace(",", ""))
    assert 0.25 < kept / macs(load_network(tmp_path / "twin" / "dense.safetensors").model) <= 0.3
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["epochs"] == {"dense": 0, "coarse": 2, "fine": 3}
    assert result["settings"]["topology"] == "standard"
    assert 0 <= result["lhc_accuracy"] <= 1
