"""Learning rates, precision, the optimiser's groups, the plateau rule, and the choice of the best epoch."""

import csv
import dataclasses
import math

import pytest
import torch

from lhc_triton.conversion import convert, lhc_layers, output_pixels
from lhc_triton.layers import LHCConv2d
from lhc_triton.models import small_vgg
from lhc_triton.schedule import TopologySchedule, least_density
from lhc_triton.topology import LHCConfig
from lhc_triton.training import EpochMetrics, TrainConfig, stage
from lhc_triton.training.data.source import ImageFormat
from lhc_triton.training.metrics import best_epoch, write_metrics
from lhc_triton.training.networks import apply_topology, build_network
from lhc_triton.training.recipe import Plateau, ends_early, learning_rate, make_optimiser, plateau
from lhc_triton.training.stage import choose_precision

CIFAR = torch.zeros(1, 3, 32, 32)


def converted(config):
    """The network of a run on CIFAR-10."""
    format = ImageFormat(3, 32, tuple(map(str, range(10))), mean=(0.5,) * 3, std=(0.25,) * 3)
    model = build_network(config, format)
    apply_topology(model, config)
    return model


def test_the_learning_rate_falls_by_half_a_cosine_and_starts_at_half():
    config = TrainConfig(coarse_epochs=4, fine_epochs=2, lr=0.2, coarse_floor=0.1, fine_lr=0.05)
    assert learning_rate(config, "coarse", 0, 0, 10) == pytest.approx(0.1)
    assert learning_rate(config, "coarse", 2, 0, 10) == pytest.approx(0.2 * 0.55)
    assert learning_rate(config, "coarse", 4, 0, 10) == pytest.approx(0.02)
    assert learning_rate(config, "dense", 0, 0, 10) == pytest.approx(0.1)
    assert learning_rate(config, "dense", 3, 0, 10) == pytest.approx(0.1)
    assert learning_rate(config, "dense", 6, 0, 10) == pytest.approx(0)
    assert learning_rate(config, "fine", 0, 0, 10) == pytest.approx(0.05)
    assert learning_rate(config, "fine", 2, 0, 10) == pytest.approx(0)


def test_the_plateau_rule_divides_the_rate_by_ten_at_each_drop():
    config = TrainConfig(lr=0.2, fine_lr=0.05, lr_schedule="plateau")
    assert learning_rate(config, "coarse", 0, 5, 10) == pytest.approx(0.1)
    assert learning_rate(config, "coarse", 1, 0, 10) == pytest.approx(0.2)
    assert learning_rate(config, "dense", 9, 7, 10, drops=2) == pytest.approx(0.002)
    assert learning_rate(config, "fine", 0, 0, 10, drops=1) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [({}, "fp32"), ({"avx512_bf16": True, "amx_bf16": False}, "fp32"), ({"amx_bf16": True}, "bf16")],
)
def test_automatic_precision_on_a_cpu_is_bf16_only_with_amx(monkeypatch, capabilities, chosen):
    monkeypatch.setattr(stage, "_capabilities", lambda: capabilities)
    assert choose_precision("auto", torch.device("cpu")) == chosen
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"


def test_weight_decay_spares_effects_norms_and_biases():
    model = convert(small_vgg((4, 4)), LHCConfig(in_block=2, out_block=2))
    effects = {id(layer.effects) for layer in lhc_layers(model).values()}
    decayed, plain, topology = make_optimiser(model, TrainConfig(weight_decay=0.01)).param_groups
    assert [group["weight_decay"] for group in (decayed, plain, topology)] == [0.01, 0.0, 0.0]
    assert {id(p) for p in topology["params"]} == effects
    assert sorted(p.ndim for p in decayed["params"]) == [2, 4, 4]
    assert len(decayed["params"]) + len(plain["params"]) + len(effects) == len(list(model.parameters()))


def row(epoch: int, accuracy: float, density: float = 0.1, **changes: object) -> EpochMetrics:
    values = {
        "stage": "coarse",
        "epoch": epoch,
        "task_loss": 1.0,
        "penalty": 0.0,
        "ramp": 4.0,
        "density": density,
        "mac_density": density,
        "steered_density": density,
        "patterns": 5,
        "mask_correlation": 0.9,
        "val_accuracy": accuracy,
        "warming_up": False,
        "rescued": 0,
        "lr": 0.1,
        "seconds": 1.0,
    }
    return EpochMetrics.from_dict({**values, **changes})


def test_the_best_epoch_is_the_most_accurate_of_the_right_density_after_the_warm_ups():
    rows = [row(0, 0.99, warming_up=True), row(1, 0.9, 0.2), row(2, 0.7, 0.108), row(3, 0.8, 0.092)]
    rows += [row(4, 0.8), row(0, 1.0, stage="fine")]
    assert best_epoch(rows, "coarse", 0.1) is rows[3]
    assert best_epoch(rows, "coarse", None) is rows[1]
    assert best_epoch(rows, "fine", 0.1) is rows[5]


