"""accelerate(): from a trained model and its plan to a network that runs on the chosen backends."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lhc_triton.planning import plan as make_plan
from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.planner import Backend
from lhc_triton.planning.schema import LayerPlan, Plan
from lhc_triton.runtime.choosing.calibration import cost_model
from lhc_triton.runtime.choosing.dispatch import Tune, choose_backend, launch_config, passed_over, supports
from lhc_triton.runtime.choosing.launch_configs import deterministic
from lhc_triton.runtime.network.accelerated import (
    AcceleratedModel,
    LayerRow,
    Record,
    make_row,
    plain_attributes,
    public_names,
)
from lhc_triton.runtime.network.arguments import check_convs, check_inputs, check_names, fitting_plan
from lhc_triton.runtime.network.copying import (
    Snapshot,
    carry_hooks,
    has_hooks,
    preserved,
    unwrapped,
    working_copy,
    wrappers,
)
from lhc_triton.runtime.network.fusion import fuse, swapped
from lhc_triton.runtime.network.outputs import differences, outcome
from lhc_triton.runtime.network.sites import Site, find_sites, is_fusible, rewrite
from lhc_triton.runtime.network.tracing import TraceError, record_formats, record_shapes, trace
from lhc_triton.runtime.network.trials import Observed, is_large, observe_model
from lhc_triton.runtime.network.verify import Findings, Judge, compare_calls, compare_sites
from lhc_triton.runtime.op.accuracy import network_tolerance
from lhc_triton.runtime.op.dense import FusedConv2d

_SAME_OPERATORS = 1e-2  # of the tolerance


@dataclass(frozen=True)
class Choice:
    """Who runs one layer, and why."""

    backend: str
    reason: str
    measured_us: float | None = None


Choices = Mapping[str, Choice]


@dataclass(frozen=True)
class Case:
    """What is to be accelerated, and what is known of it; nothing here changes any more.

    Attributes:
        work: the copy of the model, in eval mode.
        convs: its convolutions that can be replaced, by name.
        inputs: the example.
        observed: what the model itself does.
        judge: holds networks against that.
        plan: of the convolutions.
        tune, requested: what ``accelerate`` was asked for.
    """

    work: nn.Module
    convs: Mapping[str, nn.Conv2d]
    inputs: tuple[Tensor, ...]
    observed: Observed
    judge: Judge
    plan: Plan
    tune: str
    requested: str


@dataclass(frozen=True)
class Traced:
    """A network as a graph: its sites, and the memory formats of its values (see ``formats``)."""

    graph: fx.GraphModule
    sites: tuple[Site, ...]
    formats: Mapping[str, str]


@dataclass(frozen=True)
class Built:
    """A network in which convolutions are replaced.

    Attributes:
        network: the network.
        traced: whether its epilogues are fused.
        sites: the calls that were replaced.
        choices: who runs each layer now.
        findings: of the comparison layer by layer.
        notes: what people should know.
        replaced: whether they are; else the network is the model as it is.
        error: of its outputs on the example.
        problem: how it differs from the model, in one phrase, or None.
    """

    network: nn.Module
    traced: bool
    sites: tuple[Site, ...]
    choices: Choices
    findings: Findings
    notes: tuple[str, ...]
    replaced: bool = True
    error: float = 0.0
    problem: str | None = None


def accelerate(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    plan: Plan | None = None,
    tune: Tune = "cached",
    backend: Backend = "auto",
    graphs: bool = True,
) -> AcceleratedModel:
    """Return a network for inference that computes what ``model`` computes, and skips its dead weights.

    Convolutions with a topology (LHCConv2d, or nn.Conv2d with structured zeros) go to a sparse backend where
    it is faster, the others stay dense. Where torch.fx can trace the model, batch norm is folded and bias,
    residual, ReLU and 2x2 max pool run in the convolutions' epilogues; activations are channels_last inside,
    and outputs have the memory format that the model gives them.

    Every layer is compared with the model's on ``example_input``; what differs is put back to dense. The
    whole network then runs beside the untouched model on the example, on other values of its kind, and on
    another batch and image size where the model takes them, the last one twice; every output is compared.
    What differs is given up: first the traced network, for convolutions that are swapped in place, then the
    sparse backends, then everything. ``explain()`` tells why. The model is copied and left as it was. Its
    forward hooks go with the copy; where modules inside have hooks, convolutions are swapped in place. Where
    backend="auto" has to do without the device's fastest kernel (no C++ compiler, for example), a warning and
    a note give the reason.

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
            the example; it cannot be copied, or a copy computes something else; the plan is for another
            model; a forced backend cannot serve a layer, or the network.
        TypeError: an argument has another type.
    """
    check_names(tune, backend)
    tune = "off" if deterministic() else tune
    inputs = check_inputs(model, example_input)
    case, choices, notes = _read(model, inputs, plan, tune, backend)
    if backend == "auto" and case.plan.layers:
        weight = next(iter(case.convs.values())).weight
        slower = passed_over(weight.dtype, weight.device)
        if slower is not None:
            notes.append(f"the fastest sparse kernel is left out: {slower}")
            warnings.warn(notes[-1], stacklevel=2)
    built = _agreeing(case, choices, notes)
    record = Record(
        type(case.work).__name__,
        backend,
        built.traced,
        built.sites if built.replaced else (),
        _rows(case, built),
        tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs),
        built.error,
        tuple(notes),
    )
    pure = built.traced or not (case.observed.varies or case.observed.stateful)
    plan = _plan_in_force(case.plan, built.choices)
    fast = AcceleratedModel(
        built.network, plan, record, graphs and pure, plain_attributes(case.work), public_names(case.work)
    )
    _check_replays(fast, case)
    return fast


def _read(
    model: nn.Module, inputs: tuple[Tensor, ...], plan: Plan | None, tune: str, requested: str
) -> tuple[Case, dict[str, Choice], list[str]]:
    """Learn what the model does and how its layers shall run; return that, the choices and notes."""
    copies: dict[int, Any] = {}
    work = working_copy(model, copies)
    convs = check_convs(work)
    model = unwrapped(model)
    if Snapshot(work).iterates:
        raise ValueError(
            f"{type(model).__name__} holds an iterator, whose place no copy can follow; keep a number instead"
        )
    observed = observe_model(model, inputs, copies)
    everything = [m.weight for m in work.modules() if isinstance(m, nn.Conv2d)]
    weight = everything[0]
    judge = Judge(model, observed, network_tolerance(observed.dtypes or {weight.dtype}, weight.device))
    if plan is None:
        cost = cost_model(requested, weight.dtype, weight.device, tune)
        plan = _plan_copy(work, model, judge, inputs, requested, cost)
    else:
        plan = fitting_plan(plan, convs)
    case = Case(work, convs, inputs, observed, judge, plan, tune, requested)
    return case, _choose_all(case), _remarks(case, wrappers(model))


def _plan_copy(
    work: nn.Module, model: nn.Module, judge: Judge, inputs: Sequence[Tensor], requested: str, cost: CostModel
) -> Plan:
    """Plan the copy of a model; ValueError if it does not run by itself, as the model did."""
    originals = set(model.modules())
    strangers: list[nn.Module] = []

    def look(module: nn.Module, args: object, output: object) -> None:
        if module in originals:
            strangers.append(module)

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        with preserved(work):
            plan = make_plan(
                work, tuple(x.clone() for x in inputs), cast(Backend, requested), cost, dense=True
            )
    except ValueError as error:
        problem = judge.verdict(work).problem
        if problem is not None:
            raise ValueError(_unlike_its_copy(model, problem)) from error
        raise
    finally:
        handle.remove()
    if strangers:
        raise ValueError(_unlike_its_copy(model, "it calls the layers of the given model"))
    return plan


def _unlike_its_copy(model: nn.Module, problem: str) -> str:
    return (
        f"a copy of {type(model).__name__} does not do what the model does: {problem}; it may keep state "
        "outside of itself (a closure, a global, another object), which has to become its own"
    )


def _agreeing(case: Case, choices: Choices, notes: list[str]) -> Built:
    """Return the fastest network that does what the model does; why not a faster one goes to the notes."""
    problem = _why_not_traced(case)
    if problem is None:
        try:
            built = _judged(case, _build(case, choices, _trace(case)))
        except TraceError as failure:
            problem = f"torch.fx could not trace the model ({failure})"
        else:
            problem = built.problem
            if problem is None:
                notes += built.notes
                return built
    notes.append(f"{problem}: convolutions are swapped in place, nothing is fused")
    built = _judged(case, _build(case, choices, None))
    problem = built.problem
    draws = case.observed.varies and not case.observed.stateful
    if problem is not None and draws and case.judge.verdict(built.network, values=False).problem is None:
        # The layers were compared one by one. What is left may be the same numbers in another order.
        notes += [*built.notes, "drawn in another order, the random numbers keep outputs from being compared"]
        return built
    sparse = {name: choice for name, choice in built.choices.items() if choice.backend != "dense"}
    if problem is not None and sparse:
        if case.requested != "auto":
            raise ValueError(
                f"{type(case.work).__name__} cannot run on the forced backend {case.requested!r}: {problem}; "
                'use backend="auto"'
            )
        dense = {n: Choice("dense", f"put back from {c.backend}: {problem}") for n, c in sparse.items()}
        notes += [*built.notes, f"every layer was put back to dense: {problem}"]
        built = _judged(case, _build(case, {**built.choices, **dense}, None))
        problem = built.problem
    notes += built.notes
    if problem is None:
        return built
    notes.append(f"even with dense layers {problem}: the model runs as it is")
    verdict = case.judge.verdict(case.work)
    if verdict.problem is not None:
        raise ValueError(_unlike_its_copy(case.work, verdict.problem))
    return dataclasses.replace(built, network=case.work, replaced=False, error=verdict.error, problem=None)


def _why_not_traced(case: Case) -> str | None:
    """Say why the model's own code has to run, where a graph would miss part of what it does."""
    hooked = [name for name, module in case.work.named_modules() if name and has_hooks(module)]
    if hooked:
        return f"module {hooked[0]!r} has forward hooks, which are kept"
    if case.observed.varies:
        return "two runs of the model on one input differ (random numbers, or state that it keeps)"
    return "forward switches autocast on" if case.observed.autocast else None


