"""Plans as JSON, and back: what comes from outside is checked before it is believed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from lhc_triton.files import parse_json

from .backends import runs
from .cost import ITEMSIZES
from .grouping import TILE_WIDTHS, candidate_widths
from .schema import ConvGeometry, LayerPlan, LayerTopology, OtherWork, Tile

PLAN_VERSION = 1

# Limits of what is read, far above any real network, so that a small file cannot ask for much memory.
MAX_SIZE = 2**24  # channels, images, pixels of a side
MAX_CELLS = 2**28  # filter groups x entries of a layer: the bytes of its block mask
MAX_PAIRS = 2**24  # live (filter group, entry) pairs of all layers, over which packing loops
MAX_STEP = 2**12  # stride, dilation and border, in pixels
MAX_TEXT = 2**28  # characters
MAX_US = 1e18
MAX_WORK = 2**60  # calls, multiply-accumulates and bytes beside the layers
MAX_NAME = 1000
MAX_REASON = 2**16


def plan_to_data(
    layers: Sequence[LayerPlan],
    skipped: Sequence[tuple[str, str]],
    device: str,
    dtype: str,
    others: Sequence[OtherWork] = (),
) -> dict[str, Any]:
    """Return the parts of a plan as what JSON can hold."""
    return {
        "version": PLAN_VERSION,
        "device": device,
        "dtype": dtype,
        "skipped": [list(pair) for pair in skipped],
        "layers": [_layer_document(layer) for layer in layers],
        "others": [asdict(work) for work in others],
    }


def _layer_document(layer: LayerPlan) -> dict[str, Any]:
    topology, geometry = layer.topology, layer.topology.geometry
    sizes = ("batch", "in_channels", "out_channels", "height", "width")
    return {
        "name": topology.name,
        "geometry": {
            **{name: getattr(geometry, name) for name in sizes},
            **{name: list(getattr(geometry, name)) for name in ("kernel", "stride", "padding", "dilation")},
        },
        "in_block": topology.in_block,
        "out_block": topology.out_block,
        "patterns": [list(pattern) for pattern in topology.patterns],
        "group_pattern": list(topology.group_pattern),
        "tiles": [{"groups": list(tile.groups), "entries": list(tile.entries)} for tile in layer.tiles],
        "tile_width": layer.tile_width,
        "backend": layer.backend,
        "reason": layer.reason,
        "predicted_us": dict(layer.predicted_us),
    }


def parse_plan(text: str) -> Any:
    """Return what a plan's JSON text holds, not yet checked; ValueError or TypeError if it is none."""
    if not isinstance(text, str):
        raise TypeError(f"the plan is a {type(text).__name__}: give the text that Plan.to_json() returned")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the plan has {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"the plan is not JSON: {error}") from None


