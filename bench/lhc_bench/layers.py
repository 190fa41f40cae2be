"""Single layers: a convolution with bias and ReLU, its dense peers, and its sparse form under a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lhc_triton.runtime.ops  # noqa: F401  (registers torch.ops.lhc)
from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.plan import ConvGeometry, LayerPlan, LayerTopology
from lhc_triton.planning.planner import plan_layer
from lhc_triton.runtime.dispatch import choose_backend, launch_config, supports
from lhc_triton.runtime.packing import pack

from .cases import LayerCase
from .masks import expand, random_mask
from .measure import LIMITS, Call, Contender, Setting, Sparse
from .peers import LAYOUTS, dense_peers, layouts, norm_error
from .rivals import SEMI_STRUCTURED_DENSITY, block_sparse, narrow, semi_structured

CHECKED_VALUES = 1 << 22  # of an output with more values than this, the first image is checked


@dataclass(frozen=True)
class LayerSubject:
    """One layer with its data and dense peers; see `measure.Subject`."""

    case: LayerCase
    geometry: ConvGeometry
    x: Tensor
    weight: Tensor
    bias: Tensor
    peers: Mapping[str, Call]
    skipped: Mapping[str, str]

    @classmethod
    def prepare(cls, case: LayerCase, batch: int, setting: Setting) -> LayerSubject:
        """Draw input, weight and bias, and build the dense peers (compiled ones take seconds)."""
        geometry = case.geometry(batch)
        x, weight, bias = _layer_data(geometry, setting)
        peers, skipped = dense_peers(geometry, x, weight, bias, compiled=setting.compiled)
        return cls(case, geometry, x, weight, bias, peers, skipped)

    @property
    def model(self) -> str:
        """The network's name."""
        return self.case.model

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.case.layer

    @property
    def out_channels(self) -> int:
        """Filters."""
        return self.case.out_channels

    @property
    def kernel(self) -> int:
        """Side of the kernel."""
        return self.case.kernel

    @property
    def stride(self) -> int:
        """Step in both directions."""
        return self.case.stride

    @property
    def limit(self) -> float:
        """Norm error above which a result is wrong."""
        return LIMITS[self.x.dtype]

    def under(self, block: tuple[int, int], density: float, setting: Setting) -> Sparse:
        """Draw a mask, plan and pack the layer for each backend, and check each against float64.

        "auto" is what dispatch takes for its plan: a sparse backend, or the dense convolution as an
        accelerated network runs it. The rivals keep about as much work: "narrow" at any
        density below 1, "bsr" with the same mask, "2:4" at density 0.5.
        """
        geometry, (in_block, out_block) = self.geometry, block
        channels = (geometry.out_channels, geometry.in_channels)
        mask = random_mask(*channels, geometry.kernel, density, in_block, out_block, seed=setting.seed)
        topology = LayerTopology.from_mask(self.case.name, geometry, in_block, out_block, mask)
        live = torch.from_numpy(expand(mask, *channels, in_block, out_block)).to(self.weight.device)
        expected = self._expected(self.weight * live)
        found: dict[str, Contender] = {}
        unavailable: dict[str, str] = {}
        for backend in setting.backends:
            plan = plan_layer(
                topology, CostModel.for_device(setting.device), backend=backend, dtype=setting.dtype_name
            )
            taken = backend
            if backend == "auto":
                taken = choose_backend(
                    plan, setting.dtype, setting.device, setting.tune, setting.store
                ).backend
            reason = supports(taken, plan, setting.dtype, setting.device)
            if reason is not None:
                unavailable[backend] = reason
                continue
            forms = self._forms(taken, plan, live, setting)
            error = max(self._error(call, expected) for call in forms.values())
            found[backend] = Contender(forms, error, topology.live_macs)
        for rival in setting.rivals:
            contender = self._rival(rival, block, density, topology, live, expected)
            if isinstance(contender, str):
                unavailable[rival] = contender
            elif contender is not None:
                found[rival] = contender
        moved = geometry.in_values + geometry.out_values + topology.live_weights
        parts = ((topology.live_macs, moved * self.x.element_size()),)
        return Sparse(found, topology.density, parts, unavailable)

    def _forms(self, backend: str, plan: LayerPlan, live: Tensor, setting: Setting) -> dict[str, Call]:
        if backend == "dense":
            return dense_peers(self.geometry, self.x, self.weight * live, self.bias)[0]
        packed = pack(plan, self.weight, self.x.dtype, self.x.device, backend)
        config: Sequence[int] = ()
        if backend == "triton":
            config = launch_config(plan, setting.dtype, self.x.device, store=setting.store)
        return {
            name: self._call(backend, name, packed.weight, packed.tables, config)
            for name in layouts(self.x.device.type)
        }

    def _rival(
        self,
        name: str,
        block: tuple[int, int],
        density: float,
        topology: LayerTopology,
        live: Tensor,
        expected: Tensor,
    ) -> Contender | str | None:
        """Return a rival, or why it does not run here, or None where it does not apply."""
        geometry, x, weight, bias = self.geometry, self.x, self.weight, self.bias
        if density == 1 or (name == "2:4" and density != SEMI_STRUCTURED_DENSITY):
            return None
        try:
            if name == "narrow":
                return narrow(geometry, x, density)
            if name == "2:4":
                return semi_structured(geometry, x, weight, bias)
            return block_sparse(geometry, x, weight * live, bias, block, expected, topology.live_macs)
        # They lean on torch's youngest code, which refuses devices, types and sizes in its own ways.
        except Exception as error:
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"

    def _call(
        self, backend: str, layout: str, weight: Tensor, tables: list[Tensor], config: Sequence[int]
    ) -> Callable[[], Tensor]:
        geometry, bias, codes = self.geometry, self.bias, list(config)
        x = self.x.contiguous(memory_format=LAYOUTS[layout])

        def call() -> Tensor:
            y: Tensor = torch.ops.lhc.grouped_conv2d(
                x, weight, tables, bias, None, None, geometry.out_channels, geometry.kernel,
                geometry.stride, geometry.padding, geometry.dilation, "relu", "none", layout, backend, codes,
            )  # fmt: skip
            return y

        return call

    def _expected(self, weight: Tensor) -> Tensor:
        geometry = self.geometry
        x = self.x if geometry.out_values <= CHECKED_VALUES else self.x[:1]
        padding = (geometry.padding[0], geometry.padding[2])
        with torch.inference_mode():
            return F.conv2d(
                x.double(), weight.double(), self.bias.double(), geometry.stride, padding, geometry.dilation
            ).relu_()

    def _error(self, call: Callable[[], Tensor], expected: Tensor) -> float:
        with torch.inference_mode():
            return norm_error(call()[: len(expected)], expected)


def _layer_data(geometry: ConvGeometry, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(setting.seed)
    images = (geometry.batch, geometry.in_channels, geometry.height, geometry.width)
    x = torch.randn(images, generator=generator)
    kh, kw = geometry.kernel
    weight = torch.randn(geometry.out_channels, geometry.in_channels, kh, kw, generator=generator)
    weight /= (geometry.in_channels * kh * kw) ** 0.5
    bias = torch.randn(geometry.out_channels, generator=generator)
    x, weight, bias = (tensor.to(setting.device, setting.dtype) for tensor in (x, weight, bias))
    return x, weight, bias