def _trace(case: Case) -> Traced:
    """Trace the model; TraceError if it cannot be, or the graph is another computation."""
    traced = trace(case.work, len(case.inputs))
    # Small images shrink to one pixel on the way, and of that no strides tell the format.
    other = case.observed.trials[-1].inputs if is_large(case.inputs) else case.inputs
    with preserved(traced):  # the graph writes to buffers that the network starts from
        shapes, output = record_shapes(traced, case.inputs)
        formats = record_formats(traced, shapes, case.inputs, other)
    # The graph has the model's own operators yet: what differs by more than a bit or two is another
    # computation, however little it shows on the example. (The model's hooks are not in the graph.)
    tolerance = _SAME_OPERATORS * case.judge.tolerance
    found = differences(outcome(output), case.observed.outcomes[0], tolerance)
    values = [one.what for one in found if one.values and one.flipped is None]
    if values and not has_hooks(case.work):
        raise TraceError(f"its graph is another computation: on the example {values[0]}")
    return Traced(traced, find_sites(traced, shapes), formats)


def _build(case: Case, choices: Choices, traced: Traced | None) -> Built:
    """Replace the convolutions, and put back to dense those whose output differs from the model's."""
    if traced is not None:
        sites = traced.sites
    else:
        sites = tuple(Site(name, name) for name in case.convs)

    def fused(choices: Choices, earlier: Mapping[str, FusedConv2d]) -> dict[str, FusedConv2d]:
        return {
            site.module: earlier[site.module]
            if site.module in earlier and earlier[site.module].backend == choices[site.layer].backend
            else _fuse(case, site, choices[site.layer].backend, traced is None)
            for site in sites
        }

    def compare(modules: Mapping[str, FusedConv2d]) -> Findings:
        if traced is not None:
            return compare_sites(traced.graph, sites, modules, case.inputs)
        return compare_calls(case.work, modules, case.inputs)

    modules = fused(choices, {})
    findings = compare(modules)
    notes = []
    if traced is None:
        notes = [
            f"layer {site.layer!r} is left as it is: not called on the example"
            for site in sites
            if site.module not in findings.pixels
        ]
        sites = tuple(site for site in sites if site.module in findings.pixels)
    back = _put_back(case, choices, sites, findings)
    if back:
        notes += [
            f"layer {n!r} was put back to dense from {choices[n].backend}: {p}" for n, p in back.items()
        ]
        reasons = {n: Choice("dense", f"put back from {choices[n].backend}: {p}") for n, p in back.items()}
        choices = {**choices, **reasons}
        modules = fused(choices, modules)
        findings = compare(modules)
    modules = {site.module: modules[site.module] for site in sites}
    network: nn.Module
    if traced is not None:
        network = rewrite(traced.graph, sites, modules, traced.formats)
        carry_hooks(case.work, network)
    else:
        network = swapped(case.work, modules)
    return Built(network, traced is not None, sites, choices, findings, tuple(notes))


