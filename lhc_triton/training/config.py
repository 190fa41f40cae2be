"""What a training run is made of: TrainConfig, its checks, and its TOML file."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lhc_triton.files import printable
from lhc_triton.models.architecture import MAX_LAYERS, MAX_SIZE, NetworkName
from lhc_triton.models.vgg import SMALL_WIDTHS
from lhc_triton.schedule import MAC_SHARE
from lhc_triton.topology import LHCConfig, ShapeFamily
from lhc_triton.training.data import Augmentation, DataName, OnBadFile

Stem = Literal["auto", "cifar", "imagenet"]
TopologyName = Literal[
    "learned",
    "pruned",
    "standard",
    "pointwise",
    "groupwise",
    "depthwise",
    "hetconv",
    "stripe",
    "1xn",
    "asymmetric",
    "cross",
    "dilated_cross",
]
Precision = Literal["auto", "fp32", "bf16"]

OF_TARGET: Mapping[str, Any] = {
    "penalty": "weights",
    "mac_share": MAC_SHARE,
    "mac_budget": 0.0,
    "gradual": False,
    "pattern_weight": 0.0,
    "trim": False,
}
"""Settings that only a learned topology with a density target has, at the values that they have without."""

OF_PRUNED = ("penalty", "mac_budget")
"""Those of them that say something of a pruned topology too."""

NOTHING = "none"  # how a file and the command line write None
_MAX_FILE_BYTES = 1 << 20
_MANY = 10**9  # images
_LONG = 100_000  # epochs
_MAX_BATCH = 1 << 16
_MAX_TEXT = 4096
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Setting:
    """What a field of TrainConfig means, as files and the command line show it, and its range."""

    meaning: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class TrainConfig:
    """One run: a dense network, and its LHC twin in two stages of equally many epochs together.

    Each field's meaning stands beside it; to_toml() and ``lhc-triton train --show-config`` print them. The
    recipe is one for both networks: SGD with Nesterov momentum, the learning rate by half a cosine over each
    stage or by the paper's plateau rule, half of it in epoch 0 of the dense and the coarse stage. The dense
    network has one stage of ``coarse_epochs + fine_epochs``.

    Raises:
        ValueError: a field is out of its range, or two do not go together.
        TypeError: a field has the wrong type.
    """

    data: Annotated[DataName, Setting("data set: fashion-mnist, cifar10, cifar100, imagenet or folder")] = (
        "fashion-mnist"
    )
    data_folder: Annotated[
        str | None, Setting("where it lies; none: the Fashion-MNIST images in the package")
    ] = None
    image_size: Annotated[
        int | None, Setting("side of the images in pixels; none: the data set's own", 4, 4096)
    ] = None
    on_bad_file: Annotated[OnBadFile, Setting("an image that cannot be read: fail or skip")] = "fail"
    train_images: Annotated[
        int | None, Setting("images to train on, class-balanced; none: all that validation leaves", 2, _MANY)
    ] = None
    validation_images: Annotated[
        int, Setting("training images held out to choose the best epoch", 10, _MANY)
    ] = 1200

    factory: Annotated[
        str | None, Setting("package.module:factory, whose network is trained in place of `network`")
    ] = None
    network: Annotated[NetworkName, Setting("small-vgg, vgg16, vgg19, resnet34 or resnet50")] = "small-vgg"
    stem: Annotated[
        Stem, Setting("input and head for images of: cifar, imagenet, auto (cifar below 64 pixels)")
    ] = "auto"
    width: Annotated[float, Setting("multiplies every channel count of the network", 1 / 64, 16)] = 1.0
    widths: Annotated[
        tuple[int | Literal["M"], ...],
        Setting('small-vgg only: filters of each convolution, "M" for 2x2 pooling'),
    ] = SMALL_WIDTHS
    pretrained: Annotated[
        str | None, Setting("safetensors file with the weights to start from; none: random ones")
    ] = None

    topology: Annotated[
        TopologyName,
        Setting(
            "learned; pruned: the dense twin's best blocks, no coarse stage; or made by hand, in its own "
            "blocks: standard, pointwise, groupwise, depthwise, hetconv, stripe, 1xn, asymmetric, cross, "
            "dilated_cross"
        ),
    ] = "learned"
    start: Annotated[
        Literal["random", "twin"],
        Setting(
            "weights that the coarse stage starts from: the dense twin's first ones, or its trained ones"
        ),
    ] = "random"
    parts: Annotated[
        int, Setting("of a topology made by hand: how many groups, or 1 in how many it keeps", 1, MAX_SIZE)
    ] = 4
    pointwise_layers: Annotated[bool, Setting("whether 1x1 convolutions learn a topology too")] = True
    density: Annotated[
        float | None, Setting("share of the weights to keep; none: accuracy alone decides", 0, 1)
    ] = 0.1
    in_block: Annotated[int, Setting("adjacent input channels that share a mask bit", 1, MAX_SIZE)] = 32
    out_block: Annotated[int, Setting("adjacent filters that share a pattern", 1, MAX_SIZE)] = 16
    block_rule: Annotated[
        Literal["fixed", "width"],
        Setting("fixed: the two blocks in every layer; width: chosen for each layer by its channels"),
    ] = "fixed"
    shapes: Annotated[
        ShapeFamily, Setting("free: each kernel tap by itself; rigid: one of 15 kernel shapes")
    ] = "free"
    penalty: Annotated[
        Literal["weights", "macs", "latency"],
        Setting(
            "what density is a share of: weights (the paper), macs, or latency (predicted for one image)"
        ),
    ] = "weights"
    mac_share: Annotated[
        float, Setting("share of the penalty that falls on all MACs; 0.01: the paper", 0, 0.99)
    ] = MAC_SHARE
    mac_budget: Annotated[
        float, Setting("share of all MACs up to which the penalty asks for none of them; 0: the paper", 0, 1)
    ] = 0.0
    gradual: Annotated[
        bool, Setting("whether target and budget come down from 1 over the warm-up; false: the paper")
    ] = False
    pattern_weight: Annotated[
        float, Setting("weight of the aim for fewer patterns in a layer; 0: none", 0, 100)
    ] = 0.0
    trim: Annotated[
        bool, Setting("whether blocks over both budgets are pruned before the fine stage; false: the paper")
    ] = False
    share: Annotated[
        int | None,
        Setting(
            "filters that share a pattern in the fine stage, by lhc.consolidate; none: out_block", 1, MAX_SIZE
        ),
    ] = None

    coarse_epochs: Annotated[int, Setting("epochs in which weights and topology learn", 2, _LONG)] = 12
    fine_epochs: Annotated[
        int, Setting("epochs in which weights learn on, the topology frozen", 1, _LONG)
    ] = 6
    warmup_epochs: Annotated[
        int | None,
        Setting(
            "epochs of both warm-ups (masks, penalty); none: a third of the coarse ones, at most 20", 1, _LONG
        ),
    ] = None
    batch_size: Annotated[
        int, Setting("images in a step of the optimiser, over all processes", 2, _MAX_BATCH)
    ] = 128
    accumulate: Annotated[
        int, Setting("parts of a step that are computed one after the other, to save memory", 1, _MAX_BATCH)
    ] = 1
    lr: Annotated[float, Setting("highest learning rate of the dense and the coarse stage", 0, 10)] = 0.1
    coarse_floor: Annotated[float, Setting("cosine: the coarse stage ends at this share of lr", 0, 1)] = 0.1
    fine_lr: Annotated[float, Setting("highest learning rate of the fine stage", 0, 10)] = 0.05
    effect_lr: Annotated[
        float | None,
        Setting(
            "multiplies the rate of the effects; none: after network, blocks and epochs; 1: the paper",
            0,
            1000,
        ),
    ] = 1.0
    lr_schedule: Annotated[
        Literal["cosine", "plateau"],
        Setting("cosine: half a cosine over a stage; plateau: a tenth after plateau_patience"),
    ] = "cosine"
    plateau_patience: Annotated[int, Setting("epochs without gain until the rate falls", 1, _LONG)] = 20
    early_stop: Annotated[
        int | None, Setting("epochs without gain that end a stage; none: it is not ended", 1, _LONG)
    ] = None
    momentum: Annotated[float, Setting("of SGD, by Nesterov's rule", 0, 0.999)] = 0.9
    weight_decay: Annotated[
        float, Setting("of convolutions and linear layers; effects, norms, biases: 0", 0, 1)
    ] = 5e-4
    label_smoothing: Annotated[float, Setting("share of the target spread over all classes", 0, 0.9)] = 0.0
    ema: Annotated[
        float | None, Setting("decay per step of averaged weights that are validated; none: off", 0, 1)
    ] = None
    augmentation: Annotated[
        Augmentation,
        Setting("none; paper: shift by up to 12.5 %, flip; standard: the usual one for the image size"),
    ] = "paper"

    seed: Annotated[int, Setting("of everything random", 0, 2**63 - 1)] = 0
    precision: Annotated[Precision, Setting("fp32, bf16, or auto: bf16 on CUDA and on CPUs with AMX")] = (
        "auto"
    )
    channels_last: Annotated[bool, Setting("memory format of images and weights")] = True
    device: Annotated[str, Setting("cpu, cuda or cuda:N")] = "cpu"
    workers: Annotated[int, Setting("background workers that load images; 0: one thread", 0, 256)] = 0
    sync_batchnorm: Annotated[bool, Setting("batch norm over all processes")] = True
    dense_twin: Annotated[
        str, Setting("train, none, or the folder of a run whose dense network is taken over")
    ] = "train"
    tensorboard: Annotated[bool, Setting("write TensorBoard files too")] = False

    def __post_init__(self) -> None:
        for name, (kind, setting) in _fields().items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind, setting))
        _check_together(self)

    @property
    def lhc(self) -> LHCConfig:
        """The topology's part of the settings."""
        return LHCConfig(
            density=self.density, in_block=self.in_block, out_block=self.out_block, shapes=self.shapes
        )

    @property
    def target(self) -> float | None:
        """The density that training steers to; None for none, as under a topology made by hand."""
        return self.density if self.topology == "learned" else None

    @property
    def from_twin(self) -> bool:
        """Whether the network with a topology starts from the trained weights of the dense twin."""
        return self.start == "twin" or self.topology == "pruned"

    @property
    def warmup(self) -> int:
        """Epochs that both warm-ups take."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return min(20, max(1, self.coarse_epochs // 3))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of to_dict; what is left out has its default.

        Raises:
            ValueError: a field is unknown or out of its range.
            TypeError: a field has the wrong type.
        """
        for name in values:
            _check_known(name)
        return cls(**values)

    def to_toml(self) -> str:
        """Every field with its meaning, as a TOML file that from_toml() reads back."""
        lines = []
        for name, (_, setting) in _fields().items():
            lines += [f"# {setting.meaning}", f"{name} = {as_text(getattr(self, name))}", ""]
        return "\n".join(lines)

    @classmethod
    def from_toml(cls, text: str) -> TrainConfig:
        """The inverse of to_toml; what is left out has its default.

        Raises:
            ValueError: it is no TOML, or a field is unknown, of another type or out of its range; one line.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"no TOML: {error}") from error
        except RecursionError as error:
            raise ValueError("its lists or tables are nested too deeply") from error
        return _told(cls, values)

    def changed(self, assignments: Mapping[str, str]) -> TrainConfig:
        """A copy with other values, given as text: what the command line's ``--set name=value`` asks for.

        Args:
            assignments: value by field name, as in a TOML file; strings need no quotes.

        Raises:
            ValueError: a field is unknown, or its value of another type or out of its range; one line.
        """
        values = {name: _from_text(name, text) for name, text in assignments.items()}
        return _told(lambda **changes: replace(self, **changes), values)


GIVEN = ", given to train()"
"""Ends the setting ``factory`` of a run whose network was an object, which no file can name."""


def is_given(config: TrainConfig) -> bool:
    """Return whether a run's network was given to train() as an object."""
    return config.factory is not None and config.factory.endswith(GIVEN)


