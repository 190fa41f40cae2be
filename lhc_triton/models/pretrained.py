"""Trained networks: files of their weights, and the pair that ships with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lhc_triton.conversion import convert, lhc_layers
from lhc_triton.finite import all_finite
from lhc_triton.models.architecture import Architecture, OwnArchitecture
from lhc_triton.models.weights import MAX_FILE_BYTES, read_state, read_tensors, write_tensors
from lhc_triton.topology import LHCConfig, expand_mask

Kind = Literal["lhc", "dense", "cifar10-lhc", "cifar10-dense"]

WEIGHTS_KIND = "network weights"
WEIGHTS_VERSION = 3
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_FILES: dict[Kind, str] = {
    "lhc": "fashion_vgg_lhc",
    "dense": "fashion_vgg_dense",
    "cifar10-lhc": "cifar10_vgg16_lhc",
    "cifar10-dense": "cifar10_vgg16_dense",
}


@dataclass(frozen=True)
class SavedNetwork:
    """What load_network read.

    Attributes:
        model: in float32 and eval mode, LHC layers frozen.
        architecture: which network it is, and for which images.
        training: notes on how it was made.
    """

    model: nn.Module
    architecture: Architecture | OwnArchitecture
    training: dict[str, Any]


def save_network(
    model: nn.Module,
    path: str | Path,
    architecture: Architecture | OwnArchitecture,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a trained network with what is needed to build it again.

    Weights are written in half precision, biases and batch norm as they are. Of a layer with a topology only
    the live weights are written, in the order in which they lie in [O, I, kh, kw].

    Args:
        model: what ``architecture.build()`` gave: dense, or converted and frozen.
        path: the safetensors file, written beside and renamed.
        architecture: of the model.
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
        # Weights only: the few numbers of batch norm and biases stay exact, and a variance may exceed 65,504.
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor = tensor.half()
        if owner in layers and leaf == "weight":
            tensor = tensor[layers[owner].mask() != 0]
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{name} holds values that are not finite in {tensor.dtype}; not saved")
        tensors[name] = tensor
    document = {
        "kind": WEIGHTS_KIND,
        "version": WEIGHTS_VERSION,
        "architecture": architecture.to_dict(),
        "layers": {name: asdict(layer.config) for name, layer in layers.items()},
        "training": dict(training or {}),
    }
    write_tensors(path, tensors, document)


def load_network(path: str | Path, make: Callable[[], nn.Module] | None = None) -> SavedNetwork:
    """Read a network that save_network wrote.

    Args:
        path: the safetensors file.
        make: builds the dense network, where that is none of this package's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its weights do not fit the architecture it names.
    """
    tensors, document = read_tensors(path, WEIGHTS_KIND, WEIGHTS_VERSION)
    try:
        architecture = _architecture(document)
        if isinstance(architecture, OwnArchitecture):
            if make is None:
                raise ValueError(
                    f"{architecture.network} is not this package's: give package.module:factory with it"
                )
            model = _converted(make(), document)
            state = _fitted(_unpacked(tensors, model), model.state_dict())
        else:
            # Nothing is allocated before the sizes are known to be the file's.
            sketch = _build(architecture, document, "meta")
            state = _fitted(_unpacked(tensors, sketch), sketch.state_dict())
            model = _build(architecture, document, "cpu")
        for layer in lhc_layers(model).values():
            layer.freeze()  # the file brings the topology
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: does not hold the network it names ({reason})") from error
    training = document.get("training")
    return SavedNetwork(model.eval(), architecture, training if isinstance(training, dict) else {})


def _architecture(document: Mapping[str, Any]) -> Architecture | OwnArchitecture:
    found = document.get("architecture")
    if not isinstance(found, dict):
        raise ValueError("no architecture in the metadata")
    if found.get("own") is True:
        return OwnArchitecture(**{name: value for name, value in found.items() if name != "own"})
    return Architecture(**found)


def _build(architecture: Architecture, document: Mapping[str, Any], device: str) -> nn.Module:
    """The network of a file, its LHC layers with random effects."""
    with torch.device(device):
        return _converted(architecture.build(), document)


def _converted(model: nn.Module, document: Mapping[str, Any]) -> nn.Module:
    """A dense network with the LHC layers that a file names."""
    if not isinstance(document["layers"], dict):
        raise ValueError("layers in the metadata is no table")
    configs = {name: LHCConfig(**values) for name, values in document["layers"].items()}
    if not configs:
        return model
    convert(model, lambda name, conv: configs[name], lambda name, conv: name in configs)
    absent = sorted(configs.keys() - lhc_layers(model).keys())
    if absent:
        raise ValueError(f"{absent[0]} is no convolution that can have a topology")
    return model


def _unpacked(tensors: Mapping[str, Tensor], sketch: nn.Module) -> dict[str, Tensor]:
    """The tensors with zeros between the live weights, for a model that was built without memory."""
    layers = lhc_layers(sketch)
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers.values())
    if size > MAX_FILE_BYTES:  # a small file can name any number of dead weights
        raise ValueError(f"its weights would take {size} bytes; up to {MAX_FILE_BYTES} are supported")
    whole = dict(tensors)
    for name, layer in layers.items():
        live, topology = tensors[f"{name}.weight"], tensors[f"{name}.topology"]
        if topology.shape != layer.topology.shape or topology.dtype != layer.topology.dtype:
            raise ValueError(f"{name}.topology is {topology.dtype} {list(topology.shape)}")
        mask = expand_mask(
            topology, layer.out_channels, layer.in_channels, layer.config.in_block, layer.config.out_block
        )
        if live.shape != (int(mask.sum()),):
            raise ValueError(f"{name}.weight holds {list(live.shape)} of {int(mask.sum())} live weights")
        weight = live.new_zeros(mask.shape)
        weight[mask] = live
        whole[f"{name}.weight"] = weight
    return whole


def load_initial(model: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Start a dense network from weights of its kind, for example torchvision's, by name and shape.

    The classifier's tensors that are missing or of another shape keep their random values, as for another
    number of classes. A convolution's bias that the network does not have goes into the batch norm after it,
    which then computes the same.

    Args:
        model: one of this package's networks.
        path: a safetensors file with its state_dict in any floating-point type.

    Returns:
        The names of the classifier's tensors that were left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors file or damaged, or something other than the classifier does
            not fit; one line.
    """
    if Path(path).suffix in (".pth", ".pt"):
        raise ValueError(
            f"{path}: torch's own files are pickles, which are not read; write its state_dict once with "
            "safetensors.torch.save_file and give that file"
        )
    tensors, _ = read_state(path)
    expected = model.state_dict()
    try:
        tensors = _biases_absorbed(tensors, expected)
        head = [name for name in expected if name.startswith(("classifier.", "fc."))]
        left_out = tuple(n for n in head if n not in tensors or tensors[n].shape != expected[n].shape)
        # What the file has of another classifier is left out with it.
        given = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in left_out and (name in expected or not name.startswith(("classifier.", "fc.")))
        }
        counters = {name: t for name, t in expected.items() if name.endswith(".num_batches_tracked")}
        rest = {name: expected[name] for name in left_out}
        model.load_state_dict(_fitted({**counters, **rest, **given}, expected))
    except ValueError as error:
        raise ValueError(f"{path}: its weights are not this network's ({error})") from error
    return left_out


