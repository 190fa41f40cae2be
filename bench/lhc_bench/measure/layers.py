"""Single layers: a convolution with bias and ReLU, its dense peers, and its sparse form under a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lhc_triton.runtime.op.grouped_conv2d  # noqa: F401  (registers torch.ops.lhc)
from lhc_bench.measure.cases import LayerCase
from lhc_bench.measure.masks import expand, random_mask
from lhc_bench.measure.peers import dense_peers
from lhc_bench.measure.replayed import reason_of
from lhc_bench.measure.rivals import SEMI_STRUCTURED_DENSITY, block_sparse, narrow, semi_structured
from lhc_bench.measure.setting import LIMITS, Call, Contender, Setting, Sparse
from lhc_bench.measure.tuning_suite import tiles_of_groups
from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.planner import plan_layer
from lhc_triton.planning.schema import ConvGeometry, LayerPlan, LayerTopology
from lhc_triton.runtime.choosing.dispatch import choose_backend, launch_config, supports
from lhc_triton.runtime.choosing.launch_configs import launch_shape, pixel_bucket
from lhc_triton.runtime.op.accuracy import norm_error
from lhc_triton.runtime.op.dense import DenseConv2d
from lhc_triton.runtime.op.packing import pack
from lhc_triton.tf32 import tf32_allowed

SHARED = "shared"
CANDIDATES = 48  # launch configs among which a variant's best is looked for
CHECKED_VALUES = 1 << 22  # of an output with more values than this, the first image is checked


@dataclass(frozen=True)
class LayerSubject:
    """One layer with its data and dense peers; see `setting.Subject`."""

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
        accelerated network runs it; "triton box" is the kernel's variant of that name, with its most
        promising launch config; in "triton shared" each group of filters is a tile of its own. The rivals
        keep about as much work: "narrow" at any density below 1, "bsr" with the same mask, "2:4" at density
        0.5.
        """
        geometry, (in_block, out_block) = self.geometry, block
        channels = (geometry.out_channels, geometry.in_channels)
        mask = random_mask(*channels, geometry.kernel, density, in_block, out_block, seed=setting.seed)
        topology = LayerTopology.from_mask(self.case.name, geometry, in_block, out_block, mask)
        live = torch.from_numpy(expand(mask, *channels, in_block, out_block)).to(self.weight.device)
        weight = self.weight * live
        expected = self._expected(weight)
        makers: dict[str, Callable[[], Contender]] = {
            name: partial(self._backend, name, topology, weight, expected, setting)
            for name in setting.backends
        }
        rivals: dict[str, Callable[[], Contender]] = {
            "narrow": partial(narrow, geometry, self.x, density),
            "bsr": partial(
                block_sparse, geometry, self.x, weight, self.bias, block, expected, topology.live_macs
            ),
            "2:4": partial(semi_structured, geometry, self.x, self.weight, self.bias),
        }
        if density < 1:
            makers |= {
                name: rivals[name]
                for name in setting.rivals
                if name != "2:4" or density == SEMI_STRUCTURED_DENSITY
            }
        found: dict[str, Contender] = {}
        unavailable: dict[str, str] = {}
        for name, make in makers.items():
            try:
                found[name] = make()
            # Compilers and torch's youngest code refuse devices, types and sizes in their own ways.
            except Exception as error:
                unavailable[name] = reason_of(error)
        moved = geometry.in_values + geometry.out_values + topology.live_weights
        parts = ((topology.live_macs, moved * self.x.element_size()),)
        return Sparse(found, topology.density, parts, unavailable)

    def _backend(
        self, name: str, topology: LayerTopology, weight: Tensor, expected: Tensor, setting: Setting
    ) -> Contender:
        """Plan and pack the layer for a backend; ValueError where it cannot serve it."""
        backend, _, variant = name.partition(" ")
        device = self.x.device
        cost = CostModel.for_device(setting.device, backend, tf32_allowed())
        plan = plan_layer(topology, cost, backend=backend, dtype=setting.dtype_name)
        if variant == SHARED:
            plan, variant = tiles_of_groups(topology, backend), ""
        if backend == "auto":
            backend = choose_backend(plan, setting.dtype, device, setting.tune, setting.store).backend
        reason = supports(backend, plan, setting.dtype, device)
        if reason is not None:
            raise ValueError(reason)
        if backend == "dense":
            forms = {"dense": self._dense_call(weight)}
        else:
            config: Sequence[int] = ()
            if variant:
                config = variant_config(plan, setting.dtype, device, variant)
            elif backend == "triton":
                config = launch_config(plan, setting.dtype, device, store=setting.store)
            packed = pack(plan, self.weight, self.x.dtype, device, backend)
            forms = {backend: self._call(backend, packed.weight, packed.tables, config)}
        error = max(self._error(call, expected) for call in forms.values())
        return Contender(forms, error, topology.live_macs)

    def _call(
        self, backend: str, weight: Tensor, tables: list[Tensor], config: Sequence[int]
    ) -> Callable[[], Tensor]:
        geometry, bias, codes = self.geometry, self.bias, list(config)
        x = self.x.contiguous(memory_format=torch.channels_last)

        def call() -> Tensor:
            y: Tensor = torch.ops.lhc.grouped_conv2d(
                x, weight, tables, bias, None, None, geometry.out_channels, geometry.kernel,
                geometry.stride, geometry.padding, geometry.dilation, "relu", "none", backend, codes,
            )  # fmt: skip
            return y

        return call

    def _dense_call(self, weight: Tensor) -> Callable[[], Tensor]:
        """Return the dense convolution as an accelerated network runs it."""
        geometry = self.geometry
        conv = DenseConv2d(
            weight,
            self.bias,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            activation="relu",
        )
        return partial(conv, self.x.contiguous(memory_format=torch.channels_last))

    def _expected(self, weight: Tensor) -> Tensor:
        geometry = self.geometry
        x = self.x if geometry.out_values <= CHECKED_VALUES else self.x[:1]
        padding = (geometry.padding[0], geometry.padding[2])
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False):
            return F.conv2d(
                x.double(), weight.double(), self.bias.double(), geometry.stride, padding, geometry.dilation
            ).relu_()

    def _error(self, call: Callable[[], Tensor], expected: Tensor) -> float:
        with torch.inference_mode():
            return norm_error(call()[: len(expected)], expected)


def variant_config(
    plan: LayerPlan, dtype: torch.dtype, device: torch.device, variant: str
) -> tuple[int, ...]:
    """Return the launch config of a Triton kernel's variant that its cost sheet ranks first.

    Raises:
        ValueError: no config of the variant can serve the layer.
    """
    from lhc_kernels import candidate_configs

    geometry = plan.topology.geometry
    bucket, out_size = pixel_bucket(geometry.out_pixels), (geometry.out_height, geometry.out_width)
    candidates = candidate_configs(launch_shape(plan, dtype, device, bucket, out_size), CANDIDATES)
    for config in candidates:
        if config.variant == variant:
            return tuple(config.to_list())
    raise ValueError(f"none of {len(candidates)} candidate configs is of the variant {variant!r}")


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