def as_text(value: Any) -> str:
    """A field's value as TOML."""
    if value is None:
        return as_text(NOTHING)
    if isinstance(value, tuple):
        return f"[{', '.join(as_text(entry) for entry in value)}]"
    # JSON's true, false, numbers and strings are TOML's as well.
    return json.dumps(value, ensure_ascii=False)


def read_config(path: str | Path) -> TrainConfig:
    """Read a TOML file of settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, no TOML, or holds a wrong setting; one line that names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; up to {_MAX_FILE_BYTES} are supported")
    try:
        return TrainConfig.from_toml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@cache
def _fields() -> dict[str, tuple[Any, Setting]]:
    """The type and the Setting of every field, by name."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}


def _check_known(name: str) -> None:
    if name not in _fields():
        raise ValueError(f"unknown training setting {_shown(name)}; known: {', '.join(_fields())}")


def _told(make: Any, values: Mapping[str, Any]) -> TrainConfig:
    """Make a config from what a file or a command line gives: there a wrong type is a wrong text."""
    for name in values:
        _check_known(name)
    given = {name: None if value == NOTHING and _optional(name) else value for name, value in values.items()}
    try:
        config: TrainConfig = make(**given)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return config


def _optional(name: str) -> bool:
    return NoneType in get_args(_fields()[name][0])


