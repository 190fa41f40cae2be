"""Which launch config a layer gets: what was measured here, what ships with the package, or plain rules.

The order is the user's store, then the device's table in lhc_triton/tables/, then the heuristic of
lhc_kernels. Looking up never measures and never waits for the device; `layer_tuner` measures. With
LHC_TRITON_DETERMINISTIC=1 in the environment, or tune="off", the heuristic alone decides, so that no file on
the machine changes which code runs.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.timing_store import Measured, TimingStore, device_name, package_version
from lhc_triton.tf32 import tf32_allowed

if TYPE_CHECKING:
    from lhc_kernels import KernelConfig, LaunchShape

TABLES = Path(__file__).resolve().parents[2] / "tables"
DETERMINISTIC = "LHC_TRITON_DETERMINISTIC"

Pair = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """A layer's launch config, and where it comes from.

    Attributes:
        config: ``KernelConfig.to_list()``, what the op's ``config`` argument takes.
        source: "store", "table" or "heuristic".
        time_us: measured; None for the heuristic.
    """

    config: tuple[int, ...]
    source: str
    time_us: float | None = None


def precision(dtype: str) -> str:
    """Return a config's precision: of float32 products TF32 where torch's own convolutions may use it."""
    return "tf32" if dtype == "float32" and tf32_allowed() else "ieee"


def deterministic() -> bool:
    """Return whether LHC_TRITON_DETERMINISTIC=1 rules measured choices out."""
    return os.environ.get(DETERMINISTIC) == "1"


def pixel_bucket(pixels: int) -> int:
    """Return the bucket of a number of output pixels: the smallest power of two that holds them.

    Found by comparisons, so that under torch.compile a dynamic batch is guarded by its bucket alone.
    """
    bucket = 1
    while bucket < pixels:
        bucket *= 2
    return bucket


def launch_shape(
    layer: LayerPlan, dtype: torch.dtype, device: torch.device, bucket: int, out_size: Pair
) -> LaunchShape:
    """Return what lhc_kernels chooses a config for.

    Args:
        layer: the plan.
        dtype: of the activations.
        device: of the activations; asked for its properties only.
        bucket: output pixels over the batch, rounded up by `pixel_bucket`.
        out_size: (OH, OW), before pooling.
    """
    # Imported here and below, so that importing lhc_triton loads no kernels.
    from lhc_kernels import LaunchShape, device_limits

    geometry = layer.topology.geometry
    return LaunchShape(
        pixels=bucket,
        in_channels=geometry.in_channels,
        in_block=layer.topology.in_block,
        tile_width=layer.tile_width,
        tiles=len(layer.tiles),
        kernel=geometry.kernel,
        dtype=_name(dtype),
        entries=sum(len(tile.entries) for tile in layer.tiles),
        stride=geometry.stride,
        out_size=out_size,
        residual=False,  # a layer is tuned without one, and its config serves both
        **device_limits(device),
    )


class KeyParts(NamedTuple):
    """The parts of a `config_key`, as it spells them."""

    device: str
    kernels: str
    triton: str
    dtype: str
    convolution: str
    tiles: str
    pixels: str

    @property
    def tile_width(self) -> int:
        """Filters that a tile has room for; 0 where the text does not say."""
        found = re.search(r"tiles of (\d{1,6})\b", self.tiles)
        return int(found[1]) if found else 0


def key_parts(key: str) -> KeyParts | None:
    """Read what `config_key` wrote; None for another key, such as a choice of backend."""
    parts = key.split(" | ")
    return KeyParts(*parts) if len(parts) == len(KeyParts._fields) else None


def config_key(layer: LayerPlan, dtype: torch.dtype, device: torch.device, bucket: int) -> str:
    """Name what a config was measured for: hardware, kernels, and the sizes that decide between configs.

    Layers that differ only in which entries live share a key: their number counts, rounded up to a power of
    two per tile. The parts, between " | ": device, kernels, Triton, dtype, convolution, tiles, pixels.
    """
    from lhc_kernels import source_digest

    topology = layer.topology
    g = topology.geometry
    longest = max((len(tile.entries) for tile in layer.tiles), default=0)
    mean = -(-sum(len(tile.entries) for tile in layer.tiles) // max(1, len(layer.tiles)))
    parts = KeyParts(
        device_name(device),
        f"kernels {source_digest()}",
        f"triton {package_version('triton')}",
        _name(dtype),
        f"{g.in_channels}->{g.out_channels} {_by(g.kernel)}"
        f" stride {_by(g.stride)} dilation {_by(g.dilation)}",
        f"{len(layer.tiles)} tiles of {layer.tile_width}, in_block {topology.in_block}, "
        f"entries {pixel_bucket(mean)} to {pixel_bucket(longest)}",
        f"{bucket} pixels",
    )
    return " | ".join(parts)


def planned(layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> tuple[str, LaunchShape]:
    """Return the key of a layer's records at its planned sizes, and what its configs are chosen for."""
    geometry = layer.topology.geometry
    bucket = pixel_bucket(geometry.out_pixels)
    size = (geometry.out_height, geometry.out_width)
    return config_key(layer, dtype, device, bucket), launch_shape(layer, dtype, device, bucket, size)


