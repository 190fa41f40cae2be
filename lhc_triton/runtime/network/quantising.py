"""Last step of accelerate with dtype="int8": planned layers of a network that agrees with its model, in int8.

Post-training quantisation, symmetric: weights have a step per filter, activations one per tensor, those that
lose least of the weights, and of a layer's input on the example. No weight is changed.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.planning import plan as make_plan
from lhc_triton.planning.backends import BACKENDS
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.calibration import cost_model
from lhc_triton.runtime.choosing.dispatch import auto_backend, decide, passed_over
from lhc_triton.runtime.network.building import Built
from lhc_triton.runtime.network.int8 import Int8Conv2d, connect, int8_of
from lhc_triton.runtime.network.reading import Case
from lhc_triton.runtime.network.snapshots import preserved
from lhc_triton.runtime.network.verify import Findings, Judge
from lhc_triton.runtime.op.accuracy import INT8_LIMIT, NETWORK_FACTOR, norm_error
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.op.quantise import step_of

TOLERANCE = NETWORK_FACTOR * INT8_LIMIT
DTYPES = (None, "int8")
SAMPLED = 1 << 18  # values of an activation that choose its step


def check_dtype(dtype: Any, model: nn.Module, backend: str) -> None:
    """Raise ValueError unless convolutions of a model can run in ``dtype`` on a backend (or "auto")."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; use 'int8', or None for the model's own type")
    if dtype is None:
        return
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    odd = next((weight for weight in weights if weight.dtype != torch.float32), None)
    if odd is not None:
        raise ValueError(f"dtype='int8' quantises float32 models, not {odd.dtype}: call model.float() first")
    if backend == "dense":
        able = ", ".join(name for name, record in BACKENDS.items() if "int8" in record.dtypes)
        raise ValueError(f"backend 'dense' does not serve int8; use 'auto' or one of {able}")
    problem = unavailable(backend, torch.int8, weights[0].device) if backend != "auto" and weights else None
    if problem is not None:
        raise ValueError(f"dtype='int8': {problem}")


def quantised(case: Case, built: Built, own_plan: bool) -> tuple[Case, Built]:
    """Return case and network with layers in int8: those for which it is faster, and near enough to float32.

    Every layer is run on its float32 input, and stays as it is where its output differs by more than
    `INT8_LIMIT`. Then the network's output on the example is compared with the model's; while it differs by
    more than `TOLERANCE`, the layers with the largest effect on it go back to float32. Between two int8
    layers activations stay int8 where nobody else reads them.

    Args:
        case: the model.
        built: a network that agrees with it; its layers are replaced in place.
        own_plan: whether the plan was made here, so that another may be made for int8.
    """
    device = next(iter(case.convs.values())).weight.device
    if case.requested == "auto" and auto_backend(torch.int8, device) is None:
        why = passed_over(torch.int8, device) or f"no sparse backend serves it on {device.type}"
        warnings.warn(f"nothing runs in int8: {why}", stacklevel=3)
        return case, built.noted(f"nothing runs in int8: {why}")
    plan = _plan(case, device) if own_plan else case.plan
    decisions = {
        layer.name: decide(layer, torch.int8, device, case.tune, case.requested) for layer in plan.layers
    }
    layers = {layer.name: layer for layer in plan.layers if decisions[layer.name].backend != "dense"}
    swap = _Swap(built, layers)
    samples = swap.samples(case.inputs)
    reasons = {
        swap.layer_of[name]: "in float32: on the example its input is zero, or not finite"
        for name, values in samples.items()
        if not 0 < float(values.abs().amax()) < math.inf
    }
    for name, values in samples.items():
        layer = swap.layer_of[name]
        if layer not in reasons:
            step = step_of(values[None]).squeeze(0)
            swap.int8[name] = Int8Conv2d.of(layers[layer], swap.floats[name], decisions[layer].backend, step)
    errors = swap.errors(case.inputs)
    reasons |= {
        swap.layer_of[name]: f"in float32: int8 would be off by {error:.1e}, more than {INT8_LIMIT:g}"
        for name, error in errors.items()
        if not error <= INT8_LIMIT
    }
    chosen = {swap.layer_of[name] for name in swap.int8} - reasons.keys()
    verdict = swap.settle(case, chosen, reasons)
    choices = dict(built.choices)
    for layer in chosen:
        choices[layer] = decisions[layer]
    for layer, reason in reasons.items():
        choices[layer] = dataclasses.replace(choices[layer], reason=f"{choices[layer].reason}; {reason}")
    findings = Findings()
    findings.pixels = built.findings.pixels
    kept = {name: error for name, error in errors.items() if swap.layer_of[name] in chosen}
    findings.errors = {**built.findings.errors, **kept}
    note = (
        f"{len(chosen)} of {len(case.convs)} convolutions run in int8, an error of the output up to "
        f"{TOLERANCE:g} is accepted"
    )
    built = dataclasses.replace(
        built.noted(note), choices=choices, findings=findings, error=verdict if chosen else built.error
    )
    merged = _merged(case.plan, [layer for layer in plan.layers if layer.name in chosen])
    return dataclasses.replace(case, plan=merged, judge=case.judge.of(built.network)), built


