"""save() and load(): an accelerated network in one safetensors file.

The file holds the tensors, and in its header one JSON document: format version, plan, how the network was
accelerated, and its graph as a list of operations out of a closed list. Nothing in it is executed or
unpickled; every name, size and shape is checked before a network is built from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, fx, nn

from lhc_triton.planning.schema import Plan
from lhc_triton.runtime.accelerated import AcceleratedModel, LayerRow, Record
from lhc_triton.runtime.checks import working_copy
from lhc_triton.runtime.epilogue import NETWORK_LAYOUTS
from lhc_triton.runtime.fusion import swapped
from lhc_triton.runtime.graph import Site, find_sites, rewrite
from lhc_triton.runtime.modules import FusedConv2d
from lhc_triton.runtime.opset import GraphError
from lhc_triton.runtime.retarget import check_device, retarget
from lhc_triton.runtime.stored import build_graph, build_module, store_graph, store_module
from lhc_triton.runtime.tracing import TraceError, record_shapes, trace

FORMAT_VERSION = 1
MAX_DOCUMENT = 512 * 2**20
_KEY = "lhc_triton"
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_FIELDS = {
    "format_version",
    "lhc_version",
    "kind",
    "why",
    "dtype",
    "device",
    "record",
    "plan",
    "modules",
    "nodes",
}


class ArtifactError(ValueError):
    """A file is no valid artefact, or does not fit what was asked of it; the message is one line."""


def save(fast: AcceleratedModel, path: str | os.PathLike[str]) -> None:
    """Store an accelerated network in one safetensors file.

    Written beside the target and then renamed, so an interrupted save leaves the old file. A network whose
    graph holds an operation that is not on the closed list is stored by its accelerated layers alone, with a
    warning: ``load`` then needs the model.

    Args:
        fast: what ``accelerate`` or ``load`` returned.
        path: the file to write, by custom ending in ".safetensors".

    Raises:
        TypeError: ``fast`` is no accelerated network.
        OSError: the folder or the file cannot be written.
    """
    import warnings

    from lhc_triton import __version__

    if not isinstance(fast, AcceleratedModel):
        raise TypeError(f"save() takes what accelerate() returned, not a {type(fast).__name__}")
    tensor = next(t for m in (fast.fused_layers().values() or [fast]) for t in m.state_dict().values())
    dtype = str(tensor.dtype).removeprefix("torch.")
    nodes: list[dict[str, Any]] | None = None
    why = ""
    try:
        if not isinstance(fast.network, fx.GraphModule):
            raise GraphError("the model was not traced")
        nodes, modules = store_graph(fast.network)
        tensors = dict(fast.network.state_dict())
        plan_layers = {layer.name: layer for layer in fast.plan.layers}
        built = {name: build_module(name, spec, plan_layers, tensor.dtype) for name, spec in modules.items()}
        build_graph(json.loads(json.dumps(nodes)), built, tensors)
    except GraphError as error:
        why, nodes = str(error), None
        warnings.warn(f"the graph cannot be stored ({why}): load() will need model=", stacklevel=2)
        fused = fast.fused_layers()
        modules = {name: store_module(name, module) for name, module in fused.items()}
        tensors = {f"{name}.{key}": t for name, m in fused.items() for key, t in m.state_dict().items()}
    document = {
        "format_version": FORMAT_VERSION,
        "lhc_version": __version__,
        "kind": "layers" if nodes is None else "graph",
        "why": why,
        "dtype": dtype,
        "device": tensor.device.type,
        "record": dataclasses.asdict(fast.record),
        "plan": json.loads(fast.plan.to_json()),
        "modules": modules,
        "nodes": nodes,
    }
    # safetensors refuses tensors that share memory, as tied weights do
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    _write(Path(path), to_safetensors(plain, {_KEY: json.dumps(document)}))


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from None


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is one that ``save`` wrote, by its header alone; False if it cannot be read.

    Weights of training are safetensors files of this package, too.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get(_KEY, "null"))
    except (OSError, SafetensorError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "format_version" in document


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    graphs: bool = True,
) -> AcceleratedModel:
    """Read what ``save`` stored.

    On the kind of device it was saved from, the network computes the same bits (on a GPU where it finds the
    same launch configs, which tuning may change and LHC_TRITON_DETERMINISTIC=1 pins). On another, or where a
    layer's backend is not available, the backend is chosen again, and ``report()`` tells the reason.

    Args:
        path: the file.
        model: the model that was accelerated; only needed, and then required, where its graph could not be
            stored. It is copied.
        device: where the network shall run.
        graphs: record calls and replay them; see ``accelerate``.

    Raises:
        ArtifactError: the file is damaged, of another format version, or does not fit ``model``.
        FileNotFoundError, OSError: it cannot be read.
        ValueError: the device is not available.
    """
    target = check_device(device)
    try:
        document, tensors = _read(path)
        network, plan, record = _rebuild(document, tensors, model)
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from error.__cause__
    except GraphError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        # the checks above name what they find; this is for damage that none of them thought of
        raise ArtifactError(f"{os.fspath(path)}: damaged ({type(error).__name__}); save it again") from error
    # What fails from here on (memory, for example) is no fault of the file's.
    network, plan, record = retarget(network, plan, record, str(document["device"]), target)
    return AcceleratedModel(network, plan, record, graphs)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return document and tensors of a file; ArtifactError if the file as such is not valid."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ArtifactError("a safetensors file, but not one that lhc_triton.save() wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ArtifactError(f"truncated, damaged, or no safetensors file ({error}); save it again") from error
    if len(text) > MAX_DOCUMENT:
        raise ArtifactError(f"its document has {len(text)} characters, more than {MAX_DOCUMENT}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"its document is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise ArtifactError("its document is not a JSON object")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"format version {str(version)[:20]} is not supported, this release reads {FORMAT_VERSION}; "
            "save the network again, or use the release that wrote it"
        )
    if set(document) != _FIELDS or document["kind"] not in ("graph", "layers"):
        raise ArtifactError("its document has missing or unknown fields")
    if document["dtype"] not in list(_DTYPES) or not isinstance(document["modules"], dict):
        raise ArtifactError("its dtype or its modules are not valid")
    return document, tensors


def _rebuild(
    document: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module | None
) -> tuple[nn.Module, Plan, Record]:
    """Return the network on the CPU, its plan and its record; ArtifactError, among others, for damage."""
    try:
        plan = Plan.from_json(json.dumps(document["plan"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"its plan is not valid: {error}") from error
    record = _record(document["record"])
    dtype = _DTYPES[document["dtype"]]
    layers = {layer.name: layer for layer in plan.layers}
    modules = {name: build_module(name, spec, layers, dtype) for name, spec in document["modules"].items()}
    if document["kind"] == "graph":
        wanted = {name for name in tensors if not _belongs(name, modules)}
        network: nn.Module = build_graph(document["nodes"], modules, {name: tensors[name] for name in wanted})
        _assign(network, tensors, dtype)
    else:
        if model is None:
            raise ArtifactError(f"its graph could not be stored ({document['why']}); give load(..., model=)")
        holder = nn.ModuleDict({str(index): module for index, module in enumerate(modules.values())})
        places = {name: str(index) for index, name in enumerate(modules)}
        _assign(holder, {_moved(name, places): t for name, t in tensors.items()}, dtype)
        network = _into_model(model, record, modules)
    return network, plan, record


def _belongs(name: str, modules: Mapping[str, nn.Module]) -> bool:
    return name.rpartition(".")[0] in modules


def _moved(name: str, places: Mapping[str, str]) -> str:
    module, _, key = name.rpartition(".")
    return f"{places.get(module, module)}.{key}"


def _assign(network: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a network on the meta device its tensors, if they fit in name, shape and type."""
    expected = network.state_dict()
    odd = sorted(set(expected) ^ set(tensors))
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ArtifactError(f"tensors are missing or unknown: {', '.join(odd[:3])}{more}")
    modules = dict(network.named_modules())
    for name, wanted in expected.items():
        tensor = tensors[name]
        if tensor.shape != wanted.shape:
            raise ArtifactError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, its module needs {tuple(wanted.shape)}"
            )
        strict = isinstance(modules.get(name.rpartition(".")[0]), FusedConv2d)
        same = tensor.dtype == wanted.dtype
        floats = wanted.is_floating_point() and tensor.dtype in _DTYPES.values()
        if not same and (strict or not floats):
            raise ArtifactError(f"tensor {name!r} is {tensor.dtype}, its module needs {wanted.dtype}")
    network.load_state_dict(dict(tensors), strict=True, assign=True)


