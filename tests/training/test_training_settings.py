"""TrainConfig as Python, JSON, TOML and command line, and the named runs."""

import dataclasses
import json
import math
import shlex
from typing import get_args, get_type_hints

import pytest

from lhc_triton.handcrafted import HANDCRAFTED
from lhc_triton.models.vgg import SMALL_WIDTHS
from lhc_triton.topology import LHCConfig
from lhc_triton.training import PRESETS, TrainConfig, read_config
from lhc_triton.training.config import TopologyName
from lhc_triton.training.presets import choose_config, command_of
from lhc_triton.training.recipe import stage_epochs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_toml_and_give_the_twins_equal_epochs(name):
    config = PRESETS[name]
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_toml(config.to_toml()) == config
    assert stage_epochs(config, "dense") == stage_epochs(config, "coarse") + stage_epochs(config, "fine")
    assert config.lhc == LHCConfig(density=0.1, in_block=32, out_block=16)


def test_the_first_two_presets_are_the_runs_they_always_were():
    shared = {
        "data": "fashion-mnist",
        "network": "small-vgg",
        "validation_images": 1200,
        "lr": 0.1,
        "coarse_floor": 0.1,
        "fine_lr": 0.05,
        "lr_schedule": "cosine",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "augmentation": "none",
        "seed": 0,
    }
    quick = {"batch_size": 64, "coarse_epochs": 4, "fine_epochs": 6}
    shipped = {"batch_size": 128, "coarse_epochs": 8, "fine_epochs": 8}
    for name, own in (("quick", quick), ("shipped", shipped)):
        found = PRESETS[name].to_dict()
        assert {key: found[key] for key in {**shared, **own}} == {**shared, **own}
    unset = TrainConfig()
    assert (unset.accumulate, unset.label_smoothing, unset.ema, unset.early_stop) == (1, 0.0, None, None)


def test_a_config_file_shows_every_setting_with_its_meaning():
    lines = (
        TrainConfig(density=None, widths=(8, "M", 16), pretrained='a "b".safetensors').to_toml().splitlines()
    )
    names = [line.split(" = ")[0] for line in lines if " = " in line and not line.startswith("#")]
    assert names == [field.name for field in dataclasses.fields(TrainConfig)]
    for index, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[index - 1].startswith("# ")
    assert {'density = "none"', 'widths = [8, "M", 16]', 'pretrained = "a \\"b\\".safetensors"'} <= set(lines)


def test_none_is_nothing_only_where_a_setting_may_be_nothing():
    config = TrainConfig.from_toml('density = "none"\naugmentation = "none"\ndense_twin = "none"')
    assert (config.density, config.augmentation, config.dense_twin) == (None, "none", "none")
    with pytest.raises(ValueError, match="seed 'none' is not a whole number"):
        TrainConfig.from_toml('seed = "none"')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr = ", "no TOML"),
        ("epochs = 3", "unknown training setting 'epochs'; known: data, "),
        ("lr = true", "lr True is not a number"),
        ('seed = "3"', "seed '3' is not a whole number"),
        ("[network]", "network {} is not one of"),
        ("network = [1]", "network \\[1\\] is not one of small-vgg, vgg16"),
        ('widths = "8, 8"', "widths '8, 8' is not a list"),
        ("device = 1", "device 1 is not text"),
        ("density = 2", "density 2 is outside \\[0, 1\\]"),
        ("density = nan", "density nan is outside"),
        ('density = "None"', "density 'None' is not a number or none"),
        (f"seed = {2**63}", "seed 9223372036854775808 is outside"),
        ('dense_twin = ""', "dense_twin is empty; give text"),
        ("tensorboard = 1", "tensorboard 1 is not true or false"),
    ],
)
def test_a_wrong_config_file_gives_one_line_that_names_it(tmp_path, text, said):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"run\.toml: {said}") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_config(tmp_path / "absent")
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run\.toml"):
        read_config(path)
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match=r"run\.toml: 1048577 bytes"):
        read_config(path)


def test_numbers_may_begin_with_their_point():
    assert TrainConfig().changed({"lr": ".1", "density": ".25"}) == TrainConfig(lr=0.1, density=0.25)


@pytest.mark.parametrize(
    "change",
    [
        {"pattern_weight": 1.0},
        {"mac_share": 0.1},
        {"penalty": "macs"},
        {"mac_budget": 0.2},
        {"gradual": True},
        {"trim": True},
    ],
)
@pytest.mark.parametrize("without", [{"density": None}, {"topology": "cross"}])
def test_what_shapes_the_penalty_needs_a_target(change, without):
    TrainConfig(**change)
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name} .* needs a learned topology with a density target"):
        TrainConfig(**change, **without)


