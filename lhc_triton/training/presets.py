"""The named runs, and the command line that makes a run again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lhc_triton.training.config import TrainConfig, as_text, is_given, read_config

PRESETS: Mapping[str, TrainConfig] = MappingProxyType(
    {
        # About three minutes on two CPU cores: a smaller network that pools early, on the packaged images.
        "quick": TrainConfig(
            widths=(32, "M", 64, 64, "M", 128, 128),
            batch_size=64,
            coarse_epochs=4,
            fine_epochs=6,
            augmentation="none",
        ),
        # Made the weights that ship with the package, from its own images: anybody can make them.
        "shipped": TrainConfig(coarse_epochs=8, fine_epochs=8, augmentation="none"),
        # The recipe of the authors' code, which starts from ImageNet weights (set pretrained). There a stage
        # ends after the 20 epochs without gain that lower the rate; here the lower rate gets another 20.
        "paper": TrainConfig(
            data="cifar10",
            network="vgg16",
            validation_images=5000,
            coarse_epochs=100,
            fine_epochs=200,
            batch_size=256,
            lr=0.1,
            fine_lr=0.01,
            lr_schedule="plateau",
            plateau_patience=20,
            early_stop=40,
            weight_decay=0.0,
            augmentation="paper",
        ),
        "modern": TrainConfig(
            data="cifar10",
            network="vgg16",
            validation_images=5000,
            coarse_epochs=100,
            fine_epochs=100,
            label_smoothing=0.1,
            ema=0.999,
            augmentation="standard",
        ),
        # VGG16 pools five times: the 28x28 images are padded to 32x32 for it.
        "fashion-vgg16": TrainConfig(
            network="vgg16", image_size=32, coarse_epochs=20, fine_epochs=20, augmentation="standard"
        ),
    }
)

_PLACES = {"data_folder": "FOLDER", "pretrained": "FILE", "dense_twin": "RUN"}


def choose_config(
    preset: str | None, file: Path | None, assignments: Sequence[str] = ()
) -> tuple[str, TrainConfig]:
    """The settings that a command line asks for.

    Args:
        preset: one of PRESETS; the first where neither it nor a file is given.
        file: a TOML file in its place.
        assignments: changes to either, each "name=value"; the last of a name counts.

    Returns:
        (name of the preset or the file, settings).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: both or an unknown preset is given, or a setting is wrong; one line.
    """
    if preset is not None and file is not None:
        raise ValueError(f"preset {preset!r} and file {file} are given; choose one of them")
    changes = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"setting {assignment!r} is not of the form name=value")
        changes[name.strip()] = value.strip()
    if file is not None:
        return file.stem, read_config(file).changed(changes)
    preset = preset or next(iter(PRESETS))
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    return preset, PRESETS[preset].changed(changes)


def without_places(config: TrainConfig) -> TrainConfig:
    """The same settings, with a word for every path: where things lie on a machine is nobody's business."""
    kept = (None, "none", "train")
    words = {name: word for name, word in _PLACES.items() if getattr(config, name) not in kept}
    return replace(config, **words)  # type: ignore[arg-type]


def command_of(config: TrainConfig) -> str | None:
    """The command line that makes this run, from the preset that needs the fewest changes; None for none."""
    if is_given(config):
        return None
    shown = without_places(config)
    commands = []
    for name, preset in PRESETS.items():
        mine, theirs = shown.to_dict(), preset.to_dict()
        texts = {key: as_text(getattr(shown, key)).strip('"') for key in mine if mine[key] != theirs[key]}
        options = "".join(f" --set {shlex.quote(f'{key}={text}')}" for key, text in texts.items())
        commands.append((len(texts), f"lhc-triton train --preset {name}{options} --out DIR"))
    return min(commands, key=lambda entry: entry[0])[1]