def _from_text(name: str, text: str) -> Any:
    """The value that ``text`` stands for: TOML where the field is no string, or as it is."""
    _check_known(name)
    kind = _fields()[name][0]
    if kind is str or str in get_args(kind) or get_origin(kind) is Literal:
        return text
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, or a number of thousands of digits
        return _number(text) if kind is float or float in get_args(kind) else text
    return found["value"] if len(found) == 1 else text  # a line break would let other keys in


def _number(text: str) -> float | str:
    """A number that is written as TOML does not have it, like .1; or the text."""
    try:
        return float(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    """A value as a message can quote it: what a file holds may be long, or move the cursor."""
    return printable(repr(value), 200)


def _checked(name: str, value: Any, kind: Any, setting: Setting) -> Any:
    """A field's value in its type and range."""
    instead = ""
    if NoneType in get_args(kind):
        if value is None:
            return None
        instead = f" or {NOTHING}"
        kind = next(choice for choice in get_args(kind) if choice is not NoneType)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} {_shown(value)} is not one of {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} {_shown(value)} is not a list")
        return tuple(value)
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise TypeError(f"{name} {_shown(value)} is not {_KINDS[kind]}{instead}")
    if value == "":
        raise ValueError(f"{name} is empty; give {_KINDS[kind]}{instead}")
    if kind is str and (len(value) > _MAX_TEXT or not value.isprintable()):
        raise ValueError(f"{name} {_shown(value)} is not supported: up to {_MAX_TEXT} printable characters")
    if kind in (int, float) and not setting.low <= value <= setting.high:
        raise ValueError(f"{name} {_shown(value)} is outside [{setting.low}, {setting.high}]")
    return float(value) if kind is float else value


