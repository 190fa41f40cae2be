"""Whole networks: the dense one in its fastest forms, and the same with random masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lhc_triton as lhc
from lhc_triton.conversion import lhc_layers
from lhc_triton.models import small_vgg
from lhc_triton.runtime.accelerate import accelerate
from lhc_triton.runtime.backends import unavailable

from .masks import random_mask
from .measure import LIMITS, Call, Setting, Sparse
from .peers import LAYOUTS, compiled_or_reason, norm_error, reset_compiler

MODEL_NAME = "small_vgg"
MODEL_BATCH = {"cpu": 64, "cuda": 1024}
MODEL_IMAGE = 28
ERROR_FACTOR = 10  # errors of layers add up


@dataclass(frozen=True)
class NetworkSubject:
    """`small_vgg` with its dense peers; see `measure.Subject`."""

    dense: nn.Module
    x: Tensor
    peers: Mapping[str, Call]
    skipped: Mapping[str, str]
    out_channels: int
    model: str = MODEL_NAME
    layer: str = "all"
    kernel: int = 0
    stride: int = 0

    @classmethod
    def prepare(cls, batch: int, setting: Setting) -> NetworkSubject:
        """Draw weights and images, and build the dense peers.

        They are the network with its batch norm folded, in the memory format that is faster here, and
        compiled with frozen weights in both formats.
        """
        generator_state = torch.get_rng_state()
        torch.manual_seed(setting.seed)
        dense = small_vgg().eval()
        x = torch.randn(batch, 1, MODEL_IMAGE, MODEL_IMAGE).to(setting.device, setting.dtype)
        torch.set_rng_state(generator_state)
        model = copy.deepcopy(dense).to(setting.device, setting.dtype)
        peers: dict[str, Call] = {
            "folded eager": _bound(accelerate(model, x, tune="full", backend="dense"), x)
        }
        skipped: dict[str, str] = {}
        if setting.compiled:
            reset_compiler()
        for name, layout in LAYOUTS.items() if setting.compiled else ():
            laid = x.contiguous(memory_format=layout)
            # One input channel has the same bytes in both formats; the weights' format decides.
            model = model.to(memory_format=layout)  # type: ignore[call-overload]
            compiled, reason = compiled_or_reason(model, laid)
            if compiled is None:
                skipped[f"compiled {name}"] = reason or ""
            else:
                peers[f"compiled {name}"] = _bound(compiled, laid)
        with torch.inference_mode():
            classes = model(x[:1]).shape[1]
        return cls(dense, x, peers, skipped, classes)

    @property
    def limit(self) -> float:
        """Norm error above which a result is wrong."""
        return ERROR_FACTOR * LIMITS[self.x.dtype]

    def under(self, block: tuple[int, int], density: float, setting: Setting) -> Sparse:
        """Put random masks on all but the first convolution, and accelerate for each backend."""
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
        counts = lhc.summary(sparse, (1, *self.x.shape[1:]))
        sparse = sparse.to(setting.device, setting.dtype)
        with torch.inference_mode():
            expected = copy.deepcopy(sparse).double()(self.x.double())
        calls: dict[str, dict[str, Call]] = {}
        errors: dict[str, float] = {}
        left_out: dict[str, str] = {}
        for backend in setting.backends:
            reason = unavailable(backend, setting.dtype, setting.device)
            if reason is not None:
                left_out[backend] = reason
                continue
            fast = accelerate(sparse, self.x, tune="full", backend=backend)
            calls[backend] = {"network": _bound(fast, self.x)}
            with torch.inference_mode():
                errors[backend] = norm_error(fast(self.x), expected)
        values = self.x.numel() + expected.numel() + counts.total.live_weights
        return Sparse(
            calls,
            errors,
            counts.converted.density,
            counts.total.live_macs * self.x.shape[0],
            values * self.x.element_size(),
            left_out,
        )


def _bound(model: nn.Module, x: Tensor) -> Call:
    return lambda: model(x)
