"""accelerate(): from a trained model and its plan to a network that runs on the chosen backends."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.planning import plan as make_plan
from lhc_triton.planning.schema import LayerPlan, Plan
from lhc_triton.runtime.accelerated import AcceleratedModel, LayerRow, Record, make_row
from lhc_triton.runtime.calibration import cost_model
from lhc_triton.runtime.checks import (
    check_convs,
    check_inputs,
    check_names,
    fitting_plan,
    run_model,
    strip_hooks,
    working_copy,
)
from lhc_triton.runtime.dispatch import choose_backend, launch_config, passed_over, supports
from lhc_triton.runtime.epilogue import LAYOUTS, layer_layout
from lhc_triton.runtime.fusion import fuse, swapped
from lhc_triton.runtime.graph import Site, direct_readers, find_sites, is_fusible, rewrite
from lhc_triton.runtime.modules import FusedConv2d
from lhc_triton.runtime.planes import REASON, plan_plane_writers
from lhc_triton.runtime.timing import time_paired
from lhc_triton.runtime.tracing import Shapes, TraceError, record_shapes, trace
from lhc_triton.runtime.tuning import deterministic
from lhc_triton.runtime.verify import (
    Findings,
    compare_calls,
    compare_sites,
    layer_tolerance,
    network_tolerance,
    norm_error,
)


@dataclass(frozen=True)
class Choice:
    """Who runs one layer, and why."""

    backend: str
    reason: str
    measured_us: float | None = None


def _layout_between(choices: Mapping[str, Choice]) -> str:
    """Return the memory format between the layers; on the CPU tune="full" tries the other ones as well.

    Without the native kernel, the small VGG ran up to twice as fast on channels_last as on contiguous tensors
    on two CPU cores, dense and sparse alike.
    """
    native = any(choice.backend == "native" for choice in choices.values())
    return "mixed" if native else "channels_last"


def accelerate(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    plan: Plan | None = None,
    tune: str = "cached",
    backend: str = "auto",
    graphs: bool = True,
) -> AcceleratedModel:
    """Return a network for inference that computes what ``model`` computes, and skips its dead weights.

    Convolutions with a topology (LHCConv2d, or nn.Conv2d with structured zeros) go to a sparse backend where
    it is faster, the others stay dense. Where torch.fx can trace the model, batch norm is folded and bias,
    residual, ReLU and 2x2 max pool run in the convolutions' epilogues. Every layer, and then the whole
    output, is compared with the model's on ``example_input``; what differs is put back to dense, and
    ``explain()`` says so. The model is copied and left as it was; its hooks are not carried over. Where
    backend="auto" has to do without the device's fastest kernel (no C++ compiler, for example), a warning
    and a note give the reason.

    Args:
        model: any module; run in eval mode.
        example_input: [N, C, H, W], or a tuple of the model's positional tensor arguments, on the model's
            device. Later inputs may have other batch and image sizes; arguments that the example leaves out
            keep their defaults.
        plan: what ``lhc.plan`` made for this model; by default it is made here.
        tune: "off" trusts the cost model and the kernels' heuristic, "cached" prefers stored measurements,
            "full" measures, and stores. With LHC_TRITON_DETERMINISTIC=1 set, "off" whatever is asked for.
        backend: "auto", or one backend that every planned layer must use.
        graphs: record calls and replay them, for each signature of the inputs: as CUDA graphs on a GPU, as
            lists of operators on the CPU; see ``AcceleratedModel``. Outputs are the caller's own either way.

    Raises:
        ValueError: the model has no convolution, NaN weights or an unfinished mask warm-up; it does not take
            the example; the plan is for another model; a forced backend cannot serve a layer.
        TypeError: an argument has another type.
    """
    check_names(tune, backend)
    if deterministic():
        tune = "off"
    inputs = check_inputs(model, example_input)
    work = working_copy(model)
    convs = check_convs(work)
    reference = run_model(work, inputs)
    notes = []
    if strip_hooks(work):
        notes.append("the model's forward hooks are not carried over")

    weight = next(module.weight for module in work.modules() if isinstance(module, nn.Conv2d))
    if plan is None:
        cost = cost_model(backend, weight.dtype, weight.device, tune)
        plan = make_plan(work, inputs, backend=backend, cost=cost)
    else:
        plan = fitting_plan(plan, convs)
    choices = _choose_all(plan, convs, tune, backend)
    notes += _remarks(work, plan, convs)
    if backend == "auto" and plan.layers:
        slower = passed_over(weight.dtype, weight.device)
        if slower is not None:
            notes.append(f"the fastest sparse kernel is left out: {slower}")
            warnings.warn(notes[-1], stacklevel=2)
    job = _Job(work, inputs, reference, plan, choices, tune, backend, notes)
    return job.run(graphs)


class _Job:
    """One acceleration on its way from choices to a checked network."""

    def __init__(
        self,
        work: nn.Module,
        inputs: tuple[Tensor, ...],
        reference: Any,
        plan: Plan,
        choices: dict[str, Choice],
        tune: str,
        requested: str,
        notes: list[str],
    ) -> None:
        self.work = work
        self.inputs = inputs
        self.reference = reference
        self.plan = plan
        self.layers = {layer.name: layer for layer in plan.layers}
        self.choices = choices
        self.tune = tune
        self.requested = requested
        self.notes = notes
        self.changed = False
        self.readers: Mapping[str, frozenset[str]] = {}
        self.modules_by_name = dict(work.named_modules())
        weight = next(m.weight for m in work.modules() if isinstance(m, nn.Conv2d))
        self.layer_tolerance = layer_tolerance(weight.dtype, weight.device)
        self.tolerance = network_tolerance(weight.dtype, weight.device)
        self.device = weight.device

    def run(self, graphs: bool) -> AcceleratedModel:
        traced, sites = self._trace()
        layout = _layout_between(self.choices)
        fused = {site.module: self._fuse(site, layout) for site in sites}
        findings = self._compare(traced, sites, fused)
        if traced is None:
            sites = tuple(site for site in sites if site.module in findings.pixels)
        for site in sites:
            problem = findings.problem(site.module, self.layer_tolerance)
            if problem is not None and self.choices[site.layer].backend != "dense":
                self._put_back(site.layer, problem)
        fused = self._refresh(sites, fused, layout)
        network, error = self._assemble(traced, sites, fused)
        if error > self.tolerance and any(c.backend != "dense" for c in self.choices.values()):
            for name, choice in self.choices.items():
                if choice.backend != "dense":
                    self._put_back(name, f"the network's output differs from the model's by {error:.1e}")
            fused = self._refresh(sites, fused, layout)
            network, error = self._assemble(traced, sites, fused)
        if self.changed:
            findings = self._compare(traced, sites, fused)
        rows = self._rows(sites, findings)
        if self.tune == "full" and self.device.type == "cpu" and error <= self.tolerance:
            network, error, layout = self._faster_layout(traced, sites, network, error, layout)
        if error > self.tolerance:
            self.notes.append(
                f"even with dense layers the rewritten network's output differs from the model's by "
                f"{error:.1e}: the model runs as it is"
            )
            network, error = self.work, norm_error(run_model(self.work, self.inputs), self.reference)
            sites, traced = (), None
        record = Record(
            type(self.work).__name__,
            self.requested,
            traced is not None,
            layout,
            sites,
            rows,
            tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in self.inputs),
            error,
            tuple(self.notes),
        )
        fast = AcceleratedModel(network, self._plan_in_force(), record, graphs)
        self._check_graphs(fast)
        return fast

    def _check_graphs(self, fast: AcceleratedModel) -> None:
        """Capture the example's graph where graphs are used, and give them up if it computes otherwise."""
        if fast.graphs is not None and fast.graphs.capture(fast.network, self.inputs):
            error = norm_error(fast(*self.inputs), self.reference)
            if error > self.tolerance:
                fast.graphs.refuse(f"replayed, the output differs from the model's by {error:.1e}")

    def _trace(self) -> tuple[fx.GraphModule | None, tuple[Site, ...]]:
        """Return the traced network with its sites, or None with one plain site per convolution."""
        try:
            traced = trace(self.work, len(self.inputs))
            shapes, output = record_shapes(traced, self.inputs)
            error = norm_error(output, self.reference)
            if error > self.tolerance:
                raise TraceError(f"the traced network's output differs from the model's by {error:.1e}")
            sites = find_sites(traced, shapes)
            self.readers = direct_readers(traced, sites)
            if self.requested == "auto":
                self._let_native_write_planes(traced, sites, shapes)
            return traced, sites
        except TraceError as failure:
            self.notes.append(
                f"torch.fx could not trace the model ({failure}): convolutions are swapped in place, "
                "nothing is fused"
            )
            names = (name for name, module in self.modules_by_name.items() if is_fusible(module))
            return None, tuple(Site(name, name) for name in names)

    def _let_native_write_planes(self, traced: fx.GraphModule, sites: Sequence[Site], shapes: Shapes) -> None:
        """Let the native kernel run small dense layers that only native layers read."""
        backends = {name: choice.backend for name, choice in self.choices.items()}
        if "native" not in backends.values():
            return
        dtype = next(iter(shapes.values()))[1]
        cost = cost_model("native", dtype, self.device, self.tune)
        found = plan_plane_writers(traced, sites, shapes, backends, cost)
        for name, layer in found.items():
            self.layers[name] = layer
            self.choices[name] = Choice("native", REASON)
        order = {site.layer: place for place, site in enumerate(sites)}
        layers = sorted(self.layers.values(), key=lambda layer: order.get(layer.name, len(order)))
        skipped = tuple(pair for pair in self.plan.skipped if pair[0] not in found)
        self.plan = dataclasses.replace(self.plan, layers=tuple(layers), skipped=skipped)

    def _faster_layout(
        self,
        traced: fx.GraphModule | None,
        sites: Sequence[Site],
        network: nn.Module,
        error: float,
        layout: str,
    ) -> tuple[nn.Module, float, str]:
        """Try the other formats between the layers of a network that works; return the fastest one."""
        networks = {layout: (network, error)}
        for other in LAYOUTS:
            if other == layout:
                continue
            fused = {site.module: self._fuse(site, other) for site in sites}
            rival, rival_error = self._assemble(traced, sites, fused)
            if rival_error <= self.tolerance:
                networks[other] = (rival, rival_error)
        calls = {name: partial(rival, *self.inputs) for name, (rival, _) in networks.items()}
        with torch.no_grad():
            times = time_paired(calls, rounds=7, warmup=2, device=self.device)
        fastest = min(times, key=lambda name: times[name].median_us)
        return *networks[fastest], fastest

    def _fuse(self, site: Site, layout: str) -> FusedConv2d:
        conv = self.modules_by_name[site.layer]
        assert isinstance(conv, nn.Conv2d)
        backend = self.choices[site.layer].backend
        readers = [self.choices[name].backend for name in self.readers.get(site.module, ())]
        return fuse(
            conv,
            self.modules_by_name[site.norm] if site.norm else None,
            layer=self.layers.get(site.layer),
            backend=backend,
            activation=site.activation,
            pool=site.pool,
            layout=layer_layout(layout, backend, readers),
            tune=self.tune,
        )

    def _refresh(
        self, sites: Sequence[Site], fused: Mapping[str, FusedConv2d], layout: str
    ) -> dict[str, FusedConv2d]:
        """Rebuild the modules whose backend changed, and drop those without a site."""
        return {
            site.module: fused[site.module]
            if fused[site.module].backend == self.choices[site.layer].backend
            else self._fuse(site, layout)
            for site in sites
        }

    def _compare(
        self, traced: fx.GraphModule | None, sites: Sequence[Site], fused: Mapping[str, FusedConv2d]
    ) -> Findings:
        if traced is not None:
            return compare_sites(traced, sites, fused, self.inputs)
        return compare_calls(self.work, fused, self.inputs)

    def _put_back(self, name: str, problem: str) -> None:
        """Let a layer run dense, or refuse where the user forced its backend."""
        backend = self.choices[name].backend
        if self.requested != "auto":
            raise ValueError(
                f"layer {name!r} cannot run on the forced backend {backend!r}: {problem}; "
                'use backend="auto" to leave it dense'
            )
        self.changed = True
        self.choices[name] = Choice("dense", f"put back from {backend}: {problem}")
        self.notes.append(f"layer {name!r} was put back to dense from {backend}: {problem}")

    def _assemble(
        self, traced: fx.GraphModule | None, sites: Sequence[Site], fused: Mapping[str, FusedConv2d]
    ) -> tuple[nn.Module, float]:
        """Build the network and return it with its output's error."""
        if traced is not None:
            network: nn.Module = rewrite(traced, sites, fused)
        else:
            network = swapped(self.work, fused)
        try:
            with torch.no_grad():
                output = network(*[value.clone() for value in self.inputs])
        except Exception as failure:  # a model that looks into its convolutions may trip over ours
            self.notes.append(f"the rewritten network does not run ({type(failure).__name__}: {failure})")
            return network, float("inf")
        return network, norm_error(output, self.reference)

    def _plan_in_force(self) -> Plan:
        layers = []
        for layer in self.plan.layers:
            choice = self.choices.get(layer.name)
            if choice is not None:
                layer = dataclasses.replace(layer, backend=choice.backend, reason=choice.reason)
            layers.append(layer)
        return dataclasses.replace(self.plan, layers=tuple(layers))

    def _rows(self, sites: Sequence[Site], findings: Findings) -> tuple[LayerRow, ...]:
        rows: dict[str, LayerRow] = {}
        for site in sites:
            if site.module in rows:
                continue
            choice = self.choices[site.layer]
            conv = self.modules_by_name[site.layer]
            assert isinstance(conv, nn.Conv2d)
            rows[site.module] = make_row(
                site,
                self.layers.get(site.layer),
                choice.backend,
                choice.reason,
                conv.weight.numel() * findings.pixels[site.module],
                findings.errors.get(site.module),
                choice.measured_us,
            )
        return tuple(rows.values())


