"""Weights from elsewhere: state_dicts in safetensors files, or in torch files that hold tensors only."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.files import open_regular, printable
from lhc_triton.models.weights import read_state

TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
# Under which names training scripts keep the state_dict in a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "net", "network")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a torch file that holds nothing but tensors.

    Of a torch file's checkpoint the state_dict is taken, under one of its usual names. Prefixes that wrappers
    put before every name ("module.", "_orig_mod.", "model.") are kept: `fit_weights` sees whether they are
    too many. Masks of torch.nn.utils.prune are applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or a torch file with something other than tensors, numbers and text:
            such a one runs code when it is read.
    """
    path = Path(path)
    if path.suffix not in TORCH_FILES:
        return _unmasked(read_state(path)[0])
    open_regular(path).close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds pickled objects, which run code when they are read, and is refused; where you"
            " trust it, write its tensors once with safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # a damaged file can lead torch's reader to any exception
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: is no intact torch file ({line})") from error
    state = _state_of(content)
    if state is None:
        raise ValueError(
            f"{path}: holds no state_dict (a dict of tensors, or one under 'state_dict' or 'model')"
        )
    return _unmasked(state)


def _state_of(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    for name in _NESTED:
        if isinstance(content.get(name), Mapping):
            return _state_of(content[name])
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return state or None


def _unmasked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply masks that lie beside weights: X_orig and X_mask (torch.nn.utils.prune)."""
    plain = dict(state)
    for name in state:
        base = name.removesuffix("_orig")
        if base != name and f"{base}_mask" in state and base not in state:
            mask = plain.pop(f"{base}_mask")
            weight = plain.pop(name)
            if mask.shape != weight.shape:
                raise ValueError(
                    f"{printable(base)}_mask has shape {tuple(mask.shape)}, {tuple(weight.shape)} needed"
                )
            plain[base] = weight * mask
    return plain


def fit_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load tensors into a model, every name and shape checked; counters of batch norms may be missing.

    A mask "X_mask" or "X.mask" of a weight's shape beside a weight that the model has is applied to it.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or holds integers or complex numbers where
            the model has real ones; the first of each is named.
    """
    expected = model.state_dict()
    given = _unprefixed(tensors, expected)
    for name in [name for name in given if name not in expected]:
        owner, _, leaf = name.rpartition(".")
        base = {"mask": f"{owner}.weight", "weight_mask": f"{owner}.weight"}.get(leaf, "")
        if base in given and given[base].shape == given[name].shape:
            given[base] = given[base] * given.pop(name)
    missing = [n for n in expected if n not in given and not n.endswith(".num_batches_tracked")]
    unexpected = [name for name in given if name not in expected]
    problems = [
        f"{what} {printable(names[0], 100)}{f' and {len(names) - 1} more' if names[1:] else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if not problems:
        problems = [
            f"{printable(name, 100)} is {tuple(given[name].shape)}, the network's {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in given and given[name].shape != tensor.shape
        ][:1]
    if not problems:
        problems = [
            f"{printable(name, 100)} is {given[name].dtype}, the network's {tensor.dtype}"
            for name, tensor in expected.items()
            if name in given and _kind(given[name]) != _kind(tensor)
        ][:1]
    if problems:
        raise ValueError(f"{path}: its weights do not fit {type(model).__name__}: {', '.join(problems)}")
    model.load_state_dict(given, strict=False)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _unprefixed(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefixes of wrappers as long as they are on every name and the model has none such."""
    given = dict(tensors)
    for _ in _PREFIXES:
        for prefix in _PREFIXES:
            on_all = all(name.startswith(prefix) for name in given)
            if given and on_all and not any(name.startswith(prefix) for name in expected):
                given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given
