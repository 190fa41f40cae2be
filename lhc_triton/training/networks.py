"""The networks of a run: built for its images, started from given weights, converted to its topology."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lhc_triton.conversion import blocks_by_width, convert, evaluating, lhc_layers, output_pixels
from lhc_triton.errors import first_line
from lhc_triton.generators import generators_kept
from lhc_triton.handcrafted import impose
from lhc_triton.layers import LHCConv2d
from lhc_triton.models.architecture import Architecture, OwnArchitecture
from lhc_triton.models.factory import call_factory, is_factory
from lhc_triton.models.pretrained import load_initial
from lhc_triton.models.resnet import WIDTHS
from lhc_triton.models.vgg import VGG16_WIDTHS, VGG19_WIDTHS, Images
from lhc_triton.pruning import Objective, prune
from lhc_triton.schedule import least_density
from lhc_triton.topology import Effects
from lhc_triton.training.config import GIVEN, TrainConfig, is_given
from lhc_triton.training.data import ImageFormat, expected_format, most_images
from lhc_triton.training.entry_costs import entry_costs

ModelT = TypeVar("ModelT", bound=nn.Module)
Make = Callable[[], nn.Module]

SMALL_IMAGE = 64
"""Images of fewer pixels than this have a network's CIFAR stem and head."""

_NAMES = {
    "small-vgg": "small VGG",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "resnet34": "ResNet34",
    "resnet50": "ResNet50",
}


def architecture_of(config: TrainConfig, format: ImageFormat) -> Architecture:
    """The network of a run in its sizes.

    Raises:
        ValueError: the images are too small for it.
    """
    stem: Images = "cifar" if format.size < SMALL_IMAGE else "imagenet"
    if config.network == "small-vgg":
        stem = "cifar"
    elif config.stem != "auto":
        stem = config.stem
    widths = {"small-vgg": config.widths, "vgg16": VGG16_WIDTHS, "vgg19": VGG19_WIDTHS}.get(
        config.network, WIDTHS
    )
    scaled = tuple(_scaled(width, config.width) for width in widths)
    return Architecture(config.network, scaled, stem, format.channels, len(format.classes), format.size)


def described(config: TrainConfig, format: ImageFormat) -> Architecture | OwnArchitecture:
    """What the files of a run say of its network."""
    if config.factory is None:
        return architecture_of(config, format)
    return OwnArchitecture(config.factory, format.channels, len(format.classes), format.size)


def maker(config: TrainConfig) -> Make | None:
    """What makes a run's own network; None for one of this package's.

    Raises:
        ValueError: the setting is not of the form package.module:factory; of a run whose network was an
            object, it says so.
    """
    if config.factory is None:
        return None
    if is_given(config):
        raise ValueError(
            f"the network of this run is {config.factory}: give it there again, or set factory to a "
            "package.module:factory that makes it"
        )
    if not is_factory(config.factory):
        raise ValueError(f"factory {config.factory!r} is not of the form package.module:factory")
    return partial(call_factory, config.factory)


def given_model(config: TrainConfig, model: nn.Module) -> tuple[TrainConfig, nn.Module]:
    """A run's settings and network where that is given as an object: settings that say so, and a copy.

    Raises:
        TypeError: it is no module.
        ValueError: the settings name another network; it cannot be copied, or is converted already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    name = f"{type(model).__name__}{GIVEN}"
    if config.factory not in (None, name):
        raise ValueError(
            f"the setting factory is {config.factory!r}, and a model is given: choose one of them"
        )
    if lhc_layers(model):
        raise ValueError(
            "the given model has LHC layers already; give the dense network, which a run converts"
        )
    odd = next((n for n, value in model.state_dict().items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(f"the given model keeps {odd} in its state, which is no tensor")
    try:
        return replace(config, factory=name), copy.deepcopy(model).to("cpu")
    except Exception as error:  # a module may hold anything
        raise ValueError(f"the given model cannot be copied: {first_line(error)}") from error


def outline_of(model: nn.Module) -> str:
    """Say what a network is but for its weights' values: its modules and tensors, as a name and a digest."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}({module.extra_repr()})\n".encode())
    state = model.state_dict()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    values = sum(tensor.numel() for tensor in state.values())
    return f"{type(model).__name__} of {values:,} values in {len(state)} tensors, {digest.hexdigest()[:8]}"


def _scaled(width: int | Literal["M"], factor: float) -> int | Literal["M"]:
    return width if width == "M" else max(1, round(factor * width))


def network_name(config: TrainConfig) -> str:
    """The network's name for people: one of other widths says so, as in "VGG16 x 0.5"."""
    if config.factory is not None:
        return config.factory
    name = _NAMES[config.network]
    return name if config.width == 1 else f"{name} x {config.width:g}"


def build_network(
    config: TrainConfig,
    format: ImageFormat,
    say: Callable[[str], None] = lambda text: None,
    make: Make | None = None,
) -> nn.Module:
    """The dense network of a run at its start; random weights come from torch's global generator.

    Args:
        config: the run; where it names pretrained weights they take the place of the random ones.
        format: of its images: channels, size and classes.
        say: told in a line which of the pretrained weights were left out.
        make: makes the run's own network; default what the settings name.

    Raises:
        FileNotFoundError: there is no such file of pretrained weights.
        ValueError: the images are too small for the network, or the pretrained weights are not its.
    """
    make = make or maker(config)
    model = architecture_of(config, format).build() if make is None else make()
    if make is not None:
        _check_own(config, format, model)
    if config.pretrained is not None:
        left_out = load_initial(model, config.pretrained)
        if left_out:
            say(f"{config.pretrained}: of another classifier; {', '.join(left_out)} start at random")
    return model