def launch_key(config: Sequence[int]) -> str:
    """Name what else a time of the Triton backend depends on: its kernels and the config."""
    from lhc_kernels import source_digest

    return f"kernels {source_digest()}, config {config_name(config)}"


def config_name(config: Sequence[int]) -> str:
    """Return the name of a config in the store: its integers, comma-separated."""
    return ",".join(map(str, config))


def config_of(name: str) -> KernelConfig | None:
    """Read what `config_name` wrote; None for anything else."""
    from lhc_kernels import KernelConfig

    try:
        return KernelConfig.from_list([int(part) for part in name.split(",")])
    except ValueError:
        return None


def fastest(records: Mapping[str, Measured], shape: LaunchShape) -> tuple[KernelConfig, float] | None:
    """Return the fastest measured config that can serve a shape, and its time in us; None without one.

    Names that are no config, failed ones, and configs of another precision are passed over.
    """
    from lhc_kernels import config_problem

    best, wanted = None, precision(shape.dtype)
    for name, record in records.items():
        if isinstance(record, str) or (best is not None and record >= best[1]):
            continue
        config = config_of(name)
        if config is None or config.precision != wanted or config_problem(config, shape) is not None:
            continue
        best = config, record
    return best


def look_up(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device,
    pixels: int,
    out_size: Pair,
    *,
    tune: str = "cached",
    store: TimingStore | None = None,
    tables: Path = TABLES,
) -> Found:
    """Return a layer's launch config; measures nothing.

    Args:
        layer: the plan.
        dtype: of the activations.
        device: of the activations.
        pixels: output pixels over the batch, N * OH * OW; its bucket decides.
        out_size: (OH, OW), before pooling.
        tune: "off" takes the heuristic, as LHC_TRITON_DETERMINISTIC=1 does; "cached" and "full" what was
            measured, where there is something.
        store: the user's measurements; default `timing_store.default_path()`.
        tables: folder of the tables that ship with the package, one for each device.
    """
    from lhc_kernels import heuristic_config

    bucket = pixel_bucket(pixels)
    shape = launch_shape(layer, dtype, device, bucket, out_size)
    if tune != "off" and not deterministic():
        key = config_key(layer, dtype, device, bucket)
        best = fastest((store or TimingStore()).get(key), shape)
        if best is not None:
            return Found(tuple(best[0].to_list()), "store", best[1])
        best = fastest(_table(table_path(tables, device_name(device))).get(key, {}), shape)
        if best is not None:
            return Found(tuple(best[0].to_list()), "table", best[1])
    return Found(tuple(heuristic_config(shape, precision(shape.dtype)).to_list()), "heuristic")


def table_path(tables: Path, device: str) -> Path:
    """Return where the table of a device lies, by the device's name; a copy of a store made there."""
    return tables / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.lru_cache(maxsize=8)
def _table(path: Path) -> Mapping[str, Mapping[str, Measured]]:
    # Part of the installation, so it is read once; the user's store may change at any time.
    return TimingStore(path).read()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by(sizes: Pair) -> str:
    return f"{sizes[0]}x{sizes[1]}"