def plan_from_data(
    document: Any,
) -> tuple[tuple[LayerPlan, ...], tuple[tuple[str, str], ...], str, str, tuple[OtherWork, ...]]:
    """Read what `plan_to_data` returned; ValueError naming the layer and what is wrong with it."""
    fields = _object(document, "the plan")
    if type(fields.get("version")) is not int or fields["version"] != PLAN_VERSION:
        raise ValueError(
            f"the plan has version {_short(fields.get('version'))}; this package reads {PLAN_VERSION}"
        )
    skipped = []
    for pair in _list(fields, "skipped", "the plan"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("the plan: skipped must hold pairs of name and reason")
        skipped.append(
            (_text(pair[0], "the plan: a skipped name"), _text(pair[1], "the plan: a reason", MAX_REASON))
        )
    layers = tuple(_layer(item, place) for place, item in enumerate(_list(fields, "layers", "the plan")))
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise ValueError("the plan holds two layers of one name")
    pairs = sum(_pairs(layer.topology) for layer in layers)
    if pairs > MAX_PAIRS:
        raise ValueError(f"the plan has {pairs} live blocks; up to {MAX_PAIRS} are read")
    device = _text(fields.get("device"), "the plan: device")
    dtype = _one_of(fields.get("dtype"), "the plan: dtype", tuple(ITEMSIZES))
    others: tuple[OtherWork, ...] = ()
    if "others" in fields:  # files of version 1 may lack it
        others = tuple(_other(item) for item in _list(fields, "others", "the plan"))
    return layers, tuple(skipped), device, dtype, others


def _other(item: Any) -> OtherWork:
    where = "the plan: other work"
    fields = _object(item, where)
    kind = _text(fields.get("kind"), f"{where}: kind")
    calls, macs, moved = (
        _whole(fields.get(key), f"{where}: {key}", 0, MAX_WORK) for key in ("calls", "macs", "moved_bytes")
    )
    return OtherWork(kind, calls, macs, moved, _time(fields.get("predicted_us"), f"{where}: predicted_us"))


def _layer(item: Any, place: int) -> LayerPlan:
    fields = _object(item, f"layer {place} of the plan")
    name = _text(fields.get("name"), f"layer {place} of the plan: name")
    where = f"layer {_short(name)} of the plan"
    geometry = _geometry(_object(fields.get("geometry"), f"{where}: geometry"), where)
    in_block, out_block, tile_width = (
        _whole(fields.get(key), f"{where}: {key}", 1) for key in ("in_block", "out_block", "tile_width")
    )
    groups = math.ceil(geometry.out_channels / out_block)
    entries = geometry.taps * math.ceil(geometry.in_channels / in_block)
    if groups * entries > MAX_CELLS:
        raise ValueError(
            f"{where}: {groups} filter groups of {entries} entries are more than {MAX_CELLS} blocks"
        )
    patterns = tuple(
        _ascending(pattern, f"{where}: a pattern", entries) for pattern in _list(fields, "patterns", where)
    )
    group_pattern = tuple(
        _whole(index, f"{where}: group_pattern", 0, len(patterns) - 1)
        for index in _list(fields, "group_pattern", where)
    )
    if len(group_pattern) != groups:
        raise ValueError(
            f"{where}: group_pattern has {len(group_pattern)} items, {groups} filter groups need one"
        )
    if len(set(patterns)) < len(patterns) or set(group_pattern) != set(range(len(patterns))):
        raise ValueError(f"{where}: the patterns must differ, and each one be used")
    topology = LayerTopology(name, geometry, in_block, out_block, patterns, group_pattern)
    widest = max(TILE_WIDTHS[-1], candidate_widths(out_block, geometry.out_channels)[-1])
    if tile_width > widest:
        raise ValueError(
            f"{where}: tile_width is {tile_width}; up to {widest} are used for blocks of {out_block} filters"
        )
    if _pairs(topology) > MAX_PAIRS:
        raise ValueError(f"{where}: {_pairs(topology)} live blocks; up to {MAX_PAIRS} are read")
    tiles = tuple(_tile(tile, topology, tile_width, where) for tile in _list(fields, "tiles", where))
    if sorted(g for tile in tiles for g in tile.groups) != list(range(groups)):
        raise ValueError(f"{where}: the tiles must hold each of the {groups} filter groups once")
    predicted = _object(fields.get("predicted_us"), f"{where}: predicted_us")
    times = {
        _text(key, f"{where}: a backend's name"): _time(value, f"{where}: predicted_us of {_short(key)}")
        for key, value in predicted.items()
    }
    backend = _one_of(fields.get("backend"), f"{where}: backend", runs())
    reason = _text(fields.get("reason"), f"{where}: reason", MAX_REASON)
    return LayerPlan(topology, tiles, tile_width, backend, reason, times)


def _pairs(topology: LayerTopology) -> int:
    """Count the live (filter group, entry) pairs, without going over them."""
    shared = Counter(topology.group_pattern)
    return sum(groups * len(topology.patterns[pattern]) for pattern, groups in shared.items())


def _geometry(fields: dict[str, Any], where: str) -> ConvGeometry:
    sizes: dict[str, Any] = {
        key: _whole(fields.get(key), f"{where}: {key}", 1)
        for key in ("batch", "in_channels", "out_channels", "height", "width")
    }
    lists: dict[str, Any] = {}
    for key, length, low, high in (
        ("kernel", 2, 1, MAX_SIZE),
        ("stride", 2, 1, MAX_STEP),
        ("padding", 4, 0, MAX_STEP),
        ("dilation", 2, 1, MAX_STEP),
    ):
        values = _list(fields, key, where)
        if len(values) != length:
            raise ValueError(f"{where}: {key} has {len(values)} items, {length} are needed")
        lists[key] = tuple(_whole(value, f"{where}: {key}", low, high) for value in values)
    geometry = ConvGeometry(**sizes, **lists)
    if geometry.out_height < 1 or geometry.out_width < 1:
        raise ValueError(f"{where}: the kernel does not fit into the padded image")
    return geometry


def _tile(item: Any, topology: LayerTopology, tile_width: int, where: str) -> Tile:
    fields = _object(item, f"{where}: a tile")
    groups = _ascending(fields.get("groups"), f"{where}: a tile's groups", topology.groups)
    entries = _ascending(fields.get("entries"), f"{where}: a tile's entries", topology.entries)
    if not groups:
        raise ValueError(f"{where}: a tile has no filter group")
    filters = sum(len(topology.group_filters(group)) for group in groups)
    if filters > tile_width:
        raise ValueError(f"{where}: a tile has {filters} filters and a width of {tile_width}")
    held = set(entries)
    used: set[int] = set()
    # Groups of one pattern are looked at once: a small file can name one long pattern a million times.
    first_of = {topology.group_pattern[group]: group for group in reversed(groups)}
    for index, group in first_of.items():
        if not held.issuperset(topology.patterns[index]):
            raise ValueError(f"{where}: a tile lacks entries of its filter group {group}")
        used.update(topology.patterns[index])
    if len(used) < len(held):
        raise ValueError(f"{where}: a tile has entries that none of its filter groups has")
    return Tile(groups, entries)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(value).__name__}")
    return value


def _list(fields: dict[str, Any], key: str, where: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key} must be a list, not {type(value).__name__}")
    return value


def _text(value: Any, where: str, longest: int = MAX_NAME) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"{where} must be a text of at most {longest} characters")
    return value


def _one_of(value: Any, where: str, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{where} is {_short(value)}; one of {', '.join(known)} is needed")
    return value


def _short(value: Any) -> str:
    """Return a value as one short piece of text, for a message."""
    if isinstance(value, str):
        return ascii(value[:60])[:60]
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    return ascii(value)[:60] if isinstance(value, int | float | None) else type(value).__name__


def _whole(value: Any, where: str, low: int, high: int = MAX_SIZE) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{where} is {_short(value)}; a whole number from {low} to {high} is needed")
    return value


def _ascending(value: Any, where: str, below: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, not {type(value).__name__}")
    numbers = tuple(_whole(number, where, 0, below - 1) for number in value)
    if any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(f"{where} must rise: {list(numbers[:8])}")
    return numbers


def _time(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= MAX_US:
        raise ValueError(f"{where} is {_short(value)}; a time in us is needed")
    return float(value)