def _check_own(config: TrainConfig, format: ImageFormat, model: nn.Module) -> None:
    """Refuse an own network that does not take the images, or has another number of classes."""
    output_pixels(model, torch.zeros(2, format.channels, format.size, format.size), (nn.Conv2d,))
    with evaluating(model):
        output = model(torch.zeros(2, format.channels, format.size, format.size))
    wanted = (2, len(format.classes))
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != wanted:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"{config.factory} gives {found} for 2 images of {len(format.classes)} classes, not {wanted}"
        )


def check_topology(config: TrainConfig, format: ImageFormat, make: Make | None = None) -> None:
    """Refuse a network that its images or its topology do not suit, before anything is trained.

    Raises:
        ValueError: the images are too small for the network, no convolution can have the topology, or its
            blocks are too large for what pruning is to leave of its weights or MACs.
    """
    pruned = config.topology == "pruned"
    blocks = replace(config, topology="learned") if pruned else config  # none of them is frozen yet
    size = (1, format.channels, format.size, format.size)
    if config.factory is None:
        with torch.device("meta"):
            model = apply_topology(architecture_of(config, format).build(), blocks)
            example = torch.zeros(size)
    else:
        with generators_kept():
            model = apply_topology(build_network(config, format, make=make), blocks)
        example = torch.zeros(size)
    for objective, budget in _budgets(config) if pruned else ():
        if objective == "latency":
            continue  # the least hangs on which patterns the weights will share
        least = least_density(lhc_layers(model), entry_costs(model, example, objective))
        if least > budget:
            raise ValueError(
                f"topology pruned cannot come down to {budget:g} of the {objective}: each filter group keeps"
                f" one entry, and in these blocks that is {least:.4f} in all; take smaller blocks (in_block,"
                " out_block)"
            )


def check_settings(config: TrainConfig) -> None:
    """Refuse settings that no files of the data set can make a run of, before any is read.

    Raises:
        ValueError: the data set has no images of the size, or too few of them; they are too small for the
            network; no convolution can have the topology; one line.
    """
    check_topology(config, expected_format(config.data, config.image_size))
    most = most_images(config.data, config.data_folder is None)
    wanted = max(config.train_images or 0, config.batch_size)
    if most is not None and most - config.validation_images < wanted:
        name = "train_images" if wanted == config.train_images else "batch_size"
        raise ValueError(
            f"{name} {wanted} and validation_images {config.validation_images} are more than the {most} "
            f"training images that {config.data} has{' in the package' if config.data_folder is None else ''}"
        )


def apply_topology(model: ModelT, config: TrainConfig) -> ModelT:
    """Give a dense network the run's topology, in place: one to be learned, or one made by hand, frozen.

    One that is to be pruned has all of its blocks until prune_network() chooses.

    Args:
        model: what build_network gave, or the trained dense twin.
        config: the run.

    Raises:
        ValueError: no convolution can have it.
    """

    def takes_part(name: str, conv: nn.Conv2d) -> bool:
        return config.pointwise_layers or conv.kernel_size != (1, 1)

    blocks = blocks_by_width(config.lhc) if config.block_rule == "width" else config.lhc
    if config.topology == "pruned":
        return impose(model, "standard", blocks, filter_fn=takes_part)
    if config.topology != "learned":
        return impose(model, config.topology, parts=config.parts, filter_fn=takes_part)
    effects: Effects = "magnitude" if config.start == "twin" else "random"
    return convert(model, blocks, takes_part, effects=effects)


def prune_network(model: ModelT, example: Tensor, config: TrainConfig) -> ModelT:
    """Choose a pruned topology by the weights of the trained dense twin, in place.

    The run's ``density`` is kept of what its ``penalty`` names; then, where more MACs than its ``mac_budget``
    are left, more goes.

    Args:
        model: the dense twin after apply_topology().
        example: one image's worth of anything.
        config: the run.

    Raises:
        ValueError: the blocks are too large for the density.
    """
    for objective, budget in _budgets(config):
        _prune(model, example, config, objective, budget)
    return model


def trim_network(model: ModelT, example: Tensor, config: TrainConfig) -> ModelT:
    """Bring a learned topology within the run's budgets, in place: the weakest blocks over them go.

    Where the blocks do not let it come to a budget, it stays over that one, and a warning says so.

    Args:
        model: the best network of the coarse stage, frozen.
        example: one image's worth of anything.
        config: the run.
    """
    for objective, budget in _budgets(config):
        try:
            _prune(model, example, config, objective, budget)
        except ValueError as error:  # nothing is changed then
            warnings.warn(f"not trimmed to its budget of {objective}: {error}", stacklevel=2)
    return model


def _budgets(config: TrainConfig) -> list[tuple[Objective, float]]:
    """What a run's topology may have at most, in the order in which blocks go."""
    assert config.density is not None  # the settings see to it
    budgets: list[tuple[Objective, float]] = [(config.penalty, config.density)]
    if config.mac_budget > 0:
        budgets.append(("macs", config.mac_budget))
    return budgets


def _prune(
    model: nn.Module, example: Tensor, config: TrainConfig, objective: Objective, budget: float
) -> None:
    def learnt(name: str, conv: nn.Conv2d) -> bool:
        return isinstance(conv, LHCConv2d)

    prune(model, example, config.lhc, budget=budget, objective=objective, filter_fn=learnt)
