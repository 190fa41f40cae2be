"""Compares an accelerated network with its model, layer by layer and as a whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.conversion import evaluating
from lhc_triton.errors import one_line
from lhc_triton.runtime.network.outputs import Outcome, differences, worst_error
from lhc_triton.runtime.network.sites import Site, conv_input
from lhc_triton.runtime.network.snapshots import preserved
from lhc_triton.runtime.network.trials import Observed, Trial, observe
from lhc_triton.runtime.op.accuracy import NETWORK_FACTOR, layer_tolerance, strict_error

_SHAKES = 4  # runs on inputs that are changed by about as much as rounding changes a layer
_ROUNDING = 0.1  # of a layer's tolerance
_TIES = 4  # places that may flip, for each one that the model's own rounding flips


@dataclass(frozen=True)
class Verdict:
    """How a network compares with its model: the worst error of its outputs on the example, and what differs.

    ``problem`` is one phrase, or None where nothing differs.
    """

    error: float
    problem: str | None = None


class Judge:
    """Holds networks against what their model was observed to do.

    Args:
        model: it runs again where integers or booleans differ, to learn which of them its own rounding flips.
        observed: what it does.
        tolerance: norm error up to which floating-point outputs count as equal.
    """

    def __init__(self, model: nn.Module, observed: Observed, tolerance: float) -> None:
        self._model = model
        self._observed = observed
        self.tolerance = tolerance
        self._flips: dict[int, Mapping[str, int]] = {}

    def tolerating(self, tolerance: float) -> Judge:
        """Return one that holds networks against the same, with another tolerance."""
        return Judge(self._model, self._observed, tolerance)

    def of(self, network: nn.Module) -> Judge:
        """Return one that holds others against what ``network`` does on the trials, all of which it takes."""
        with preserved(network):
            found = observe(network, self._observed.trials)
        outcomes = tuple(one for one in found if isinstance(one, Outcome))
        return Judge(network, dataclasses.replace(self._observed, outcomes=outcomes), self.tolerance)

    def verdict(
        self, network: Callable[..., Any], order: Sequence[int] | None = None, values: bool = True
    ) -> Verdict:
        """Run a network through the model's trials and compare what it does.

        Args:
            network: a module is left as it was.
            order: which trials, by number; by default all in turn.
            values: False compares everything but the numbers in tensors.
        """
        order = range(len(self._observed.trials)) if order is None else order
        trials = [self._observed.trials[number] for number in order]
        keep = preserved(network) if isinstance(network, nn.Module) else nullcontext()
        with keep:
            found = observe(network, trials)
        error = math.inf
        for number, one in zip(order, found, strict=False):
            label = self._observed.trials[number].label
            if isinstance(one, str):
                return Verdict(error, f"on {label} it does not run ({one})")
            if number == 0:
                error = worst_error(one, self._observed.outcomes[0])
            what = self._difference(number, one, values)
            if what is not None:
                return Verdict(error, f"on {label} {what}")
        return Verdict(error)

    def _difference(self, number: int, found: Outcome, values: bool) -> str | None:
        for difference in differences(found, self._observed.outcomes[number], self.tolerance):
            if difference.values and not values:
                continue
            if difference.flipped is None:
                return difference.what
            own = self._own_flips(number).get(difference.place, 0)
            if difference.flipped > _TIES * own:
                return f"{difference.what}, the model's own rounding explains {own}"
        return None

    def _own_flips(self, number: int) -> Mapping[str, int]:
        """Return how many integers and booleans of each output the model flips by itself within rounding."""
        if number not in self._flips:
            trials, reference = self._observed.trials[: number + 1], self._observed.outcomes[number]
            witness = self._again(trials)
            flipped: dict[str, Tensor] = {}
            # a model that does not even repeat itself is no witness
            if witness is not None and not differences(witness, reference, 0.0):
                for seed in range(_SHAKES):
                    shaken = Trial(trials[-1].label, _shaken(trials[-1].inputs, self.tolerance, seed))
                    found = self._again([*trials[:-1], shaken])
                    for place, places in () if found is None else _flips(found, reference):
                        flipped[place] = flipped[place] | places if place in flipped else places
            self._flips[number] = {place: int(places.sum()) for place, places in flipped.items()}
        return self._flips[number]

    def _again(self, trials: Sequence[Trial]) -> Outcome | None:
        """Return the model's outcome of the last trial, the others before it; None if one fails."""
        with evaluating(self._model), preserved(self._model):
            last = observe(self._model, trials)[-1]
        return None if isinstance(last, str) else last


