"""How a network was accelerated, read back from a file: every field checked before it is believed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lhc_triton.files import printable
from lhc_triton.planning.backends import requests, runs
from lhc_triton.runtime.network.record import LayerRow, Record
from lhc_triton.runtime.network.sites import Site
from lhc_triton.runtime.op.epilogue import ACTIVATIONS, POOLS
from lhc_triton.runtime.saved.arguments import GraphError

MAX_FIGURE = 1e18  # of MACs, microseconds and the like
MAX_NAME = 1000
MAX_NOTE = 2**16
MAX_LIST = 100_000
MAX_SIDE = 2**31
DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_figure(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= MAX_FIGURE  # neither NaN nor infinity: report() is JSON for machines


def _is_count(value: Any) -> bool:
    return _is_figure(value) and isinstance(value, int)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_note(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NOTE


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= MAX_LIST and all(map(check, value))


def _one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(choice) and value == choice for choice in known)


def _is_input(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], list):
        return False
    sizes, dtype = value
    return isinstance(dtype, str) and dtype in DTYPES and len(sizes) <= 16 and all(map(_is_side, sizes))


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < MAX_SIDE


_RECORD: Mapping[str, Callable[[Any], bool]] = {
    "model": _is_name,
    "requested": lambda value: isinstance(value, str) and value in requests(),
    "traced": _one_of(True, False),
    "sites": _is_list_of(lambda value: True),
    "rows": _is_list_of(lambda value: True),
    "inputs": _is_list_of(_is_input),
    "output_error": _is_figure,
    "notes": _is_list_of(_is_note),
}
_SITE: Mapping[str, Callable[[Any], bool]] = {
    "layer": _is_name,
    "module": _is_name,
    "norm": _or_none(_is_name),
    "activation": _one_of(*ACTIVATIONS),
    "pool": _one_of(*POOLS),
    "nodes": _is_list_of(_is_name),
    "add": _or_none(_is_name),
    "residual": _one_of(0, 1),
}
_ROW: Mapping[str, Callable[[Any], bool]] = {
    "layer": _is_name,
    "backend": lambda value: isinstance(value, str) and value in runs(),
    "density": lambda value: _is_figure(value) and value <= 1,
    "patterns": _or_none(_is_count),
    "tiles": _or_none(_is_count),
    "tile_width": _or_none(_is_count),
    "macs": _is_count,
    "live_macs": _is_count,
    "planned_macs": _is_count,
    "predicted_us": _or_none(_is_figure),
    "measured_us": _or_none(_is_figure),
    "reason": _is_note,
    "rel_err": _or_none(_is_figure),
    "epilogue": _is_name,
    "dtype": _or_none(lambda value: isinstance(value, str) and value in DTYPES),
}


def store_record(record: Record) -> dict[str, Any]:
    """Return a record as plain data; an error that is infinite or no number as the largest figure."""
    values = dataclasses.asdict(record)
    for row in values["rows"]:
        if row["rel_err"] is not None:
            row["rel_err"] = _finite(row["rel_err"])
    values["output_error"] = _finite(values["output_error"])
    return values


def _finite(value: float) -> float:
    return value if math.isfinite(value) else MAX_FIGURE


def read_record(data: Any) -> Record:
    """Read what ``store_record`` returned.

    Notes and reasons are for people: what a terminal could not show in them is escaped.

    Raises:
        GraphError: a field is missing, unknown, of another type or out of bounds.
    """
    values = _checked(data, "record", _RECORD, Record)
    sites = []
    for item in values["sites"]:
        fields = _checked(item, "site of its record", _SITE, Site)
        sites.append(Site(**{**fields, "nodes": tuple(fields["nodes"])}))
    rows = []
    for item in values["rows"]:
        if isinstance(item, dict):
            item = {"dtype": None, **item}  # older files do not tell
        fields = _checked(item, "row of its record", _ROW, LayerRow)
        rows.append(LayerRow(**{**fields, "reason": printable(fields["reason"], MAX_NOTE)}))
    read = {
        "sites": tuple(sites),
        "rows": tuple(rows),
        "inputs": tuple((tuple(sizes), dtype) for sizes, dtype in values["inputs"]),
        "output_error": float(values["output_error"]),
        "notes": tuple(printable(note, MAX_NOTE) for note in values["notes"]),
    }
    return Record(**{**values, **read})


def _checked(data: Any, what: str, fields: Mapping[str, Callable[[Any], bool]], kind: type) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != {field.name for field in dataclasses.fields(kind)}:
        raise GraphError(f"its {kind.__name__} has missing or unknown fields")
    for name, value in data.items():
        check = fields.get(name)
        if check is None or not check(value):
            raise GraphError(f"a {what} has an invalid {name}")
    return data