def _put_back(case: Case, choices: Choices, sites: Sequence[Site], findings: Findings) -> dict[str, str]:
    """Return the layers that have to run dense and why; ValueError where the user forced their backend."""
    back = {}
    for site in sites:
        problem, backend = findings.problems.get(site.module), choices[site.layer].backend
        if problem is None or backend == "dense":
            continue
        if case.requested != "auto":
            raise ValueError(
                f"layer {site.layer!r} cannot run on the forced backend {backend!r}: {problem}; "
                'use backend="auto" to leave it dense'
            )
        back[site.layer] = problem
    return back


def _judged(case: Case, built: Built) -> Built:
    """Hold a network against its model."""
    verdict = case.judge.verdict(built.network)
    how = "the traced network" if built.traced else "the network"
    problem = None if verdict.problem is None else f"{how} differs from the model: {verdict.problem}"
    return dataclasses.replace(built, error=verdict.error, problem=problem)


def _fuse(case: Case, site: Site, backend: str, in_place: bool) -> FusedConv2d:
    return fuse(
        case.convs[site.layer],
        case.work.get_submodule(site.norm) if site.norm else None,
        layer=next((layer for layer in case.plan.layers if layer.name == site.layer), None),
        backend=backend,
        activation=site.activation,
        pool=site.pool,
        tune=case.tune,
        in_place=in_place,
    )


