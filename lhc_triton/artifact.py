"""save() and load(): an accelerated network in one safetensors file.

The file holds the tensors, in its header one JSON document (format version, plan, how the network was
accelerated, and its graph as a list of operations out of a closed list), and a digest of both. Nothing in it
is executed or unpickled; every name, size and shape is checked before a network is built from it, and what it
claims is bounded by what it holds.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.files import StrPath, parse_json, printable, write_beside
from lhc_triton.planning.network_plan import Plan
from lhc_triton.runtime.choosing.dispatch import passed_over
from lhc_triton.runtime.network.accelerated import AcceleratedModel
from lhc_triton.runtime.network.calling import settled
from lhc_triton.runtime.network.copying import drop_gradients
from lhc_triton.runtime.network.int8 import connect
from lhc_triton.runtime.network.record import Record
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.saved.arguments import GraphError, decode, encode
from lhc_triton.runtime.saved.graph_file import (
    FLOATS,
    build_graph,
    build_module,
    check_sizes,
    store_graph,
    store_module,
)
from lhc_triton.runtime.saved.growth import check_growth
from lhc_triton.runtime.saved.layers_file import (
    check_formats,
    check_outline,
    formats_of,
    into_model,
    outline,
    tensors_of,
    written,
)
from lhc_triton.runtime.saved.record_file import DTYPES, read_record, store_record
from lhc_triton.runtime.saved.retarget import check_device, retarget
from lhc_triton.runtime.saved.sealed_file import FileError, read_text, sealed, unsealed

FORMAT_VERSION = 2
_LONGEST = 500  # characters of a message, which may quote a file
_FIELDS = {
    "format_version",
    "lhc_version",
    "kind",
    "why",
    "device",
    "record",
    "plan",
    "modules",
    "nodes",
    "outline",
    "formats",
    "replays",
    "attributes",
}
Built = tuple[nn.Module | None, Plan, Record]


class ArtifactError(ValueError):
    """A file is no valid artefact, or does not fit what was asked of it; the message is one line."""


def save(fast: AcceleratedModel, path: StrPath) -> None:
    """Store an accelerated network in one safetensors file.

    Written beside the target, read back as ``load`` would, and then renamed: an interrupted save leaves the
    old file, and no file is left that ``load`` would refuse. A network whose graph holds what is not on the
    closed list is stored by its layers and tensors alone, with a warning: ``load`` then needs the model.

    Args:
        fast: what ``accelerate`` or ``load`` returned.
        path: the file to write, by custom ending in ".safetensors".

    Raises:
        TypeError: ``fast`` is no accelerated network.
        ArtifactError: it holds something that no file can; the message names it.
        OSError: the folder or the file cannot be written.
    """
    if not isinstance(fast, AcceleratedModel):
        raise TypeError(f"save() takes what accelerate() returned, not a {type(fast).__name__}")
    why = ""
    try:
        if not isinstance(fast.network, fx.GraphModule):
            raise GraphError("the model was not traced")
        nodes, modules = store_graph(fast.network)
        document = {**_document(fast, "graph"), "modules": modules, "nodes": nodes}
        return _write(path, document, dict(fast.network.state_dict()))
    except (GraphError, ArtifactError) as error:
        why = str(error)
    warnings.warn(f"the graph cannot be stored ({why}): load() will need model=", stacklevel=2)
    try:
        modules = {name: store_module(name, module) for name, module in fast.fused_layers().items()}
        document = {**_document(fast, "layers"), "why": printable(why, _LONGEST), "modules": modules}
        passing = written(fast.network, fast.record)
        document |= {"outline": outline(fast.network, passing), "formats": formats_of(fast.network)}
        return _write(path, document, tensors_of(fast.network, passing))
    except (GraphError, ArtifactError) as error:
        raise ArtifactError(f"the network cannot be saved: {error}") from error


def _document(fast: AcceleratedModel, kind: str) -> dict[str, Any]:
    from lhc_triton import __version__

    home = next((tensor.device for tensor in (*fast.parameters(), *fast.buffers())), torch.device("cpu"))
    return {
        "format_version": FORMAT_VERSION,
        "lhc_version": __version__,
        "kind": kind,
        "why": "",
        "device": home.type,
        "record": store_record(fast.record),
        "plan": fast.plan.to_data(),
        "modules": {},
        "nodes": None,
        "outline": None,
        "formats": None,
        "replays": _may_replay(fast),
        "attributes": _storable(fast.attributes),
    }


def _may_replay(fast: AcceleratedModel) -> bool:
    """Say whether recorded calls may stand for the network: its code may do what a replay would miss."""
    refused = any(replays is not None and replays.problem for replays in (fast.graphs, fast.tapes))
    return not refused and (fast.record.traced or fast.graphs is not None)


def _storable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that a file can hold; the others are not to be had from a loaded network."""
    kept = {}
    for name, value in attributes.items():
        try:
            stored = encode(value)
            if name.isidentifier() and decode(stored, {}) == value:
                kept[name] = stored
        except GraphError:
            continue
    return kept


