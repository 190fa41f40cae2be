"""Compares an accelerated network with its model, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.runtime.errors import one_line
from lhc_triton.runtime.graph import Site, conv_input

_LAYER_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 5e-3
_NETWORK_FACTOR = 3.0


def layer_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the norm error up to which two runs of one layer count as equal.

    Both sides round, so it is a few times the error that one run may have against exact arithmetic. On CUDA,
    torch's float32 convolutions may use TF32.
    """
    if dtype == torch.float32 and device.type == "cuda":
        return _TF32_TOLERANCE
    return _LAYER_TOLERANCE.get(dtype, 1e-2)


def network_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the norm error up to which two runs of a network count as equal: errors of layers add up."""
    return _NETWORK_FACTOR * layer_tolerance(dtype, device)


def norm_error(y: Any, reference: Any) -> float:
    """Return ||y - reference|| / ||reference|| over all floating-point tensors of two outputs.

    NaN and infinity count as equal where both sides have the same; where only one has, or where shapes or
    structure differ, the error is infinite. Other values (class indices, for example) are not compared: equal
    numbers up to rounding may still order differently.
    """
    mine, theirs = dict(_leaves(y)), dict(_leaves(reference))
    if set(mine) != set(theirs):
        return float("inf")
    difference = norm = 0.0
    for place, right in theirs.items():
        left = mine[place]
        if not isinstance(right, Tensor) or not right.is_floating_point():
            continue
        if not isinstance(left, Tensor) or left.shape != right.shape:
            return float("inf")
        finite = torch.isfinite(right)
        if not bool(finite.all()):
            left, right = left.to(right.dtype), right
            same = (left == right) | (left.isnan() & right.isnan())
            if not bool((same | finite).all()):
                return float("inf")
            left, right = left[finite], right[finite]
        if not bool(torch.isfinite(left).all()):
            return float("inf")
        wide_left, wide_right = left.double(), right.double()
        difference += float(torch.linalg.vector_norm(wide_left - wide_right)) ** 2
        norm += float(torch.linalg.vector_norm(wide_right)) ** 2
    return (difference / norm) ** 0.5 if norm else difference**0.5


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (place, value) of everything in an output's nested containers.

    Container types are not told apart: torch.fx returns its own for lists and dicts.
    """
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield place, value
        return
    for key, item in items:
        yield from _leaves(item, (*place, key))


def _run(module: nn.Module, *inputs: Tensor) -> Tensor | str:
    """Run a layer; an error of any kind comes back as its one-line message."""
    try:
        result: Tensor = module(*inputs)
        return result
    except Exception as error:  # whatever a backend raises means that it cannot serve this layer
        return one_line(error)


class Findings:
    """What a layer-by-layer comparison found.

    Attributes:
        errors: worst norm error of each fused module.
        failures: message of the fused modules that raised.
        pixels: output pixels N * OH * OW of each module's convolution, summed over its calls.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.pixels: dict[str, int] = {}

    def add(self, module: str, mine: Tensor | str, reference: Tensor) -> None:
        """Note one call."""
        if isinstance(mine, str):
            self.failures[module] = mine
            return
        self.errors[module] = max(self.errors.get(module, 0.0), norm_error(mine, reference))

    def count(self, module: str, sums: Tensor) -> None:
        """Count the pixels of one call from the convolution's own output [N, O, OH, OW]."""
        pixels = sums.shape[0] * sums.shape[2] * sums.shape[3]
        self.pixels[module] = self.pixels.get(module, 0) + pixels

    def problem(self, module: str, tolerance: float) -> str | None:
        """Say what is wrong with a module, or return None."""
        if module in self.failures:
            return self.failures[module]
        error = self.errors.get(module, 0.0)
        return None if error <= tolerance else f"its output differs from the model's by {error:.1e}"


class _SiteComparer(fx.Interpreter):
    """Runs the original graph, and each fused module on the values that its site reads there."""

    def __init__(
        self, traced: fx.GraphModule, sites: Sequence[Site], modules: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.modules = modules
        self.findings = Findings()
        self.first = {site.nodes[0]: site for site in sites}
        self.adds = {site.add: site for site in sites if site.add is not None}
        self.last = {site.nodes[-1]: site for site in sites}
        self.held: dict[str, Tensor] = {}
        self.results: dict[str, Tensor | str] = {}

    def run_node(self, n: fx.Node) -> Any:
        # The fused module must run before a node of its site overwrites what it reads.
        if n.name in self.first:
            site = self.first[n.name]
            x = self.env[conv_input(n)]
            if site.add is None:
                self.results[site.nodes[-1]] = _run(self.modules[site.module], x)
            else:
                self.held[site.add] = x
        elif n.name in self.adds:
            site = self.adds[n.name]
            residual = self.env[n.args[site.residual]]  # type: ignore[index]
            self.results[site.nodes[-1]] = _run(self.modules[site.module], self.held.pop(n.name), residual)
        value = super().run_node(n)
        if n.name in self.first:
            self.findings.count(self.first[n.name].module, value)
        if n.name in self.last:
            self.findings.add(self.last[n.name].module, self.results.pop(n.name), value)
        return value


def compare_sites(
    traced: fx.GraphModule,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[Tensor],
) -> Findings:
    """Run every fused module on the values the original graph feeds its site, and compare their outputs."""
    comparer = _SiteComparer(traced, sites, modules)
    with torch.no_grad():
        comparer.run(*[value.clone() for value in inputs])
    return comparer.findings


def compare_calls(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Sequence[Tensor]) -> Findings:
    """Run every replacement on what the model feeds the convolution of that name, and compare their outputs.

    A convolution that the model does not call is missing from the findings.
    """
    findings = Findings()
    named = dict(model.named_modules())

    def watch(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            findings.count(name, output)
            findings.add(name, _run(modules[name], *arguments, *keywords.values()), output)

        return hook

    handles = [named[name].register_forward_hook(watch(name), with_kwargs=True) for name in modules]
    try:
        with torch.no_grad():
            model(*[value.clone() for value in inputs])
    finally:
        for handle in handles:
            handle.remove()
    return findings