def _check_together(config: TrainConfig) -> None:
    """The conditions that more than one field takes part in."""
    _ = config.lhc  # LHCConfig checks density and blocks
    if config.train_images is not None and config.train_images < config.batch_size:
        raise ValueError(f"train_images {config.train_images} fill no batch of {config.batch_size}")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide into accumulate {config.accumulate} parts"
        )
    if config.warmup_epochs is not None and config.warmup_epochs >= config.coarse_epochs:
        raise ValueError(
            f"warmup_epochs {config.warmup_epochs} leaves none of {config.coarse_epochs} coarse epochs "
            "to choose the best from; make it smaller than coarse_epochs"
        )
    if config.from_twin and config.dense_twin == "none":
        setting = "topology pruned" if config.topology == "pruned" else "start twin"
        raise ValueError(f"{setting} needs the weights of a dense twin; set dense_twin to train or a folder")
    if config.share is not None and config.topology not in ("learned", "pruned"):
        raise ValueError(
            f"share {config.share} needs a topology that is learned or pruned, topology {config.topology} is "
            "made by hand; leave share out"
        )
    if config.trim and config.penalty == "latency":
        raise ValueError("trim keeps budgets of weights or macs, penalty is latency; leave trim at False")
    if config.topology == "pruned" and config.density is None:
        raise ValueError("topology pruned needs a density: the share to keep")
    if config.target is None:
        for name, usual in OF_TARGET.items():
            if config.topology == "pruned" and name in OF_PRUNED:
                continue
            if (value := getattr(config, name)) != usual:
                raise ValueError(
                    f"{name} {value} needs a learned topology with a density target; leave it at {usual}, "
                    f"or set topology to learned and density to a number"
                )
    if not _DEVICE.fullmatch(config.device):
        raise ValueError(f"device {_shown(config.device)} is not one of cpu, cuda, cuda:N")
    if config.momentum == 0:
        raise ValueError("momentum 0 is outside (0, 0.999]: Nesterov's rule needs some")
    if config.ema in (0, 1):
        raise ValueError(f"ema {config.ema} is outside (0, 1); 0.999 is usual, none is off")
    if config.network == "small-vgg" and config.stem == "imagenet":
        raise ValueError("small-vgg has one stem, for images of any size; leave stem at auto")
    _check_widths(config)


def _check_widths(config: TrainConfig) -> None:
    widths = config.widths
    if config.network != "small-vgg" and widths != SMALL_WIDTHS:
        raise ValueError(
            f"widths {_shown(widths)} are small-vgg's, {config.network} has its own, times width: leave "
            "widths out, or start from a preset without them"
        )
    if len(widths) > MAX_LAYERS:
        raise ValueError(f"widths have {len(widths)} entries; up to {MAX_LAYERS} are supported")
    for width in widths:
        whole = isinstance(width, int) and not isinstance(width, bool)
        if width != "M" and not (whole and 1 <= int(width) <= MAX_SIZE):
            raise ValueError(
                f"widths {_shown(widths)} hold {_shown(width)}; numbers of filters up to {MAX_SIZE} and "
                '"M" are supported'
            )
    if "M" in widths[:1] or sum(width != "M" for width in widths) < 2:
        raise ValueError(f"widths {_shown(widths)} need two convolutions: the first stays dense")
