"""One measurement: a layer or a network under a random mask, interleaved with its dense peers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lhc_triton as lhc
import lhc_triton.runtime.ops
from lhc_triton.conversion import lhc_layers
from lhc_triton.models import small_vgg
from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.plan import ConvGeometry, LayerTopology
from lhc_triton.planning.planner import plan_layer
from lhc_triton.runtime.accelerate import accelerate
from lhc_triton.runtime.packing import pack
from lhc_triton.runtime.timing import Timing

from .cases import LayerCase
from .masks import expand, random_mask
from .peers import compiled_or_reason, dense_peers, norm_error
from .rows import Row

Timer = Callable[..., dict[str, Timing]]
CHECKED_VALUES = 1 << 16  # an output above this many values is checked on its first image only
COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}
MODEL_NAME = "small_vgg"
MODEL_BATCH = {"cpu": 64, "cuda": 1024}
MODEL_IMAGE = 28


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share.

    Attributes:
        device: "cpu" or "cuda".
        dtype: compute type.
        backend: who runs the sparse layers.
        rounds: interleaved rounds of each timing.
        seed: of masks, weights and inputs.
        compiled: whether layers are also compared with torch.compile.
        timer: called as `time_paired`; another one in tests.
    """

    device: str
    dtype: torch.dtype
    backend: str
    rounds: int
    seed: int
    compiled: bool
    timer: Timer

    @property
    def dtype_name(self) -> str:
        """The compute type as rows and plans name it."""
        return str(self.dtype).removeprefix("torch.")

    def time(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """Time functions interleaved on the device."""
        return self.timer(calls, rounds=self.rounds, warmup=2, device=self.device)


@dataclass(frozen=True)
class Machine:
    """What the device reached in this run.

    Attributes:
        gmacs: 1e9 multiply-accumulates per second of a large matrix product.
        copy_gbs: 1e9 bytes per second of a large copy, bytes read and bytes written both counted.
    """

    gmacs: float
    copy_gbs: float

    def floor_us(self, macs: float, moved_bytes: float) -> float:
        """Return the least time of this much work: arithmetic or memory, whichever takes longer."""
        return max(macs / (self.gmacs * 1e3), moved_bytes / (self.copy_gbs * 1e3))


def measure_machine(setting: Setting) -> Machine:
    """Measure the rates behind `Row.floor_us`, by the fastest round of each."""
    side = MATRIX_SIDE[setting.device]
    a = torch.randn(side, side).to(setting.device, setting.dtype)
    product = torch.empty_like(a)
    size = COPY_BYTES[setting.device]
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    target = torch.zeros_like(source)
    times = setting.time(
        {"matrix": lambda: torch.mm(a, a, out=product), "copy": lambda: target.copy_(source)}
    )
    fastest = {name: min(timing.samples_us) for name, timing in times.items()}
    return Machine(side**3 / fastest["matrix"] / 1e3, 2 * size / fastest["copy"] / 1e3)


def measure_layer(
    case: LayerCase, batch: int, block: tuple[int, int], density: float, setting: Setting, machine: Machine
) -> tuple[Row, dict[str, str]]:
    """Measure one layer with bias and ReLU under a random mask.

    Args:
        case: the layer.
        batch: images.
        block: (in_block, out_block).
        density: wanted live share of the entries.
        setting: of the run.
        machine: its rates.

    Returns:
        The row, and the dense peers that were left out with the reason.
    """
    in_block, out_block = block
    geometry = case.geometry(batch)
    mask = random_mask(
        case.out_channels, case.in_channels, geometry.kernel, density, in_block, out_block, seed=setting.seed
    )
    topology = LayerTopology.from_mask(case.name, geometry, in_block, out_block, mask)
    x, weight, bias = _layer_data(geometry, setting)
    live = torch.from_numpy(expand(mask, case.out_channels, case.in_channels, *block)).to(weight.device)
    sparse = _sparse_call(topology, x, weight, bias, setting)
    peers, skipped = dense_peers(geometry, x, weight, bias, compiled=setting.compiled)
    times = setting.time({**peers, setting.backend: sparse})
    rel_err = _layer_error(geometry, sparse, x, weight * live, bias)
    moved = (geometry.in_values + geometry.out_values + topology.live_weights) * x.element_size()
    row = _row(
        (case.model, case.layer),
        x,
        setting,
        times,
        out_channels=case.out_channels,
        kernel=case.kernel,
        stride=case.stride,
        density=topology.density,
        block=block,
        floor_us=machine.floor_us(topology.live_macs, moved),
        rel_err=rel_err,
    )
    return row, skipped


def measure_model(
    batch: int, block: tuple[int, int], density: float, setting: Setting, machine: Machine
) -> tuple[Row, dict[str, str]]:
    """Measure `small_vgg` with random masks on all but its first convolution, against the dense network.

    The dense network is timed with its batch norm folded, and compiled where a compiler is there.

    Args and returns: as `measure_layer`.
    """
    in_block, out_block = block
    torch.manual_seed(setting.seed)
    dense = small_vgg().eval()
    config = lhc.LHCConfig(density=density, in_block=in_block, out_block=out_block)
    sparse = lhc.convert(copy.deepcopy(dense), config).eval()
    for index, layer in enumerate(lhc_layers(sparse).values()):
        mask = random_mask(
            layer.out_channels, layer.in_channels, (3, 3), density, in_block, out_block,
            seed=setting.seed + index,
        )  # fmt: skip
        layer.set_topology(torch.from_numpy(mask))
    image = torch.randn(1, 1, MODEL_IMAGE, MODEL_IMAGE)
    counts = lhc.summary(sparse, tuple(image.shape))
    with torch.no_grad():
        x = torch.randn(batch, 1, MODEL_IMAGE, MODEL_IMAGE).to(setting.device, setting.dtype)
        expected = copy.deepcopy(sparse).double().to(setting.device)(x.double())
    dense, sparse = (model.to(setting.device, setting.dtype) for model in (dense, sparse))
    fast = accelerate(sparse, x, tune="off", backend=setting.backend)
    peers: dict[str, nn.Module] = {"folded eager": accelerate(dense, x, tune="off", backend="dense")}
    compiled, reason = compiled_or_reason(dense, x)
    if compiled is not None:
        peers["compiled"] = compiled
    calls = {name: _bound(model, x) for name, model in {**peers, setting.backend: fast}.items()}
    times = setting.time(calls)
    with torch.inference_mode():
        rel_err = norm_error(fast(x), expected)
    values = x.numel() + expected.numel() + counts.total.live_weights
    row = _row(
        (MODEL_NAME, "all"),
        x,
        setting,
        times,
        out_channels=expected.shape[1],
        kernel=0,
        stride=0,
        density=counts.converted.density,
        block=block,
        floor_us=machine.floor_us(counts.total.live_macs * batch, values * x.element_size()),
        rel_err=rel_err,
    )
    return row, {} if reason is None else {"compiled": reason}


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


def _sparse_call(
    topology: LayerTopology, x: Tensor, weight: Tensor, bias: Tensor, setting: Setting
) -> Callable[[], Tensor]:
    cost = CostModel.for_device(setting.device)
    plan = plan_layer(topology, cost, backend=setting.backend, dtype=setting.dtype_name)
    packed = pack(plan, weight, x.dtype, x.device, setting.backend)
    geometry = topology.geometry
    layout = "channels_last" if setting.device == "cuda" else "contiguous"
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        y: Tensor = torch.ops.lhc.grouped_conv2d(
            x, packed.weight, packed.tables, bias, None, None, geometry.out_channels, geometry.kernel,
            geometry.stride, geometry.padding, geometry.dilation, "relu", "none", layout, setting.backend, [],
        )  # fmt: skip
        return y

    return call


def _layer_error(
    geometry: ConvGeometry, call: Callable[[], Tensor], x: Tensor, weight: Tensor, bias: Tensor
) -> float:
    with torch.inference_mode():
        found = call()
        if found.numel() > CHECKED_VALUES:
            found, x = found[:1], x[:1]
        padding = (geometry.padding[0], geometry.padding[2])
        expected = F.conv2d(
            x.double(), weight.double(), bias.double(), geometry.stride, padding, geometry.dilation
        ).relu_()
        return norm_error(found, expected)


def _row(
    names: tuple[str, str],
    x: Tensor,
    setting: Setting,
    times: Mapping[str, Timing],
    *,
    out_channels: int,
    kernel: int,
    stride: int,
    density: float,
    block: tuple[int, int],
    floor_us: float,
    rel_err: float,
) -> Row:
    """Put a row together; the baseline is the dense peer with the least median."""
    model, layer = names
    mine = times[setting.backend]
    baseline = min((n for n in times if n != setting.backend), key=lambda n: times[n].median_us)
    return Row(
        case=f"{model}/{layer}",
        model=model,
        layer=layer,
        device=setting.device,
        dtype=setting.dtype_name,
        batch=x.shape[0],
        in_channels=x.shape[1],
        out_channels=out_channels,
        kernel=kernel,
        stride=stride,
        height=x.shape[2],
        width=x.shape[3],
        density=density,
        in_block=block[0],
        out_block=block[1],
        backend=setting.backend,
        baseline=baseline,
        baseline_us=times[baseline].median_us,
        time_us=mine.median_us,
        p20_us=mine.p20_us,
        p80_us=mine.p80_us,
        speedup=times[baseline].median_us / mine.median_us,
        floor_us=floor_us,
        rel_err=rel_err,
        seed=setting.seed,
    )


def _bound(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: model(x)