def _attributes(stored: Mapping[str, Any]) -> dict[str, Any]:
    odd = next((name for name in stored if not name.isidentifier()), None)
    if odd is not None:
        raise ArtifactError(f"its attribute {printable(odd, 40)!r} is no name")
    return {name: decode(value, {}) for name, value in stored.items()}


def _write(path: StrPath, document: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a file that can be read again; GraphError or ArtifactError, and no file, where it could not."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise GraphError(f"{printable(name)!r} is a {type(tensor).__name__}, not a tensor")

    def check(written: Path) -> None:
        _rebuild(*_read(written, verify=True))

    try:
        text = json.dumps(document, allow_nan=False)
        write_beside(path, sealed(text, tensors), check)
    except OSError as error:
        if error.errno is None:  # ours, which says it all
            raise
        raise type(error)(
            error.errno,
            f"cannot write {os.fspath(path)}: {error.strerror or error}; choose a folder that exists and is "
            "writable",
        ) from None
    except ValueError as error:
        raise _told(error) from error


def is_artifact(path: StrPath) -> bool:
    """Return whether a file is one that ``save`` wrote, by its header alone; False if it cannot be read.

    Weights of training are safetensors files of this package, too.
    """
    try:
        document = parse_json(read_text(path) or "null")
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "format_version" in document


def load(
    path: StrPath,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    graphs: bool = True,
    verify: bool = True,
) -> AcceleratedModel:
    """Read what ``save`` stored.

    On the kind of device it was saved from, the network computes the same bits (on a GPU where it finds the
    same launch configs, which tuning may change and LHC_TRITON_DETERMINISTIC=1 pins). On another, or where a
    layer's backend is not available, the backend is chosen again, and ``report()`` tells the reason. The
    tensors are read into memory: the file may be replaced or deleted while the network runs.

    Args:
        path: the file.
        model: the model that was accelerated, or a fresh one of its class and settings; only needed, and then
            required, where its graph could not be stored. It is copied, and its weights do not matter: the
            file holds all of them. What else its modules keep (numbers, closures) has to be equal.
        device: where the network shall run.
        graphs: record calls and replay them; see ``accelerate``.
        verify: compare the file's digest with its content, which finds every damage; False reads on without.

    Warns:
        UserWarning: the device's fastest sparse kernel is missing here (no C++ compiler, for example).

    Raises:
        ArtifactError: the file is damaged, of another format version, or does not fit ``model``.
        FileNotFoundError, OSError: it cannot be read.
        ValueError: the device is not available, or the backend of a layer in int8 does not serve it there.
    """
    target = check_device(device)
    try:
        document, tensors = _read(path, verify)
        network, plan, record = _rebuild(document, tensors, model, needed=True)
        attributes = _attributes(document["attributes"])
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ArtifactError(f"{printable(os.fspath(path))}: {_told(error)}") from error
    # What fails from here on (memory, for example) is no fault of the file's.
    assert network is not None
    network, plan, record = retarget(network, plan, record, str(document["device"]), target)
    _warn_where_slow(network, plan, record, target)
    fixed = None if model is None else settled(model, len(record.inputs))
    fast = AcceleratedModel(network, plan, record, graphs and document["replays"], settled=fixed)
    fast.attributes = attributes
    return fast


def _warn_where_slow(network: nn.Module, plan: Plan, record: Record, device: torch.device) -> None:
    """Warn, as accelerate does, where the fastest sparse backend of a planned network is missing here."""
    if record.requested == "auto" and plan.layers:
        weight = next(
            (tensor for tensor in network.state_dict().values() if tensor.is_floating_point()), None
        )
        slower = None if weight is None else passed_over(weight.dtype, device)
        if slower is not None:
            warnings.warn(f"the fastest sparse kernel is left out: {slower}", stacklevel=3)


def _told(error: Exception) -> ArtifactError:
    """Return what is wrong with a file, in one line; the checks name what they find, this is for the rest."""
    if isinstance(error, ArtifactError | FileError | GraphError):
        return ArtifactError(printable(" ".join(str(error).split()), _LONGEST))
    return ArtifactError(f"damaged ({type(error).__name__}); save it again")


def _read(path: StrPath, verify: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return document and tensors of a file; ArtifactError or FileError if the file as such is not valid."""
    text, tensors = unsealed(path, verify)
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"its document is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise ArtifactError("its document is not a JSON object")
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"format version {printable(str(version), 20)} is not supported, this release reads "
            f"{FORMAT_VERSION}; save the network again, or use the release that wrote it"
        )
    if set(document) != _FIELDS or document["kind"] not in ("graph", "layers"):
        raise ArtifactError("its document has missing or unknown fields")
    kinds = {"modules": dict, "attributes": dict, "why": str, "device": str, "replays": bool}
    for key, kind in kinds.items():
        if not isinstance(document[key], kind):
            raise ArtifactError(f"its {key} are not valid: a {type(document[key]).__name__}")
    return document, tensors


def _rebuild(
    document: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None = None,
    needed: bool = False,
) -> Built:
    """Return the network on the CPU, its plan and its record; ArtifactError, among others, for damage.

    Without its model, a network that is stored by its layers is None; ``needed`` makes that an error.
    """
    try:
        plan = Plan.from_data(document["plan"])
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"its plan is not valid: {error}") from error
    check_sizes(plan, document["modules"], sum(tensor.numel() for tensor in tensors.values()))
    record = read_record(document["record"])
    layers = {layer.name: layer for layer in plan.layers}
    modules = {name: build_module(name, spec, layers) for name, spec in document["modules"].items()}
    own = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in modules}
    rest = {name: tensor for name, tensor in tensors.items() if name not in own}
    if document["kind"] == "graph":
        network = build_graph(document["nodes"], modules, rest)
        check_growth(network, [(shape, DTYPES[dtype]) for shape, dtype in record.inputs])
        _assign(network, tensors)
        drop_gradients(network)
        connect(network)
        return network, plan, record
    holder = nn.ModuleDict({str(index): module for index, module in enumerate(modules.values())})
    places = {name: str(index) for index, name in enumerate(modules)}
    _assign(holder, {_moved(name, places): tensor for name, tensor in own.items()})
    lines, formats = check_outline(document["outline"]), check_formats(document["formats"])
    if model is None:
        if needed:
            raise ArtifactError(f"its graph could not be stored ({document['why']}); give load(..., model=)")
        return None, plan, record
    filled = into_model(model, record, modules, rest, lines, formats)
    connect(filled)
    return filled, plan, record


def _moved(name: str, places: Mapping[str, str]) -> str:
    module, _, key = name.rpartition(".")
    return f"{places[module]}.{key}"


def _assign(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network on the meta device its tensors, if they fit in name, shape and type."""
    expected = network.state_dict()
    odd = sorted(set(expected) ^ set(tensors))
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        names = ", ".join(printable(name, 80) for name in odd[:3])
        raise ArtifactError(f"tensors are missing or unknown: {names}{more}")
    modules = dict(network.named_modules())
    for name, wanted in expected.items():
        tensor = tensors[name]
        if tensor.shape != wanted.shape:
            raise ArtifactError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, its module needs {tuple(wanted.shape)}"
            )
        strict = isinstance(modules.get(name.rpartition(".")[0]), FusedConv2d)
        same = tensor.dtype == wanted.dtype
        floats = wanted.is_floating_point() and tensor.dtype in FLOATS.values()
        if not same and (strict or not floats):
            raise ArtifactError(f"tensor {name!r} is {tensor.dtype}, its module needs {wanted.dtype}")
    expected.update(tensors)  # it also says, by its versions, that no tensor of older releases is to be added
    network.load_state_dict(expected, strict=True, assign=True)
