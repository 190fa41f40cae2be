"""A bench for the tuner whose times were written down beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from op_problems import Problem

from lhc_triton.planning.schema import ConvGeometry, LayerPlan
from lhc_triton.runtime.choosing.launch_configs import config_name, launch_shape, pixel_bucket

CPU = torch.device("cpu")
HALF = torch.float16


def layer_of(pixels: int = 64, in_channels: int = 64, density: float = 0.4) -> LayerPlan:
    """A planned 3x3 layer with that many output pixels (a multiple of 8)."""
    geometry = ConvGeometry(1, in_channels, 64, pixels // 8, 8)
    return Problem(geometry, in_block=32, out_block=16, density=density).layer


def names_of(layer: LayerPlan, limit: int = 12) -> list[str]:
    """The candidates of a layer by name, in order."""
    from lhc_kernels import candidate_configs

    geometry = layer.topology.geometry
    size = (geometry.out_height, geometry.out_width)
    shape = launch_shape(layer, HALF, CPU, pixel_bucket(geometry.out_pixels), size)
    return [config_name(c.to_list()) for c in candidate_configs(shape, limit)]


@dataclass
class Recorded:
    """Times by config name; an exception in their place is raised, when compiling or, in a list, at a sample.

    Attributes:
        times: of each config, microseconds, or a list of what its samples give, the last one again and again.
        other: the time of a config that is not named.
        prepared: names in the order in which they were compiled.
        samples: the number of samples taken of each.
        lost: whether the device answers no more.
        on_prepare: called with each name; for clocks.
    """

    times: Mapping[str, Any] = field(default_factory=dict)
    other: float = 100.0
    prepared: list[str] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)
    lost: bool = False
    on_prepare: Callable[[str], None] = lambda name: None

    def __call__(self, layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> Recorded:
        return self

    def prepare(self, config: Any) -> Callable[[], float]:
        name = config_name(config)
        self.prepared.append(name)
        self.on_prepare(name)
        given = self.times.get(name, self.other)
        if isinstance(given, Exception):
            raise given
        values = given if isinstance(given, list) else [given]

        def sample() -> float:
            taken = self.samples[name] = self.samples.get(name, 0) + 1
            value = values[min(taken, len(values)) - 1]
            if isinstance(value, Exception):
                raise value
            return float(value)

        return sample

    def check(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
