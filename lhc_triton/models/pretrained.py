"""Trained networks: saving and loading their weights, and the pair that ships with the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lhc_triton.conversion import convert, freeze, lhc_layers
from lhc_triton.models.vgg import VGG, small_vgg
from lhc_triton.models.weights import read_tensors, write_tensors
from lhc_triton.topology import LHCConfig

Kind = Literal["lhc", "dense"]

WEIGHTS_KIND = "vgg weights"
WEIGHTS_VERSION = 1
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_MAX_LAYERS, _MAX_CHANNELS = 64, 8192


def save_vgg(
    model: VGG, path: str | Path, architecture: Mapping[str, Any], training: Mapping[str, Any] | None = None
) -> None:
    """Write a trained network with what is needed to build it again.

    Weights are written in half precision, biases and batch norm as they are. Weights that the topology has
    switched off are written as zeros.

    Args:
        model: a small_vgg(), dense or converted and frozen.
        path: the safetensors file, written beside and renamed.
        architecture: "widths", "in_channels", "num_classes", and "lhc": None for a dense network, or the
            fields of its LHCConfig.
        training: how it was made (command, epochs, seed, accuracies): for people, not read back.

    Raises:
        OSError: the file cannot be written.
        ValueError: an LHC layer is not frozen, or a value is not finite.
    """
    layers = lhc_layers(model)
    loose = [name for name, layer in layers.items() if not layer.frozen]
    if loose:
        raise ValueError(f"layer {loose[0]} is not frozen; call freeze(model) first")
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf == "weight":
            tensor = layers[owner].masked_weight()
        # Weights only: the few numbers of batch norm and biases stay exact, and a variance may exceed 65,504.
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor = tensor.half()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not finite in {tensor.dtype}; not saved")
        tensors[name] = tensor
    document = {
        "kind": WEIGHTS_KIND,
        "version": WEIGHTS_VERSION,
        "architecture": dict(architecture),
        "training": dict(training or {}),
    }
    write_tensors(path, tensors, document)


def load_vgg(path: str | Path) -> tuple[VGG, dict[str, Any]]:
    """Read a network that save_vgg wrote.

    Args:
        path: the safetensors file.

    Returns:
        (the network in float32 and eval mode, LHC layers frozen; the notes on its training).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its weights do not fit the architecture it names.
    """
    tensors, document = read_tensors(path, WEIGHTS_KIND, WEIGHTS_VERSION)
    try:
        model = _build(document.get("architecture"))
        expected = model.state_dict()
        for name, tensor in tensors.items():
            if name in expected and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds values that are not finite")
        # Cast here, not while copying: a type that cannot stand for the parameter's must not pass unseen.
        cast = {
            name: tensor.to(expected[name].dtype)
            if name in expected and tensor.is_floating_point() == expected[name].is_floating_point()
            else tensor
            for name, tensor in tensors.items()
        }
        wrong = [
            name for name, tensor in cast.items() if name in expected and tensor.dtype != expected[name].dtype
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} has dtype {cast[wrong[0]].dtype}, not {expected[wrong[0]].dtype}")
        model.load_state_dict(cast)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: does not hold the network it names ({reason})") from error
    training = document.get("training")
    return model.eval(), training if isinstance(training, dict) else {}


def _build(architecture: Any) -> VGG:
    """The network that ``architecture`` describes, sizes checked before anything is allocated."""
    if not isinstance(architecture, dict):
        raise ValueError("no architecture in the metadata")
    widths, lhc = architecture["widths"], architecture["lhc"]
    sizes = [architecture["in_channels"], architecture["num_classes"]]
    if not isinstance(widths, list) or len(widths) > _MAX_LAYERS:
        raise ValueError(f"widths must be a list of up to {_MAX_LAYERS} entries")
    for size in sizes + [width for width in widths if width != "M"]:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MAX_CHANNELS:
            raise ValueError(f"size {size!r} is not a whole number from 1 to {_MAX_CHANNELS}")
    model = small_vgg(tuple(widths), *sizes)
    if lhc is None:
        return model
    if not isinstance(lhc, dict):
        raise ValueError("lhc must hold the fields of an LHCConfig")
    convert(model, LHCConfig(**lhc))
    freeze(model)
    return model


def load_pretrained(kind: Kind) -> nn.Module:
    """One of the two networks that ship with the package, trained on Fashion-MNIST for equally many epochs.

    Input: images [N, 1, 28, 28], normalised as batches of lhc_triton.training.open_data("fashion-mnist") are.

    Args:
        kind: "lhc" for the network of learned topology (frozen LHCConv2d layers), "dense" for its dense twin.

    Returns:
        The network in float32, eval mode.

    Raises:
        ValueError: another kind, or a damaged file.
        FileNotFoundError: the installation lacks the file.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} is not one of {', '.join(get_args(Kind))}")
    return load_vgg(pretrained_path(kind))[0]


def pretrained_path(kind: Kind) -> Path:
    """Where the packaged weights of that kind lie."""
    return _ASSETS / f"fashion_vgg_{kind}.safetensors"
