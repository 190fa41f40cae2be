"""Whole networks: the dense one in its fastest forms, and the same with random masks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

import lhc_triton as lhc
from lhc_bench.measure.cases import IMAGE_SIZE
from lhc_bench.measure.engines import ENGINES
from lhc_bench.measure.masks import random_mask
from lhc_bench.measure.memory import tensors_mb, transient_mb
from lhc_bench.measure.peers import compiled_or_reason, layouts, reset_compiler
from lhc_bench.measure.replayed import reason_of
from lhc_bench.measure.setting import LIMITS, Call, Contender, Setting, Sparse
from lhc_triton.conversion import Summary, SummaryRow, lhc_layers
from lhc_triton.models.resnet import WIDTHS, BasicBlock, Bottleneck, ResNet
from lhc_triton.models.vgg import CLASSES, VGG, VGG16_WIDTHS, Images
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.network.quantising import TOLERANCE as INT8_TOLERANCE
from lhc_triton.runtime.op.accuracy import norm_error
from lhc_triton.runtime.op.backends import unavailable

ERROR_FACTOR = 10  # errors of layers add up
CHANNEL_STEP = 8
SETTLING_IMAGES = 8
CHECKED_IMAGES = 4
"""Of a GPU's batch, that are compared with float64."""


@dataclass(frozen=True)
class NetworkCase:
    """One network with its input.

    Attributes:
        network: "vgg16", "resnet34" or "resnet50".
        images: "imagenet" (224x224) or "cifar" (32x32).
        batch: images of a call.
        part: "all", or "features" for VGG16's convolutional part.
        threads: how many a CPU uses; None: as many as torch does.
    """

    network: str
    images: Images
    batch: int
    part: str = "all"
    threads: int | None = None

    @property
    def model(self) -> str:
        """Network and images, for example "vgg16-imagenet"."""
        return f"{self.network}-{self.images}"

    @property
    def name(self) -> str:
        """For people, with batch and threads."""
        plural = "" if self.threads == 1 else "s"
        threads = "" if self.threads is None else f", {self.threads} thread{plural}"
        return f"{self.model}/{self.part}, batch {self.batch}{threads}"

    def build(self, scale: float = 1.0) -> nn.Module:
        """Build the network in eval mode, the number of channels of its layers scaled in steps of 8.

        Raises:
            ValueError: the network, its images or its part is not known.
        """
        if self.images not in get_args(Images):
            raise ValueError(f"images={self.images!r} is not one of {', '.join(get_args(Images))}")

        def scaled(width: int) -> int:
            return max(CHANNEL_STEP, round(width * scale / CHANNEL_STEP) * CHANNEL_STEP)

        if self.network == "vgg16":
            widths = [width if width == "M" else scaled(width) for width in VGG16_WIDTHS]
            model: nn.Module = VGG(widths, 3, CLASSES[self.images], self.images)
        elif self.network in ("resnet34", "resnet50"):
            block = BasicBlock if self.network == "resnet34" else Bottleneck
            stages = [scaled(width) for width in WIDTHS]
            model = ResNet(block, (3, 4, 6, 3), self.images, widths=stages)
        else:
            raise ValueError(f"network={self.network!r} is not one of vgg16, resnet34, resnet50")
        if self.part == "all":
            return model.eval()
        if self.part == "features" and isinstance(model, VGG):
            return model.features.eval()
        raise ValueError(f"part={self.part!r} of {self.network} is not known; VGG16 has all and features")

    def image(self, batch: int, setting: Setting) -> Tensor:
        """Draw random images [batch, 3, H, W]."""
        side = IMAGE_SIZE[self.images]
        generator = torch.Generator().manual_seed(setting.seed)
        return torch.randn(batch, 3, side, side, generator=generator).to(setting.device, setting.dtype)


