"""Third step of accelerate: a network in which convolutions are replaced, layer by layer compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from lhc_triton.runtime.choosing.dispatch import Decision
from lhc_triton.runtime.network.copying import carry_hooks, drop_gradients, has_hooks
from lhc_triton.runtime.network.fusion import fuse, swapped
from lhc_triton.runtime.network.outputs import differences, outcome
from lhc_triton.runtime.network.reading import Case
from lhc_triton.runtime.network.sites import Site, find_sites, rewrite
from lhc_triton.runtime.network.snapshots import preserved
from lhc_triton.runtime.network.tracing import TraceError, record_formats
from lhc_triton.runtime.network.trials import is_large
from lhc_triton.runtime.network.verify import Findings, compare_calls, compare_sites
from lhc_triton.runtime.op.dense import FusedConv2d

_SAME_OPERATORS = 1e-2  # of the tolerance

Choices = Mapping[str, Decision]


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

    def noted(self, *before: str, after: tuple[str, ...] = ()) -> Built:
        """Return the same with more notes."""
        return dataclasses.replace(self, notes=(*before, *self.notes, *after))


def put_back(choice: Decision, problem: str) -> Decision:
    """Return the decision for dense in the place of one that did not work out."""
    return Decision("dense", f"put back from {choice.backend}: {problem}")


def trace_case(case: Case) -> Traced:
    """Return the model's graph; TraceError if it has none, or that is another computation."""
    graph, shapes = case.run.graph, case.run.shapes
    if graph is None:
        raise TraceError(case.run.untraced or "")
    # Small images shrink to one pixel on the way, and of that no strides tell the format.
    other = case.observed.trials[-1].inputs if is_large(case.inputs) else case.inputs
    with preserved(graph):  # it writes to buffers that the network starts from
        formats = record_formats(graph, shapes, case.inputs, other)
    # The graph has the model's own operators yet: what differs by more than a bit or two is another
    # computation, however little it shows on the example. (The model's hooks are not in the graph.)
    tolerance = _SAME_OPERATORS * case.judge.tolerance
    found = differences(outcome(case.run.output), case.observed.outcomes[0], tolerance)
    values = [one.what for one in found if one.values and one.flipped is None]
    if values and not has_hooks(case.work):
        raise TraceError(
            "torch.fx could not trace the model (its graph is another computation: "
            f"on the example {values[0]})"
        )
    return Traced(graph, find_sites(graph, shapes), formats)


def build(case: Case, choices: Choices, traced: Traced | None) -> Built:
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
        sites = tuple(site for site in sites if site.module in findings.pixels)
    back = _put_back(case, choices, sites, findings)
    if back:
        notes += [
            f"layer {n!r} was put back to dense from {choices[n].backend}: {p}" for n, p in back.items()
        ]
        reasons = {n: put_back(choices[n], p) for n, p in back.items()}
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
    drop_gradients(network)  # before it is judged: forward may ask
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


def judged(case: Case, built: Built) -> Built:
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