def _plan(case: Case, device: torch.device) -> Plan:
    """Plan the model again, priced for int8: it may pay where float32 does not, in dense layers as well."""
    if case.requested != "auto":
        return case.plan
    cost = cost_model("auto", torch.int8, device, case.tune)
    with preserved(case.work):
        inputs = tuple(x.clone() for x in case.inputs)
        return make_plan(case.work, inputs, "auto", cost, dense=True, whole=False)


def _merged(plan: Plan, layers: Sequence[LayerPlan]) -> Plan:
    """Return a plan with some layers planned otherwise, or for the first time."""
    others = {layer.name: layer for layer in layers}
    known = {layer.name for layer in plan.layers}
    merged = [others.get(layer.name, layer) for layer in plan.layers]
    merged += [layer for layer in layers if layer.name not in known]
    skipped = tuple(pair for pair in plan.skipped if pair[0] not in others)
    return dataclasses.replace(plan, layers=tuple(merged), skipped=skipped)


class _Swap:
    """The fused modules of a network that can be replaced, where they are, and what replaces them.

    Attributes:
        floats, int8: modules by name.
        layer_of: the layer of each name; calls of one layer with other epilogues have other modules.
    """

    def __init__(self, built: Built, layers: Mapping[str, LayerPlan]) -> None:
        self.network = built.network
        self.int8: dict[str, Int8Conv2d] = {}
        fused = {name: m for name, m in self.network.named_modules() if isinstance(m, FusedConv2d)}
        sites = [site for site in built.sites if site.layer in layers and site.module in fused]
        self.layer_of = {site.module: site.layer for site in sites if built.replaced}
        self.floats = {name: fused[name] for name in self.layer_of}
        named = {module: name for name, module in self.floats.items()}
        self.places = [
            (parent, key, named[child])
            for parent in self.network.modules()
            for key, child in parent._modules.items()
            if child in named
        ]

    def samples(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return inputs of each module on the example, [n]: evenly picked ones, and the largest."""
        found: dict[str, list[Tensor]] = {}

        def look(name: str, arguments: Sequence[Tensor], output: Tensor) -> None:
            values = arguments[0].detach().flatten()
            largest = values.abs().amax().reshape(1)
            found.setdefault(name, []).extend([values[:: 1 + len(values) // SAMPLED].clone(), largest])

        self._run(inputs, self.floats, look)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def errors(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        """Return the norm error of each int8 module's output on the example, its input in float32."""
        found: dict[str, float] = {}

        def look(name: str, arguments: Sequence[Tensor], output: Tensor) -> None:
            error = norm_error(self.int8[name].forward(*arguments), output)
            found[name] = max(found.get(name, 0.0), error)

        self._run(inputs, self.int8, look)
        return found

    def _run(
        self,
        inputs: Sequence[Tensor],
        names: Iterable[str],
        look: Callable[[str, Sequence[Tensor], Tensor], None],
    ) -> None:
        """Run the float32 network, and look at what some modules take and give."""
        with torch.no_grad(), preserved(self.network):
            handles = [
                self.floats[name].register_forward_hook(
                    lambda module, arguments, named, output, name=name: look(
                        name, (*arguments, *named.values()), output
                    ),
                    with_kwargs=True,
                )
                for name in names
            ]
            try:
                self.network(*(x.clone() for x in inputs))
            finally:
                for handle in handles:
                    handle.remove()

    def settle(self, case: Case, chosen: set[str], reasons: dict[str, str]) -> float:
        """Put the chosen layers in, and take some out again while the output is too far from the model's.

        Returns:
            The error of the output on the example; what was taken out is gone from ``chosen``, and has its
            reason.
        """
        judge = case.judge.tolerating(TOLERANCE)
        effects: dict[str, float] = {}
        while True:
            self._install(chosen)
            verdict = judge.verdict(self.network, order=(0,))
            # other inputs have other ranges than those that the steps were made for: values aside
            problem = verdict.problem or judge.verdict(self.network, values=False).problem
            if problem is None or not chosen:
                return verdict.error
            kept = set() if effects else self._within(judge, chosen, effects)
            if not kept or kept == chosen:
                kept = set(sorted(chosen, key=lambda layer: effects[layer])[: len(chosen) * 7 // 8])
            for layer in chosen - kept:
                reasons[layer] = f"in float32: with it in int8, {problem}"
            chosen &= kept

    def _within(self, judge: Judge, chosen: set[str], effects: dict[str, float]) -> set[str]:
        """Return as many layers as may be in int8 together if their effects add up like independent errors.

        A layer's effect, kept in ``effects``, is what the output is off by with that layer alone in int8:
        later layers make more of some errors than of others.
        """
        for layer in sorted(chosen):
            self._install({layer})
            effects[layer] = judge.verdict(self.network, order=(0,)).error
        kept, total = set(), 0.0
        for layer in sorted(chosen, key=lambda layer: effects[layer]):
            total += effects[layer] ** 2
            if not total <= TOLERANCE**2:
                break
            kept.add(layer)
        return kept

    def _install(self, chosen: set[str]) -> None:
        for parent, key, name in self.places:
            taken = self.layer_of[name] in chosen
            parent._modules[key] = self.int8[name] if taken else self.floats[name]
        keep_int8(self.network)


def keep_int8(network: nn.Module) -> None:
    """Let the int8 layers of a graph write int8 where nothing but such layers, of one step, read it."""
    for module in network.modules():
        if isinstance(module, Int8Conv2d):
            module.out_step = None
    if isinstance(network, fx.GraphModule):
        _let_write_int8(network)
    connect(network)


def _let_write_int8(network: fx.GraphModule) -> None:
    steps: dict[Int8Conv2d, list[Tensor | None]] = {}
    for node in network.graph.nodes:
        writer = int8_of(network, node)
        if writer is not None:
            steps.setdefault(writer, []).append(_step_of_readers(network, node))
    for writer, found in steps.items():
        first = found[0]
        if first is not None and all(other is not None and torch.equal(first, other) for other in found):
            writer.out_step = first


def _step_of_readers(network: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Return the step that all readers of an int8 layer's output share; None where one needs floats."""
    if len(node.args) > 1 or not node.users:  # a residual may turn out to be broadcast, after the operator
        return None
    steps = []
    for user in node.users:
        reader = int8_of(network, user)
        if reader is None or user.args[0] is not node or node in user.args[1:]:
            return None
        steps.append(reader.in_step)
    return steps[0] if all(torch.equal(steps[0], step) for step in steps) else None