def test_the_rate_drops_after_epochs_without_gain_and_the_stage_ends_after_more():
    config = TrainConfig(lr_schedule="plateau", plateau_patience=2, early_stop=4)
    accuracies = [0.5, 0.6, 0.6, 0.55, 0.7, 0.7, 0.1, 0.2, 0.3]
    rows = [row(epoch, value) for epoch, value in enumerate(accuracies)]
    found = [plateau(config, "coarse", rows[: n + 1]) for n in range(len(rows))]
    assert [state.drops for state in found] == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert [state.stalled for state in found] == [0, 0, 1, 2, 0, 1, 2, 3, 4]
    assert [ends_early(config, "coarse", rows[:n]) for n in range(len(rows) + 1)] == [False] * 9 + [True]
    cosine = dataclasses.replace(config, lr_schedule="cosine", early_stop=None)
    assert plateau(cosine, "coarse", rows).drops == 0
    assert not ends_early(cosine, "coarse", rows)
    assert plateau(config, "fine", rows) == Plateau()


def test_the_rate_falls_at_any_density_but_a_stage_ends_only_once_an_epoch_may_be_chosen():
    config = TrainConfig(lr_schedule="plateau", plateau_patience=1, early_stop=2)
    rows = [row(0, 0.9, warming_up=True), row(1, 0.9, 0.5), row(2, 0.8, 0.3), row(3, 0.7, 0.2)]
    assert plateau(config, "coarse", rows[:2]) == Plateau()
    assert plateau(config, "coarse", rows) == Plateau(drops=2, waiting=0, stalled=0)
    rows += [row(4, 0.6, 0.1), row(5, 0.9, 0.2), row(6, 0.5, 0.1)]
    assert plateau(config, "coarse", rows) == Plateau(drops=5, waiting=0, stalled=2)
    assert plateau(dataclasses.replace(config, topology="cross"), "coarse", rows[:4]).stalled == 2
    macs = [row(epoch, 0.9, 0.5, steered_density=0.1) for epoch in range(3)]
    assert plateau(config, "coarse", macs).stalled == 2
    dense = [row(epoch, 0.9, 1.0, stage="dense") for epoch in range(3)]
    assert ends_early(config, "dense", [*rows, *dense])


def test_without_the_right_density_the_nearest_is_best():
    rows = [row(0, 0.99, warming_up=True), row(1, 0.9, 0.3), row(2, 0.5, 0.15), row(3, 0.9, 0.2)]
    assert best_epoch(rows, "coarse", 0.1) is rows[2]
    assert best_epoch(rows[:1], "coarse", 0.1) is None


@pytest.mark.parametrize("changes", [{"ramp": 1}, {"lr": float("nan")}, {"penalty": None}, {"more": 1}])
def test_damaged_epochs_are_refused(changes):
    with pytest.raises(ValueError, match="epoch with"):
        row(0, 0.5, **changes)


def test_metrics_are_written_as_csv(tmp_path):
    write_metrics(tmp_path / "metrics.csv", [row(0, 0.5, warming_up=True), row(1, 0.25)])
    with (tmp_path / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [*found[0]] == [field.name for field in dataclasses.fields(EpochMetrics)]
    assert [(line["warming_up"], line["val_accuracy"]) for line in found] == [("1", "0.5"), ("0", "0.25")]


@pytest.mark.parametrize(
    ("settings", "images", "found"),
    [
        ({"mac_share": 0.3, "warmup_epochs": 5}, 45_000, 0.23),
        ({"mac_share": 0.3, "warmup_epochs": 5, "in_block": 8, "out_block": 4}, 45_000, 1.9),
        ({"mac_share": 0.3, "warmup_epochs": 5, "width": 0.5}, 45_000, 0.66),
        ({"mac_share": 0.3, "warmup_epochs": 5, "network": "resnet50"}, 45_000, 0.67),
        ({"mac_share": 0.2, "warmup_epochs": 4, "density": 0.095}, 10_800, 1.06),
        ({"mac_share": 0.1, "warmup_epochs": 4, "in_block": 8, "out_block": 4}, 10_800, 7.4),
    ],
)
def test_the_effects_rates_are_those_that_the_documentation_gives(settings, images, found):
    config = TrainConfig(**{"data": "cifar10", "network": "vgg16", "width": 0.25, **settings})
    warmup = config.warmup
    schedule = TopologySchedule(converted(config), CIFAR, warmup, warmup, mac_share=config.mac_share)
    rate = schedule.effect_rate(images // 128, math.log(10), 0.9) / 0.1
    assert rate == pytest.approx(found, rel=0.03)


def test_a_quarter_of_resnet50_keeps_the_least_that_the_documentation_gives():
    model = converted(TrainConfig(data="cifar10", network="resnet50", width=0.25))
    layers = lhc_layers(model)
    assert least_density(layers) == pytest.approx(0.14, abs=0.005)
    pixels = output_pixels(model, CIFAR, (LHCConv2d,))
    assert least_density(layers, pixels) == pytest.approx(0.27, abs=0.005)