def _biases_absorbed(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move biases that the network lacks into the mean that the next layer's batch norm subtracts."""
    moved = dict(tensors)
    for name in tensors.keys() - expected.keys():
        layer, _, leaf = name.rpartition(".")
        parent, _, index = layer.rpartition(".")
        mean = f"{parent}.{int(index) + 1}.running_mean" if index.isdecimal() else ""
        if leaf == "bias" and mean in tensors and tensors[mean].shape == tensors[name].shape:
            moved[mean] = moved[mean] - moved.pop(name)
    return moved


def _fitted(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the types that are expected, every name, shape and value checked.

    Raises:
        ValueError: a tensor is missing or unknown, or has another shape, another kind of type, or values that
            are not finite.
    """
    for found, wanted, what in ((tensors, expected, "lacks"), (expected, tensors, "does not know")):
        missing = sorted(wanted.keys() - found.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(f"it {what} {missing[0]}{more}")
    fitted = {}
    for name, tensor in tensors.items():
        wanted_type, wanted_shape = expected[name].dtype, expected[name].shape
        if tensor.shape != wanted_shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, not {list(wanted_shape)}")
        # A type that cannot stand for the parameter's must not pass unseen.
        if tensor.is_floating_point() != wanted_type.is_floating_point or (
            tensor.dtype != wanted_type and not tensor.is_floating_point()
        ):
            raise ValueError(f"{name} has dtype {tensor.dtype}, not {wanted_type}")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{name} holds values that are not finite")
        fitted[name] = tensor.to(wanted_type)
    return fitted


def load_pretrained(kind: Kind) -> nn.Module:
    """One of the networks that ship with the package: two of learned topology, and their dense twins.

    "lhc" and "dense" are small VGGs for Fashion-MNIST, trained for equally many epochs: images
    [N, 1, 28, 28]. "cifar10-lhc" and "cifar10-dense" are VGG16 with half of its filters for CIFAR-10, trained
    on copies of its images that went through JPEG, 12 epochs, the first one 12 more from the second's
    weights: images [N, 3, 32, 32]. Both normalised as the batches of lhc_triton.training.open_data are.

    Args:
        kind: which; those named "lhc" hold frozen LHCConv2d layers.

    Returns:
        The network in float32, eval mode.

    Raises:
        ValueError: another kind, or a damaged file.
        FileNotFoundError: the installation lacks the file.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} is not one of {', '.join(get_args(Kind))}")
    return load_network(pretrained_path(kind)).model


def pretrained_path(kind: Kind) -> Path:
    """Where the packaged weights of that kind lie."""
    return _ASSETS / f"{_FILES[kind]}.safetensors"