def _choose_all(plan: Plan, convs: Mapping[str, nn.Conv2d], tune: str, requested: str) -> dict[str, Choice]:
    """Choose a backend for every fusible convolution; ValueError where a forced one cannot serve."""
    planned = {layer.name: layer for layer in plan.layers}
    skipped = dict(plan.skipped)
    choices = {}
    for name, conv in convs.items():
        if name not in planned:
            choices[name] = Choice("dense", skipped.get(name, "not in the plan"))
            continue
        weight = conv.weight
        choices[name] = choose(planned[name], weight.dtype, weight.device, tune, requested)
    return choices


def _remarks(work: nn.Module, plan: Plan, convs: Mapping[str, nn.Conv2d]) -> list[str]:
    """Say which convolutions are left as they are, and whether any could run sparse at all."""
    skipped = dict(plan.skipped)
    notes = [
        f"layer {name!r} is left as it is: {skipped.get(name, f'a {type(module).__name__}')}"
        for name, module in work.named_modules()
        if isinstance(module, nn.Conv2d) and name not in convs
    ]
    if not plan.layers:
        notes.append("no convolution has a topology or structured zeros: everything runs dense")
    return notes


def choose(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device,
    tune: str = "cached",
    requested: str = "auto",
) -> Choice:
    """Choose who runs a planned layer; ValueError where a forced backend cannot."""
    if requested == "auto":
        decision = choose_backend(layer, dtype, device, tune)
        return Choice(decision.backend, decision.reason, decision.measured_us.get(decision.backend))
    reason = supports(requested, layer, dtype, device)
    if reason is not None:
        raise ValueError(f"layer {layer.name!r} cannot run on the forced backend {requested!r}: {reason}")
    if requested == "triton" and tune == "full":
        launch_config(layer, dtype, device, tune)  # stores what the layer will look up
    return Choice(requested, "forced")
