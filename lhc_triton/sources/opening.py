"""From a SOURCE on the command line to a network: by name, by file, or by the function that makes it."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lhc_triton.artifact import is_artifact, load
from lhc_triton.files import printable
from lhc_triton.models.factory import call_factory, is_factory, one_line
from lhc_triton.models.pretrained import WEIGHTS_KIND, Kind, SavedNetwork, load_network, pretrained_path
from lhc_triton.models.weights import read_state
from lhc_triton.runtime.network.accelerated import AcceleratedModel

from .exported import read_exported
from .shapes import parse_input, random_inputs
from .weights import TORCH_FILES, fit_weights, read_weights

SHIPPED = get_args(Kind)
ZOOS = {"torchvision": "torchvision.models", "timm": "timm"}
"""Libraries whose models go by their names, and where those are."""

HOW = (
    "give package.module:factory with --weights FILE, a .pt2 of torch.export, a run folder of `train`, an"
    " artefact of `accelerate`, a torchvision or timm name, or a shipped network: " + ", ".join(SHIPPED)
)


@dataclass(frozen=True, eq=False)
class Network:
    """A network and an example of its input.

    Attributes:
        name: for people.
        model: in eval mode; of an artefact, what `load` gave.
        inputs: its positional arguments.
        random: whether its weights are random: none were given.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    random: bool = False

    @property
    def accelerated(self) -> AcceleratedModel | None:
        """The network, if it comes from an artefact."""
        return self.model if isinstance(self.model, AcceleratedModel) else None


def open_network(
    source: str,
    weights: str | Path | None = None,
    input_shape: str | None = None,
    *,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Network:
    """Return the network that a source stands for.

    Args:
        source: a shipped network (one of SHIPPED); a file: trained weights or an artefact of this package, a
            .pt2 of torch.export; a run folder of `train`; package.module:factory, a function or class that
            is called without arguments, or a module; a model's name in torchvision or timm, where installed.
        weights: state_dict for a factory or a name: a safetensors file, or a torch file of tensors alone.
        input_shape: as "1x3x224x224"; needed unless the source knows. See `parse_input`.
        batch: images of the example, in place of its first size.
        device: where the network and its example go.
        dtype: type that both are converted to; float32 where None.

    Raises:
        FileNotFoundError, ValueError: there is no such source, it cannot be read or called, the weights do
            not fit, or the input's shape is missing; one line with what to do.
    """
    shapes = None if input_shape is None else parse_input(input_shape)
    random = False
    model, known, fits = _opened(source, device)
    if weights is not None:
        if not fits:
            raise ValueError(f"{source} brings its own weights: leave --weights out")
        model = _with_weights(model, Path(weights))
    else:
        random = fits
    shapes = shapes or known
    if shapes is None:
        raise ValueError(f"{source} does not say what it takes: give --input, such as 1x3x224x224")
    if batch is not None:
        shapes = tuple((batch, *shape[1:]) for shape in shapes)
    inputs = random_inputs(shapes, device, dtype)
    if not isinstance(model, AcceleratedModel):
        _place(model, source, device, dtype)
    return Network(source, model, inputs, random)


def _place(model: nn.Module, source: str, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Put a network of somebody's on a device, in eval mode; ValueError if it does not go there."""
    try:
        model.to(device, dtype)
        model.eval()
    except Exception as error:  # foreign code
        raise ValueError(f"{source} cannot run on {device}: {one_line(error)}") from error


Opened = tuple[nn.Module, tuple[tuple[int, ...], ...] | None, bool]


def _opened(source: str, device: torch.device | str) -> Opened:
    """Return the model, the shapes of its inputs if they are known, and whether it wants weights."""
    if source in SHIPPED:
        return _saved(load_network(pretrained_path(source)))  # type: ignore[arg-type]
    path = Path(source)
    if path.is_dir():
        for name in ("lhc.safetensors", "network.safetensors"):
            if (path / name).exists():
                return _opened(str(path / name), device)
        raise ValueError(f"{source}: is no finished run of `lhc-triton train`, it lacks lhc.safetensors")
    if path.exists():
        return _from_file(path, device)
    if is_factory(source):
        return call_factory(source), None, True
    found = _from_zoo(source)
    if found is not None:
        return found, None, True
    if path.suffix or os.sep in source:
        raise FileNotFoundError(f"{printable(source)}: there is no such file; {HOW}")
    raise FileNotFoundError(f"no network {printable(source)!r} is known; {HOW}")


def _with_weights(model: nn.Module, weights: Path) -> nn.Module:
    """Load a state_dict, or what `train` wrote of this network, which may have learned its topology."""
    document = read_state(weights)[1] if weights.suffix not in TORCH_FILES else None
    if document is not None and f'"kind": "{WEIGHTS_KIND}"' in document:
        return load_network(weights, lambda: model).model
    fit_weights(model, read_weights(weights), weights)
    return model


def _saved(saved: SavedNetwork) -> Opened:
    made = saved.architecture
    return saved.model, ((1, made.in_channels, made.image_size, made.image_size),), False


def _from_file(path: Path, device: torch.device | str) -> Opened:
    if path.suffix == ".pt2":
        model, shapes = read_exported(path)
        return model, shapes, False
    if path.suffix in TORCH_FILES:
        raise ValueError(
            f"{path}: a torch file does not say which network it is for (and a pickled one is not read):"
            f" give package.module:factory --weights {path.name}"
        )
    if is_artifact(path):
        fast = load(path, device=device)
        return fast, tuple(shape for shape, _ in fast.record.inputs), False
    tensors, document = read_state(path)
    if document is None:
        raise ValueError(
            f"{path}: holds {len(tensors)} tensors, and does not say of which network: give"
            f" package.module:factory --weights {path.name}"
        )
    return _saved(load_network(path))


def _from_zoo(name: str) -> nn.Module | None:
    """Return torchvision's or timm's model of that name with random weights; None if it may be another.

    Raises:
        ValueError: the library that it names is not installed, does not import, or has no such model.
        FileNotFoundError: it could only be a model of a library that does not import.
    """
    library, _, own = name.rpartition("/")
    if library not in ("", *ZOOS) or not re.fullmatch(r"[A-Za-z0-9_.-]+", own) or not own.strip("."):
        return None
    broken = []
    for zoo in ZOOS if not library else (library,):
        if find_spec(zoo) is None:
            if library:
                raise ValueError(f"{name}: {zoo} is not installed")
            continue
        try:
            maker = importlib.import_module(ZOOS[zoo])
        except Exception as error:
            # torchvision's wheel does not import beside torch of another build, nor does timm without it.
            broken.append(f"{zoo} does not import here ({one_line(error)}): install the one for this torch")
            continue
        try:
            made = _made(zoo, maker, own)
        except Exception as error:  # foreign code
            raise ValueError(f"{zoo} cannot make {own!r}: {one_line(error)}") from error
        if made is not None:
            return made
    if library:
        raise ValueError(f"{name}: {broken[0] if broken else f'{library} has no model {printable(own)!r}'}")
    if broken and not Path(name).suffix:
        raise FileNotFoundError(f"no network {printable(name)!r} is known, and {broken[0]}; {HOW}")
    return None


def _made(zoo: str, library: Any, name: str) -> nn.Module | None:
    if zoo == "timm":
        return library.create_model(name, pretrained=False) if library.is_model(name) else None
    if name not in library.list_models():
        return None
    weights = {"weights": None, "weights_backbone": None}  # a backbone's would be downloaded
    known = inspect.signature(library.get_model_builder(name)).parameters
    return library.get_model(name, **{key: value for key, value in weights.items() if key in known})
