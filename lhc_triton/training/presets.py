"""What a training run is made of: TrainConfig, and the named ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from lhc_triton.models.vgg import SMALL_WIDTHS
from lhc_triton.topology import LHCConfig

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """One run: a dense network, and its LHC twin in two stages of equally many epochs together.

    The recipe (both networks): SGD with Nesterov momentum; the learning rate falls by half a cosine over a
    stage, step by step; half of it in the first epoch. The dense network has one stage of ``coarse_epochs +
    fine_epochs``. The coarse stage falls from ``lr`` to ``lr * coarse_floor``, the others to 0. (The paper's
    plateau rule needs dozens of epochs to act: too slow for runs as short as these.)

    Attributes:
        data: folder with the original IDX files; None for the images in the package.
        train_images: how many images to train on, class-balanced; None for all that validation leaves.
        validation_images: how many training images are held out to choose the best epoch.
        widths: filters of each convolution of the VGG, "M" for pooling.
        density: share of the weights that may live; None lets the accuracy alone decide.
        in_block, out_block, shapes: the topology's blocks, as in LHCConfig.
        coarse_epochs: epochs in which weights and topology learn; at least 2.
        fine_epochs: epochs in which weights learn on under the frozen topology; at least 1.
        warmup_epochs: length of both warm-ups (masks, penalty ramp), less than coarse_epochs; None for a
            third of the coarse stage, and 20 at most.
        batch_size: images in a step; the rest of an epoch that fills no batch is left out.
        lr: the largest learning rate of the dense and the coarse stage.
        coarse_floor: the coarse stage ends at this share of lr.
        fine_lr: the largest learning rate of the fine stage.
        momentum: of SGD.
        weight_decay: of the weights of convolutions and linear layers; effects, batch norm, biases get none.
        augment: random flips and shifts.
        seed: of everything random.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 on CUDA and on CPUs with AMX, else fp32.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError, TypeError: a field is out of its range or of another type.
    """

    data: str | None = None
    train_images: int | None = None
    validation_images: int = 1200
    widths: tuple[int | Literal["M"], ...] = SMALL_WIDTHS
    density: float | None = 0.1
    in_block: int = 32
    out_block: int = 16
    shapes: Literal["free", "rigid"] = "free"
    coarse_epochs: int = 12
    fine_epochs: int = 6
    warmup_epochs: int | None = None
    batch_size: int = 128
    lr: float = 0.1
    coarse_floor: float = 0.1
    fine_lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    seed: int = 0
    precision: Precision = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.train_images is not None:
            _whole("train_images", self.train_images, self.batch_size)
        _whole("validation_images", self.validation_images, 10)
        _whole("batch_size", self.batch_size, 2)
        _whole("coarse_epochs", self.coarse_epochs, 2)
        _whole("fine_epochs", self.fine_epochs, 1)
        _whole("seed", self.seed, 0)
        if self.warmup_epochs is not None:
            _whole("warmup_epochs", self.warmup_epochs, 1)
            if self.warmup_epochs >= self.coarse_epochs:
                raise ValueError(
                    f"warmup_epochs {self.warmup_epochs} leaves none of {self.coarse_epochs} coarse epochs "
                    "to choose the best from; make it smaller than coarse_epochs"
                )
        for name, low, high in (
            ("lr", 0.0, 10.0),
            ("coarse_floor", 0.0, 1.0),
            ("fine_lr", 0.0, 10.0),
            ("momentum", 0.0, 0.999),
            ("weight_decay", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} {value!r} is not a number")
            if not low <= value <= high:
                raise ValueError(f"{name} {value} is outside [{low}, {high}]")
        if self.momentum == 0.0:
            raise ValueError("momentum 0 is outside (0, 0.999]: Nesterov's rule needs some")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r} is not one of auto, fp32, bf16")
        _ = self.lhc  # LHCConfig checks density, blocks and shapes
        if "M" in self.widths[:1] or sum(width != "M" for width in self.widths) < 2:
            raise ValueError(f"widths {self.widths} need two convolutions: the first stays dense")
        if self.widths.count("M") > 4:
            raise ValueError(
                f"widths {self.widths} pool {self.widths.count('M')} times; 28x28 images allow 4"
            )

    @property
    def lhc(self) -> LHCConfig:
        """The topology's part of the settings."""
        return LHCConfig(
            density=self.density, in_block=self.in_block, out_block=self.out_block, shapes=self.shapes
        )

    @property
    def warmup(self) -> int:
        """Epochs that both warm-ups take."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return min(20, max(1, math.floor(self.coarse_epochs / 3)))

    def architecture(self) -> dict[str, Any]:
        """What save_vgg needs to know about the network."""
        return {
            "widths": list(self.widths),
            "in_channels": 1,
            "num_classes": 10,
            "lhc": {
                "density": self.density,
                "in_block": self.in_block,
                "out_block": self.out_block,
                "shapes": self.shapes,
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of to_dict.

        Raises:
            ValueError: a field is unknown or out of its range.
            TypeError: a field has the wrong type.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown training setting {unknown[0]!r}; known: {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**values)


def command_of(config: TrainConfig) -> str | None:
    """The command line that makes this run, or None if it has settings that the command line cannot give.

    The data's folder is written as FOLDER: where it lay is nobody's business.
    """
    for name, preset in PRESETS.items():
        mine, theirs = config.to_dict(), preset.to_dict()
        changed = {key: value for key, value in mine.items() if value != theirs[key] and value is not None}
        if any(mine[key] is None and theirs[key] is not None for key in mine):
            continue
        if set(changed) <= {"data", "seed", "device", "density"}:
            changed |= {"data": "FOLDER"} if "data" in changed else {}
            options = "".join(f" --{key} {value}" for key, value in changed.items())
            return f"lhc-triton train --preset {name}{options} --out DIR"
    return None


def _whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} {value!r} is not a whole number")
    if value < low:
        raise ValueError(f"{name} {value} is too small; at least {low} is needed")


PRESETS: Mapping[str, TrainConfig] = MappingProxyType(
    {
        # About three minutes on two CPU cores: a smaller network that pools early, on the packaged images.
        "quick": TrainConfig(
            widths=(32, "M", 64, 64, "M", 128, 128),
            batch_size=64,
            coarse_epochs=4,
            fine_epochs=6,
            augment=False,
        ),
        # Made the weights that ship with the package, from its own images: anybody can make them.
        "shipped": TrainConfig(
            coarse_epochs=8,
            fine_epochs=8,
            augment=False,
        ),
    }
)