def test_a_topology_made_by_hand_has_no_patterns_to_share():
    with pytest.raises(ValueError, match="share 64 needs a topology that is learned or pruned, topology str"):
        TrainConfig(topology="stripe", share=64)


def test_settings_given_as_text_change_a_config():
    given = {
        "lr": "1e-3",
        "density": "none",
        "data_folder": "2024",
        "widths": '[8, "M", 16]',
        "network": "small-vgg",
    }
    config = TrainConfig().changed(
        {**given, "sync_batchnorm": "false", "device": "cuda:1", "early_stop": "5"}
    )
    assert config == TrainConfig(
        lr=1e-3,
        density=None,
        data_folder="2024",
        widths=(8, "M", 16),
        sync_batchnorm=False,
        device="cuda:1",
        early_stop=5,
    )
    for name, text, said in (
        ("seed", "many", "seed 'many' is not a whole number"),
        ("seed", "1\nlr = 9", "seed '1\\\\nlr = 9'"),
        ("sync_batchnorm", "yes", "sync_batchnorm 'yes' is not true or false"),
        ("lrate", "1", "'lrate'"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainConfig().changed({name: text})


def test_a_run_is_chosen_by_preset_or_file_and_then_changed(tmp_path):
    assert choose_config(None, None) == ("quick", PRESETS["quick"])
    name, config = choose_config("paper", None, ["seed=1", "lr = 0.2", "seed=3"])
    assert (name, config) == ("paper", dataclasses.replace(PRESETS["paper"], seed=3, lr=0.2))
    path = tmp_path / "mine.toml"
    path.write_text("seed = 5")
    assert choose_config(None, path, ["lr=0.2"]) == ("mine", TrainConfig(seed=5, lr=0.2))
    for arguments, said in (
        (("quick", path), "choose one of them"),
        (("slow", None), "preset 'slow' is unknown; choose one of quick, shipped, paper"),
        (("quick", None, ["seed"]), "setting 'seed' is not of the form name=value"),
    ):
        with pytest.raises(ValueError, match=said):
            choose_config(*arguments)


def test_the_command_of_a_run_makes_its_config_again():
    config = dataclasses.replace(
        PRESETS["modern"], widths=SMALL_WIDTHS, seed=3, density=None, ema=0.99, pointwise_layers=False
    )
    for run in (*PRESETS.values(), config, TrainConfig(widths=(8, "M", 16), lr=0.3)):
        _, _, _, preset, *rest = shlex.split(command_of(run))
        assert rest[-2:] == ["--out", "DIR"]
        assert rest[:-2:2] == ["--set"] * (len(rest) // 2 - 1)
        assert choose_config(preset, None, rest[1:-2:2])[1] == run


def test_the_command_of_a_run_names_no_place():
    places = {"data_folder": "/home/someone/images", "pretrained": "/home/w", "dense_twin": "/home/run"}
    assert command_of(dataclasses.replace(PRESETS["quick"], **places)) == (
        "lhc-triton train --preset quick --set data_folder=FOLDER --set pretrained=FILE --set dense_twin=RUN"
        " --out DIR"
    )


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"coarse_epochs": 1}, ValueError, "coarse_epochs 1"),
        ({"fine_epochs": 0}, ValueError, "fine_epochs 0"),
        ({"coarse_epochs": 2.5}, TypeError, "coarse_epochs 2.5"),
        ({"warmup_epochs": 12}, ValueError, "leaves none"),
        ({"warmup_epochs": 0}, ValueError, "warmup_epochs 0"),
        ({"batch_size": 1}, ValueError, "batch_size 1"),
        (
            {"batch_size": 128, "accumulate": 3},
            ValueError,
            "batch_size 128 does not divide into accumulate 3",
        ),
        ({"train_images": 100}, ValueError, "train_images 100"),
        ({"validation_images": 9}, ValueError, "validation_images 9"),
        ({"image_size": 2}, ValueError, "image_size 2"),
        ({"lr": -0.1}, ValueError, "lr -0.1"),
        ({"lr": float("nan")}, ValueError, "lr nan"),
        ({"lr": "fast"}, TypeError, "lr 'fast'"),
        ({"seed": True}, TypeError, "seed True"),
        ({"tensorboard": 1}, TypeError, "tensorboard 1"),
        ({"momentum": 0}, ValueError, "momentum 0"),
        ({"ema": 1}, ValueError, "ema 1.0"),
        ({"label_smoothing": 1}, ValueError, "label_smoothing 1"),
        ({"density": 0.0}, ValueError, "density"),
        ({"density": 1.5}, ValueError, "density"),
        ({"shapes": "round"}, ValueError, "shapes"),
        ({"precision": "fp16"}, ValueError, "precision 'fp16'"),
        ({"network": "vgg11"}, ValueError, "network 'vgg11'"),
        ({"parts": 0}, ValueError, "parts 0"),
        ({"topology": "butterfly"}, ValueError, "topology 'butterfly'"),
        ({"network": "vgg16", "widths": (8, 8)}, ValueError, "vgg16 has its own"),
        ({"stem": "imagenet"}, ValueError, "small-vgg has one stem.*leave stem at auto"),
        ({"width": 0}, ValueError, "width 0"),
        ({"seed": -1}, ValueError, "seed -1"),
        ({"widths": 8}, TypeError, "widths 8"),
        ({"widths": (8, "m")}, ValueError, "widths .* hold 'm'"),
        ({"widths": (8, 0)}, ValueError, "widths .* hold 0"),
        ({"widths": (32,)}, ValueError, "two convolutions"),
        ({"widths": ("M", 32, 32)}, ValueError, "two convolutions"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(changes, error, said):
    with pytest.raises(error, match=said):
        TrainConfig(**changes)


def numbers():
    """Every setting that is a number, with its bounds; None beside them, where it may be nothing."""
    for name, hint in get_type_hints(TrainConfig, include_extras=True).items():
        kinds = {hint.__origin__, *get_args(hint.__origin__)}
        if kinds & {int, float} and name != "widths":
            yield name, int if int in kinds else float, hint.__metadata__[0]


def test_every_number_has_bounds_and_is_refused_outside_them():
    found = list(numbers())
    assert len(found) > 25
    for name, kind, setting in found:
        assert -math.inf < setting.low < setting.high < math.inf, name
        outside = [setting.low - 1, setting.high + 1, *([] if kind is int else [math.nan, math.inf])]
        for value in (*outside, 10**400, -(10**400)):
            with pytest.raises(ValueError, match=rf"{name} .* is outside \[") as caught:
                TrainConfig(**{name: value})
            assert len(str(caught.value)) < 300
        with pytest.raises(TypeError, match=f"{name} '1' is not a"):
            TrainConfig(**{name: "1"})


def test_texts_are_short_and_printable():
    for name in ("data_folder", "pretrained", "dense_twin"):
        for text in ("\x1b[2J", "a\nb", "x" * 5000, "\x00"):
            with pytest.raises(ValueError, match=f"{name} .* is not supported") as caught:
                TrainConfig(**{name: text})
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 400
    for device in ("sofa", "cuda:", "cuda:1234", "cuda:-1", "cpu:0", "CPU", " cpu"):
        with pytest.raises(ValueError, match=r"device .* is not one of cpu, cuda, cuda:N"):
            TrainConfig(device=device)
    assert [TrainConfig(device=name).device for name in ("cpu", "cuda", "cuda:7")] == [
        "cpu",
        "cuda",
        "cuda:7",
    ]


def test_long_values_are_cut_in_messages():
    for text in (
        f"lr = {'9' * 4000}",
        f"seed = {'9' * 5000}",
        f'network = "{"x" * 9000}"',
        f"{'x' * 9000} = 1",
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (each has its own message)
            TrainConfig.from_toml(text)
        assert len(str(caught.value)) < 1500


def test_lists_nested_too_deeply_are_a_wrong_text():
    nested = "[" * 5000 + "]" * 5000
    with pytest.raises(ValueError, match="nested too deeply"):
        TrainConfig.from_toml(f"widths = {nested}")
    with pytest.raises(ValueError, match=r"widths .* is not a list"):
        TrainConfig().changed({"widths": nested})


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="'epochs'"):
        TrainConfig.from_dict({"epochs": 3})


def test_every_handcrafted_topology_and_data_set_can_be_chosen():
    assert get_args(TopologyName) == ("learned", "pruned", *HANDCRAFTED)


def test_warm_ups_take_a_third_of_the_coarse_stage_unless_told():
    assert TrainConfig(coarse_epochs=2).warmup == 1
    assert TrainConfig(coarse_epochs=12).warmup == 4
    assert TrainConfig(coarse_epochs=100).warmup == 20
    assert TrainConfig(coarse_epochs=12, warmup_epochs=2).warmup == 2
