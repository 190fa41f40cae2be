"""First step of accelerate: learn what the model does, and plan it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lhc_triton.planning.cost import CostModel, itemsize_of
from lhc_triton.planning.extract import Reading, call_geometries, read_model, reread_model
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.planner import BackendName, plan_reading
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.calibration import cost_model
from lhc_triton.runtime.choosing.dispatch import passed_over
from lhc_triton.runtime.network.arguments import check_convs, fitting_plan
from lhc_triton.runtime.network.copying import path_to_unwrapped, unwrapped, working_copy, wrappers
from lhc_triton.runtime.network.following import ExampleRun
from lhc_triton.runtime.network.left_out import remarks
from lhc_triton.runtime.network.sites import is_fusible
from lhc_triton.runtime.network.smaller import smaller
from lhc_triton.runtime.network.snapshots import Snapshot, preserved
from lhc_triton.runtime.network.trials import Observed, is_large, observe_model
from lhc_triton.runtime.network.verify import Judge
from lhc_triton.runtime.op.accuracy import network_tolerance


@dataclass(frozen=True)
class Case:
    """What is to be accelerated, and what is known of it; nothing here changes any more.

    Attributes:
        work: the copy of the model, in eval mode, without the filters and channels that do nothing.
        convs: its convolutions that can be replaced, by name.
        inputs: the example.
        observed: what the model itself does.
        judge: holds networks against that.
        run: of the copy on the example.
        plan: of the convolutions.
        tune, requested: what ``accelerate`` was asked for.
        remarks: what people should know before any choice is made, one line each.
        trainable: its parameters that have gradients, in the model and so at first in the copy.
        slower: why the device's fastest sparse kernel is not to be had, or None.
    """

    work: nn.Module
    convs: Mapping[str, nn.Conv2d]
    inputs: tuple[Tensor, ...]
    observed: Observed
    judge: Judge
    run: ExampleRun
    plan: Plan
    tune: str
    requested: str
    remarks: tuple[str, ...]
    slower: str | None
    trainable: tuple[nn.Parameter, ...]


def read(model: nn.Module, inputs: tuple[Tensor, ...], plan: Plan | None, tune: str, requested: str) -> Case:
    """Learn what the model does and how its layers shall run.

    Raises:
        ValueError: the model cannot be copied, a copy computes something else, or the plan is another's.
    """
    copies: dict[int, Any] = {}
    work = working_copy(model, copies)
    convs = check_convs(work)
    given, model = model, unwrapped(model)
    if Snapshot(work).iterates:
        raise ValueError(
            f"{type(model).__name__} holds an iterator, whose place no copy can follow; keep a number instead"
        )
    observed = observe_model(model, inputs, copies)
    weight = next(m.weight for m in work.modules() if isinstance(m, nn.Conv2d))
    judge = Judge(model, observed, network_tolerance(observed.dtypes or {weight.dtype}, weight.device))
    removed: tuple[str, ...] = ()
    run = ExampleRun(work, observed)
    elsewhere = run.elsewhere
    if plan is None:
        cost = cost_model(requested, weight.dtype, weight.device, tune)
        planned = _plan_copy(work, model, judge, inputs, requested, cost, run)
        # A forced backend is to run the layers as they are.
        quick = observed.trials[-1].inputs if is_large(inputs) else inputs
        small = smaller(work, quick, run.graph) if requested == "auto" else None
        if small is not None:
            fewer = _planned(reread_model(small.work, planned.reading), requested, planned.plan.layers)
            # Blocks of zeros that no longer lie in line may cost more than a few filters less gain.
            faster = fewer.predicted_us < planned.predicted_us
            # Two trials tell whether it computes the same: the example, and another size in another format.
            # What is built of it goes through all of them.
            ends = (0, len(observed.trials) - 1)
            if faster and judge.verdict(small.work, ends).problem is None:
                work, removed, planned = small.work, (small.remark,), fewer
                convs, run = check_convs(work), ExampleRun(work, observed)
                with preserved(work):
                    run(*inputs)
        plan = planned.plan
    else:
        plan = fitting_plan(_without(path_to_unwrapped(given), plan), convs)
        with preserved(work):
            call_geometries(work, inputs, elsewhere, run)
    slower = None
    if requested == "auto" and plan.layers:
        first = next(iter(convs.values())).weight
        slower = passed_over(first.dtype, first.device)
    left = any(isinstance(m, _ConvNd) and not is_fusible(m) for m in work.modules())
    told = (*remarks(plan, wrappers(given), elsewhere.calls, left), *removed)
    trainable = tuple(p for p in work.parameters() if p.requires_grad and p.is_leaf)
    return Case(work, convs, inputs, observed, judge, run, plan, tune, requested, told, slower, trainable)


def _without(prefix: str, plan: Any) -> Any:
    """Return a plan with the names of what was wrapped: one that was made for the wrapper has longer ones."""
    if not isinstance(plan, Plan) or not prefix:
        return plan

    def inner(name: str) -> str:
        return f"{name}.".removeprefix(prefix).removesuffix(".")

    layers = []
    for layer in plan.layers:
        topology = dataclasses.replace(layer.topology, name=inner(layer.name))
        layers.append(dataclasses.replace(layer, topology=topology))
    skipped = tuple((inner(name), why) for name, why in plan.skipped)
    return dataclasses.replace(plan, layers=tuple(layers), skipped=skipped)


@dataclass(frozen=True)
class _Planned:
    plan: Plan
    reading: Reading

    @property
    def predicted_us(self) -> float:
        """Of all convolutions with groups=1, those that stay dense among them."""
        layers = {layer.name: layer for layer in self.plan.layers}
        itemsize = itemsize_of(self.reading.dtype)
        return sum(
            layers[name].predicted_us[layers[name].backend]
            if name in layers
            else self.reading.cost.dense_us(geometry, itemsize)
            for name, geometry in self.reading.geometries.items()
        )


def _planned(reading: Reading, requested: str, known: Sequence[LayerPlan] = ()) -> _Planned:
    return _Planned(plan_reading(reading, cast(BackendName, requested), dense=True, known=known), reading)


def _plan_copy(
    work: nn.Module,
    model: nn.Module,
    judge: Judge,
    inputs: Sequence[Tensor],
    requested: str,
    cost: CostModel,
    run: ExampleRun,
) -> _Planned:
    """Plan the copy of a model; ValueError if it does not run by itself, as the model did."""
    originals = set(model.modules())
    strangers: list[nn.Module] = []

    def look(module: nn.Module, args: object, output: object) -> None:
        if module in originals:
            strangers.append(module)

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        with preserved(work):
            reading = read_model(work, tuple(inputs), cost, requested, watch=run.elsewhere, run=run)
        planned = _planned(reading, requested)
    except ValueError as error:
        problem = judge.verdict(work).problem
        if problem is not None:
            raise ValueError(unlike_its_copy(model, problem)) from error
        raise
    finally:
        handle.remove()
    if strangers:
        raise ValueError(unlike_its_copy(model, "it calls the layers of the given model"))
    return planned


def unlike_its_copy(model: nn.Module, problem: str) -> str:
    """Say that a copy of the model computes something else, and what to do about it."""
    return (
        f"a copy of {type(model).__name__} does not do what the model does: {problem}; it may keep state "
        "outside of itself (a closure, a global, another object), which has to become its own"
    )