def _check_replays(fast: AcceleratedModel, case: Case) -> None:
    """Record the example's signature where replays are used; give them up if they compute otherwise."""
    shapes = [[x.shape for x in trial.inputs] for trial in case.observed.trials]
    pairs = ((a, b) for a in (0, 1) for b in (1, 2) if b > a and b < len(shapes) and shapes[a] == shapes[b])
    one, other = next(pairs, (0, 0))
    for replays in (fast.graphs, fast.tapes):
        if replays is None or not replays.applies(case.inputs):
            continue
        order = [one, other, one]  # plain, recorded, and replayed with other values
        if replays is fast.graphs and not fast.graphs.capture(fast.network, case.inputs):
            continue
        with preserved(fast.network):
            problem = case.judge.verdict(fast.forward, order).problem
        if problem is not None:
            replays.refuse(f"replayed, {problem}")
        elif replays is fast.tapes:
            replays.clear()  # what people call their network with is for them to say


def _plan_in_force(plan: Plan, choices: Choices) -> Plan:
    layers = [
        dataclasses.replace(layer, backend=choices[layer.name].backend, reason=choices[layer.name].reason)
        if layer.name in choices
        else layer
        for layer in plan.layers
    ]
    return dataclasses.replace(plan, layers=tuple(layers))


def _rows(case: Case, built: Built) -> tuple[LayerRow, ...]:
    layers = {layer.name: layer for layer in case.plan.layers}
    rows: dict[str, LayerRow] = {}
    for site in built.sites:
        choice = built.choices[site.layer]
        rows[site.module] = make_row(
            site,
            layers.get(site.layer),
            choice.backend,
            choice.reason,
            case.convs[site.layer].weight.numel() * built.findings.pixels[site.module],
            built.findings.errors.get(site.module),
            choice.measured_us,
        )
    return tuple(rows.values())


def _choose_all(case: Case) -> dict[str, Choice]:
    """Choose a backend for every fusible convolution; ValueError where a forced one cannot serve."""
    planned = {layer.name: layer for layer in case.plan.layers}
    skipped = dict(case.plan.skipped)
    choices = {}
    for name, conv in case.convs.items():
        if name not in planned:
            choices[name] = Choice("dense", skipped.get(name, "not in the plan"))
            continue
        weight = conv.weight
        choices[name] = choose(planned[name], weight.dtype, weight.device, case.tune, case.requested)
    return choices


def _remarks(case: Case, unwrapped_names: Sequence[str]) -> list[str]:
    """Say which convolutions are left as they are, and whether any could run sparse at all."""
    skipped = dict(case.plan.skipped)
    notes = [
        f"what wraps module {name!r} (torch.compile, DataParallel) is left out" for name in unwrapped_names
    ]
    notes += [
        f"layer {name!r} is left as it is: {skipped.get(name, f'a {type(module).__name__}')}"
        for name, module in case.work.named_modules()
        if isinstance(module, nn.Conv2d) and not is_fusible(module)
    ]
    if all(layer.topology.density == 1 for layer in case.plan.layers):
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
