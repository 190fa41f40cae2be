"""What accelerate leaves as it is, and how it says so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lhc_triton.planning.network_plan import Plan
from lhc_triton.runtime.network.sites import Site, is_fusible
from lhc_triton.watching import Watch

_CONVOLUTION = re.compile(r"conv(?!ert)")


class Elsewhere(Watch):
    """Counts the convolutions that run outside the convolution layers of a model.

    Attributes:
        calls: how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self.inside and _CONVOLUTION.search(func._schema.name):
            self.calls += 1
        return func(*args, **(kwargs or {}))


def left_layers(work: nn.Module, plan: Plan, sites: Sequence[Site]) -> tuple[str, ...]:
    """Say which convolution layers were not replaced, and why, one line each."""
    replaced, skipped = {site.layer for site in sites}, dict(plan.skipped)
    left = {n: m for n, m in work.named_modules() if isinstance(m, _ConvNd) and n not in replaced}

    def reason(name: str, module: nn.Module) -> str:
        if is_fusible(module):
            return "not called on the example"
        return skipped.get(name, f"a {type(module).__name__}").removeprefix("is ")

    return tuple(f"layer {name!r} is left as it is: {reason(name, module)}" for name, module in left.items())


def remarks(plan: Plan, unwrapped_names: Sequence[str], elsewhere: int, left: bool) -> tuple[str, ...]:
    """Say what people should know before any choice is made, one line each.

    Args:
        plan: of the convolutions.
        unwrapped_names: of modules, "" for the model, at which the copy leaves something out.
        elsewhere: convolutions that one run calls outside the model's layers.
        left: whether some of the model's convolutions are not for us to run.
    """
    notes = [
        f"what wraps {f'module {name!r}' if name else 'the model'} (torch.compile, DataParallel) is left out"
        for name in unwrapped_names
    ]
    if elsewhere:
        calls = (
            "1 convolution runs as it is" if elsewhere == 1 else f"{elsewhere} convolutions run as they are"
        )
        notes.append(
            f"{calls}, outside the model's layers: as a function, in scripted code, or in a module that is "
            "not the model's"
        )
    if all(layer.topology.density == 1 for layer in plan.layers):
        which = " that can be replaced" if left or elsewhere else ""
        notes.append(f"no convolution{which} has a topology or structured zeros: everything runs dense")
    return tuple(notes)