def _into_model(model: nn.Module, record: Record, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Put stored layers into a copy of the model they were made from."""
    if not isinstance(model, nn.Module):
        raise ArtifactError(
            f"model= is a {type(model).__name__}, expected the torch.nn.Module it was made of"
        )
    work = working_copy(model)
    named = dict(work.named_modules())
    for site in record.sites:
        conv, fused = named.get(site.layer), modules.get(site.module)
        if not isinstance(fused, FusedConv2d):
            raise ArtifactError(f"layer {site.module!r} is in its record, but not in its modules")
        if not isinstance(conv, nn.Conv2d) or (
            (conv.in_channels, conv.out_channels, tuple(conv.kernel_size), tuple(conv.stride), conv.groups)
            != (fused.in_channels, fused.out_channels, fused.kernel_size, fused.stride, fused.groups)
        ):
            raise ArtifactError(
                f"model= is another model: layer {site.layer!r} is missing or has other sizes"
            )
    stored = {site.module for site in record.sites}
    if stored != set(modules):
        raise ArtifactError("its record and its modules name different layers")
    if not record.traced:
        return swapped(work, modules)
    home = next(work.parameters()).device
    inputs = [torch.zeros(shape, dtype=getattr(torch, name), device=home) for shape, name in record.inputs]
    try:
        traced = trace(work, len(inputs))
        sites = find_sites(traced, record_shapes(traced, inputs)[0])
    except (TraceError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"model= is another model: {str(error).splitlines()[0]}") from error
    if sites != record.sites:
        raise ArtifactError("model= is another model: its convolutions are followed by other operations")
    return rewrite(traced, sites, modules)


def _record(data: Any) -> Record:
    """Read a record; ArtifactError where a field is missing or of another type."""
    values = _fields(data, Record)
    text = isinstance(values["model"], str) and values["layout"] in NETWORK_LAYOUTS
    if not text or not isinstance(values["requested"], str) or not isinstance(values["traced"], bool):
        raise ArtifactError("its record is not valid")
    if not all(isinstance(values[key], list) for key in ("sites", "rows", "inputs", "notes")):
        raise ArtifactError("its record is not valid")
    inputs = []
    for item in values["inputs"]:
        if not isinstance(item, list) or len(item) != 2 or item[1] not in _INPUT_TYPES:
            raise ArtifactError("its example inputs are not valid")
        if not isinstance(item[0], list) or not all(
            type(size) is int and 0 < size < 2**31 for size in item[0]
        ):
            raise ArtifactError("its example inputs are not valid")
        inputs.append((tuple(item[0]), item[1]))
    if type(values["output_error"]) not in (int, float):
        raise ArtifactError("its record is not valid")
    return Record(
        values["model"],
        values["requested"],
        values["traced"],
        values["layout"],
        tuple(_site(item) for item in values["sites"]),
        tuple(_row(item) for item in values["rows"]),
        tuple(inputs),
        float(values["output_error"]),
        tuple(str(note) for note in values["notes"]),
    )


_INPUT_TYPES = (*_DTYPES, "int64", "int32", "int16", "int8", "uint8", "bool")


def _site(data: Any) -> Site:
    values = _fields(data, Site)
    for key in ("norm", "add"):
        if values[key] is not None and not isinstance(values[key], str):
            raise ArtifactError(f"a site of its record has an invalid {key}")
    strings = [values[key] for key in ("layer", "module", "activation", "pool")]
    nodes = values["nodes"]
    if not isinstance(nodes, list) or not all(isinstance(text, str) for text in (*strings, *nodes)):
        raise ArtifactError("a site of its record is not valid")
    if values["residual"] not in (0, 1):
        raise ArtifactError("a site of its record is not valid")
    return Site(**{**values, "nodes": tuple(nodes)})


def _row(data: Any) -> LayerRow:
    values = _fields(data, LayerRow)
    for key, value in values.items():
        if key in ("layer", "backend", "reason", "epilogue"):
            valid = isinstance(value, str)
        elif key in ("density", "macs", "live_macs", "planned_macs"):
            valid = type(value) in (int, float)
        else:
            valid = value is None or type(value) in (int, float)
        if not valid:
            raise ArtifactError(f"a row of its record has an invalid {key}")
    return LayerRow(**values)


def _fields(data: Any, kind: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        raise ArtifactError(f"its {kind.__name__} has missing or unknown fields")
    return data