@dataclass(frozen=True)
class NetworkSubject:
    """A network with its dense peers; see `setting.Subject`."""

    case: NetworkCase
    dense: nn.Module
    x: Tensor
    peers: Mapping[str, Call]
    skipped: Mapping[str, str]
    out_channels: int
    memory_mb: float | None
    kernel: int = field(default=0, init=False)
    stride: int = field(default=0, init=False)

    @classmethod
    def prepare(cls, case: NetworkCase, setting: Setting) -> NetworkSubject:
        """Draw weights and images, and build the dense peers.

        They are the network with its batch norm folded, recorded like the sparse ones on the CPU, and in each
        memory format as it is (on the CPU) and compiled with frozen weights. CUDA graphs are not theirs but
        those of the measurement, so nobody copies inputs or outputs.
        """
        dense = _drawn(case, setting)
        x = case.image(case.batch, setting)
        if setting.device == "cuda":  # the format of every network here: nobody has to convert its input
            x = x.contiguous(memory_format=torch.channels_last)
        model = copy.deepcopy(dense).to(setting.device, setting.dtype)
        folded = accelerate(model, x, tune=setting.tune, backend="dense", graphs=setting.device != "cuda")
        memory = _memory_mb(folded, x, setting.device)
        peers: dict[str, Call] = {"folded eager": _bound(folded, x)}
        skipped: dict[str, str] = {}
        if setting.compiled:
            reset_compiler()
        for name, layout in layouts(setting.device).items():
            laid = x.contiguous(memory_format=layout)
            model = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
            if setting.device == "cpu":
                peers[f"eager {name}"] = _bound(model, laid)
            if not setting.compiled:
                continue
            compiled, reason = compiled_or_reason(model, laid)
            if compiled is None:
                skipped[f"compiled {name}"] = reason or ""
            else:
                peers[f"compiled {name}"] = _bound(compiled, laid)
        with torch.inference_mode():
            classes = model(x[:1]).shape[1]
        return cls(case, dense, x, peers, skipped, classes, memory)

    @property
    def model(self) -> str:
        """Network and images."""
        return self.case.model

    @property
    def layer(self) -> str:
        """The part that runs: "all" or "features"."""
        return self.case.part

    @property
    def limit(self) -> float:
        """Norm error above which a result is wrong."""
        return ERROR_FACTOR * LIMITS[self.x.dtype]

    def under(self, block: tuple[int, int], density: float, setting: Setting) -> Sparse:
        """Put random masks on all but the first convolution, and accelerate for each backend.

        The rival "narrow" is the dense network with its channels scaled to about the same MACs, folded;
        "int8" is the masked network with its layers in int8. Other engines get the masked network itself.
        """
        sparse = self._masked(block, density, setting)
        expected = self._expected(sparse, setting)
        counts = lhc.summary(sparse, tuple(self.x.shape[1:]))
        images = self.x.shape[0]
        contenders: dict[str, Contender] = {}
        left_out: dict[str, str] = {}
        ways: dict[str, dict[str, Any]] = {}
        for backend in setting.backends:
            reason = None if backend == "auto" else unavailable(backend, setting.dtype, setting.device)
            if reason is not None:
                left_out[backend] = reason
                continue
            ways[backend] = {"backend": backend}
        if "int8" in setting.rivals:
            ways["int8"] = {"dtype": "int8"}
        for name, way in ways.items():
            try:
                fast = accelerate(sparse, self.x, tune=setting.tune, graphs=setting.device != "cuda", **way)
            except Exception as error:  # a forced backend may not serve every layer, or not compile
                left_out[name] = reason_of(error)
                continue
            contender = self._contender(fast, expected, counts.total.live_macs * images)
            contenders[name] = replace(contender, limit=INT8_TOLERANCE) if name == "int8" else contender
        if "narrow" in setting.rivals and density < 1:
            contenders["narrow"] = self._narrow(counts.total, setting)
        names = [name for name in setting.rivals if name in ENGINES]
        if setting.engines is not None and names:
            loaded = setting.engines.load(sparse, self.x, names, torch.get_num_threads())
            left_out |= loaded.left_out
            for name, run in loaded.runs.items():
                if (found := loaded.outputs[name]).shape != expected.shape:
                    left_out[name] = f"output {tuple(found.shape)} in place of {tuple(expected.shape)}"
                    continue
                contenders[name] = Contender(
                    {"engine": run}, norm_error(found, expected), counts.total.live_macs * images
                )
        parts = _parts(counts, self.x, expected)
        return Sparse(contenders, counts.converted.density, parts, left_out, self.memory_mb)

    def _expected(self, model: nn.Module, setting: Setting) -> Tensor:
        """Return a network's output in float64, on a GPU of the first images only and without a search.

        cuDNN would look for the fastest of its float64 convolutions, which takes minutes for a whole batch.
        """
        x = self.x[:CHECKED_IMAGES] if setting.device == "cuda" else self.x
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False):
            y: Tensor = copy.deepcopy(model).double()(x.double())
            return y

    def _masked(self, block: tuple[int, int], density: float, setting: Setting) -> nn.Module:
        in_block, out_block = block
        config = lhc.LHCConfig(density=density, in_block=in_block, out_block=out_block)
        sparse = lhc.convert(copy.deepcopy(self.dense), config).eval()
        for index, layer in enumerate(lhc_layers(sparse).values()):
            kh, kw = layer.kernel_size
            mask = random_mask(
                layer.out_channels, layer.in_channels, (kh, kw), density, in_block, out_block,
                seed=setting.seed + index,
            )  # fmt: skip
            layer.set_topology(torch.from_numpy(mask))
        return _settled(sparse, self.case, setting).to(setting.dtype)

    def _contender(self, fast: nn.Module, expected: Tensor, macs: int) -> Contender:
        with torch.inference_mode():
            error = norm_error(fast(self.x)[: len(expected)], expected)
        memory = _memory_mb(fast, self.x, self.x.device.type)
        return Contender({"network": _bound(fast, self.x)}, error, macs, memory)

    def _narrow(self, total: SummaryRow, setting: Setting) -> Contender:
        model = _drawn(self.case, setting, math.sqrt(total.live_macs / total.macs))
        model = model.to(setting.device, setting.dtype)
        macs = lhc.summary(model, tuple(self.x.shape[1:])).total.macs * self.x.shape[0]
        expected = self._expected(model, setting)
        fast = accelerate(model, self.x, tune=setting.tune, backend="dense", graphs=setting.device != "cuda")
        return self._contender(fast, expected, macs)