def _flips(found: Outcome, reference: Outcome) -> Iterator[tuple[str, Tensor]]:
    """Yield the places at which integer or boolean outputs differ."""
    for place, leaf in reference.leaves.items():
        mine = found.leaves.get(place)
        if mine is None or not isinstance(leaf.value, Tensor) or leaf.value.is_floating_point():
            continue
        if isinstance(mine.value, Tensor) and mine.value.shape == leaf.value.shape:
            yield place, mine.value != leaf.value


def _shaken(inputs: Sequence[Tensor], tolerance: float, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    size = _ROUNDING * tolerance / NETWORK_FACTOR

    def shake(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator).to(value.device)
        return (value.double() * (1 + size * noise.double())).to(value.dtype)

    return tuple(shake(value) for value in inputs)


def _run(module: nn.Module, *inputs: Tensor) -> Tensor | str:
    """Run a layer, past its hooks; an error of any kind comes back as its one-line message."""
    try:
        result: Tensor = module.forward(*inputs)
        return result
    except Exception as error:  # whatever a backend raises means that it cannot serve this layer
        return one_line(error)


class Findings:
    """What a layer-by-layer comparison found.

    Attributes:
        errors: worst norm error of each fused module.
        problems: what is wrong with a fused module, in one phrase.
        pixels: output pixels N * OH * OW of each module's convolution, summed over its calls.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.problems: dict[str, str] = {}
        self.pixels: dict[str, int] = {}

    def add(self, module: str, mine: Tensor | str, reference: Tensor) -> None:
        """Note one call."""
        if isinstance(mine, str):
            self.problems[module] = mine
            return
        error = strict_error(mine, reference)
        self.errors[module] = max(self.errors.get(module, 0.0), error)
        if error > layer_tolerance(reference.dtype, reference.device):
            self.problems[module] = f"its output differs from the model's by {error:.1e}"

    def count(self, module: str, sums: Tensor) -> None:
        """Count the pixels of one call from the convolution's own output [N, O, OH, OW] or [O, OH, OW]."""
        pixels = sums.numel() // max(sums.shape[-3], 1)
        self.pixels[module] = self.pixels.get(module, 0) + pixels


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
    with torch.no_grad(), preserved(traced):
        comparer.run(*[value.clone() for value in inputs])
    return comparer.findings


def compare_calls(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Sequence[Tensor]) -> Findings:
    """Run every replacement on what the model feeds the convolution of that name, and compare their outputs.

    A convolution that the model does not call is missing from the findings.
    """
    findings = Findings()
    named = dict(model.named_modules())

    def watched(name: str, conv: nn.Module) -> Callable[..., Tensor]:
        original = conv.forward

        def forward(*arguments: Any, **keywords: Any) -> Tensor:
            mine = _run(modules[name], *arguments, *keywords.values())
            output: Tensor = original(*arguments, **keywords)
            findings.count(name, output)
            findings.add(name, mine, output)
            return output

        return forward

    with torch.no_grad(), preserved(model), _forwards({named[n]: watched(n, named[n]) for n in modules}):
        model(*[value.clone() for value in inputs])
    return findings


@contextmanager
def _forwards(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules other forward functions for a while; hooks, and calls past ``__call__``, see no change."""
    own = {module: vars(module).get("forward") for module in functions}
    for module, function in functions.items():
        vars(module)["forward"] = function
    try:
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward")
            if forward is not None:
                vars(module)["forward"] = forward
