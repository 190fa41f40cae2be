"""TrainConfig, learning rates, precision, the optimiser's groups, and the choice of the best epoch."""

import dataclasses

import pytest
import torch

from lhc_triton.conversion import convert, lhc_layers
from lhc_triton.models import small_vgg
from lhc_triton.topology import LHCConfig
from lhc_triton.training import PRESETS, EpochMetrics, TrainConfig, stage
from lhc_triton.training.metrics import best_epoch, write_metrics
from lhc_triton.training.presets import command_of
from lhc_triton.training.stage import choose_precision, learning_rate, make_optimiser, stage_epochs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_give_the_twins_equal_epochs(name):
    config = PRESETS[name]
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert stage_epochs(config, "dense") == stage_epochs(config, "coarse") + stage_epochs(config, "fine")
    assert config.lhc == LHCConfig(density=0.1, in_block=32, out_block=16)


def test_the_command_of_a_run_names_its_preset_but_not_the_place_of_the_data():
    quick = PRESETS["quick"]
    assert command_of(quick) == "lhc-triton train --preset quick --out DIR"
    given = dataclasses.replace(quick, data="/home/someone/images", seed=3)
    assert command_of(given) == "lhc-triton train --preset quick --data FOLDER --seed 3 --out DIR"
    assert command_of(dataclasses.replace(quick, lr=0.3)) is None
    assert command_of(dataclasses.replace(quick, density=None)) is None


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"coarse_epochs": 1}, ValueError, "coarse_epochs 1"),
        ({"fine_epochs": 0}, ValueError, "fine_epochs 0"),
        ({"coarse_epochs": 2.5}, TypeError, "coarse_epochs 2.5"),
        ({"warmup_epochs": 12}, ValueError, "leaves none"),
        ({"warmup_epochs": 0}, ValueError, "warmup_epochs 0"),
        ({"batch_size": 1}, ValueError, "batch_size 1"),
        ({"train_images": 100}, ValueError, "train_images 100"),
        ({"validation_images": 9}, ValueError, "validation_images 9"),
        ({"lr": -0.1}, ValueError, "lr -0.1"),
        ({"lr": float("nan")}, ValueError, "lr nan"),
        ({"lr": "fast"}, TypeError, "lr 'fast'"),
        ({"momentum": 0}, ValueError, "momentum 0"),
        ({"density": 0.0}, ValueError, "density"),
        ({"density": 1.5}, ValueError, "density"),
        ({"shapes": "round"}, ValueError, "shapes"),
        ({"precision": "fp16"}, ValueError, "precision 'fp16'"),
        ({"seed": -1}, ValueError, "seed -1"),
        ({"widths": (32,)}, ValueError, "two convolutions"),
        ({"widths": ("M", 32, 32)}, ValueError, "two convolutions"),
        ({"widths": (8, "M", 8, "M", 8, "M", 8, "M", 8, "M", 8)}, ValueError, "pool 5 times"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(changes, error, said):
    with pytest.raises(error, match=said):
        TrainConfig(**changes)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="'epochs'"):
        TrainConfig.from_dict({"epochs": 3})


def test_warm_ups_take_a_third_of_the_coarse_stage_unless_told():
    assert TrainConfig(coarse_epochs=2).warmup == 1
    assert TrainConfig(coarse_epochs=12).warmup == 4
    assert TrainConfig(coarse_epochs=100).warmup == 20
    assert TrainConfig(coarse_epochs=12, warmup_epochs=2).warmup == 2


def test_the_learning_rate_falls_by_half_a_cosine_and_starts_at_half():
    config = TrainConfig(coarse_epochs=4, fine_epochs=2, lr=0.2, coarse_floor=0.1, fine_lr=0.05)
    assert learning_rate(config, "coarse", 0, 0, 10) == pytest.approx(0.1)
    assert learning_rate(config, "coarse", 2, 0, 10) == pytest.approx(0.2 * 0.55)
    assert learning_rate(config, "coarse", 4, 0, 10) == pytest.approx(0.02)
    assert learning_rate(config, "dense", 3, 0, 10) == pytest.approx(0.1)
    assert learning_rate(config, "dense", 6, 0, 10) == pytest.approx(0)
    assert learning_rate(config, "fine", 0, 0, 10) == pytest.approx(0.05)
    assert learning_rate(config, "fine", 2, 0, 10) == pytest.approx(0)


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
    decayed, plain = make_optimiser(model, TrainConfig(weight_decay=0.01)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert {id(p) for p in plain["params"]} >= effects
    assert sorted(p.ndim for p in decayed["params"]) == [2, 4, 4]
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def row(epoch: int, accuracy: float, density: float = 0.1, **changes: object) -> EpochMetrics:
    values = {
        "stage": "coarse",
        "epoch": epoch,
        "task_loss": 1.0,
        "penalty": 0.0,
        "ramp": 4.0,
        "density": density,
        "mac_density": density,
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
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].split(",") == [field.name for field in dataclasses.fields(EpochMetrics)]
    assert [line.split(",")[8] for line in lines] == ["warming_up", "1", "0"]
