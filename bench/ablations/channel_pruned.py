"""The rival of cifar10-vgg16-quarter.toml that other tools make: the dense twin with whole filters pruned.

After Li et al., "Pruning Filters for Efficient ConvNets" (2017): in every convolution the filters with the
smallest L1 norms go, the same share of each, until the MACs of the convolutions but the first are within the
budget; what is left is a narrower dense network, trained on for as many epochs as the fine stage has.

Run: python bench/ablations/channel_pruned.py RUN --out OUT [--budget 0.2]
    RUN: a run's folder of that ablation, with its config.toml and dense.safetensors
"""

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import lhc_triton as lhc
from lhc_bench.reports.ablation import dense_part
from lhc_triton.conversion import output_pixels
from lhc_triton.models import load_network
from lhc_triton.training import read_config, train

EXAMPLE = torch.zeros(1, 3, 32, 32)


def drop_filters(model: nn.Module, share: float) -> nn.Module:
    """Leave a share of every convolution's filters, those of the largest L1 norms, in place."""
    for conv, norm in pairwise(model.modules()):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            norms = conv.weight.detach().abs().sum((1, 2, 3))
            least = norms.argsort()[: len(norms) - round(share * len(norms))]
            with torch.no_grad():
                for tensor in (conv.weight, norm.weight, norm.bias):
                    tensor[least] = 0
    return lhc.shrink(model.eval(), EXAMPLE)


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions but the first, on one image."""
    pixels = output_pixels(model, EXAMPLE, (nn.Conv2d,))
    counts = [
        conv.weight.numel() * pixels[name]
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d)
    ]
    return sum(counts[1:])


def pruned(path: Path, budget: float) -> nn.Module:
    """The twin with an equal share of every layer's filters: the largest such network within the budget."""
    most = budget * macs(load_network(path).model)
    share = math.sqrt(budget) + 0.05  # MACs go with the square of it, but for rounding
    while macs(model := drop_filters(load_network(path).model, share)) > most:
        share -= 0.0025
    return model


parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--budget", type=float, default=0.2, help="share of the MACs that stays")
options = parser.parse_args()

config = read_config(options.run / "config.toml")
model = pruned(options.run / "dense.safetensors", options.budget)
print(f"{model}\n{macs(model):,} MACs an image")

# The rate of the fine stage, a cosine from fine_lr to 0, in the two stages that a run without a topology has.
coarse = 2
left = 0.5 * (1 + math.cos(math.pi * coarse / config.fine_epochs))
tuning = replace(
    dense_part(config),
    topology="standard",
    dense_twin="none",
    lr=config.fine_lr,
    coarse_floor=left,
    fine_lr=config.fine_lr * left,
    coarse_epochs=coarse,
    fine_epochs=config.fine_epochs - coarse,
)
print(train(tuning, options.out, model=model))