def _drawn(case: NetworkCase, setting: Setting, scale: float = 1.0) -> nn.Module:
    """Build the network with random weights and fitting batch norm, in float32 on the CPU."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(setting.seed)
        return _settled(case.build(scale), case, setting).cpu()


def _settled(model: nn.Module, case: NetworkCase, setting: Setting) -> nn.Module:
    """Give batch norm the statistics of random images, so that activations keep their size to the end.

    Returns the model in float32 on the setting's device.
    """
    model = model.to(setting.device, torch.float32)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches: of this one
        norm.train()
    with torch.no_grad():
        model(case.image(SETTLING_IMAGES, setting).float())
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()
    return model


def _bound(model: nn.Module, x: Tensor) -> Call:
    return lambda: model(x)


def _memory_mb(model: nn.Module, x: Tensor, device: str) -> float | None:
    """Return 1e6 bytes of weights and tables, and of what a call holds at its most."""
    transient = transient_mb(lambda: model(x), device)
    return None if transient is None else tensors_mb(model) + transient


def _parts(counts: Summary, x: Tensor, y: Tensor) -> tuple[tuple[int, int], ...]:
    """Return (MACs, bytes) of the convolutions and of the linear layers, which run after them."""
    found = []
    for linear in (False, True):
        rows = [row for row in counts.rows if (row.kind == "linear") == linear]
        values = sum(row.live_weights for row in rows) + (y if linear else x)[0].numel() * x.shape[0]
        found.append((sum(row.live_macs for row in rows) * x.shape[0], values * x.element_size()))
    return tuple(found)
