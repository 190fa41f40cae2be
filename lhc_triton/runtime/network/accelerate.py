"""accelerate(): from a trained model and its plan to a network that runs on the chosen backends.

It is five steps, each a function from values to values: read, choose, build, verify, report. With
dtype="int8" what was built and verified is quantised before the report, layer by layer.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Literal

from torch import Tensor, nn

from lhc_triton.generators import generators_kept
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.planner import BackendName
from lhc_triton.runtime.choosing.dispatch import Decision, Tune, decide
from lhc_triton.runtime.choosing.launch_configs import deterministic
from lhc_triton.runtime.network.accelerated import AcceleratedModel, plain_attributes, public_names
from lhc_triton.runtime.network.agreeing import agreeing, check_replays
from lhc_triton.runtime.network.arguments import check_inputs, check_names
from lhc_triton.runtime.network.building import Built, Choices
from lhc_triton.runtime.network.calling import settled
from lhc_triton.runtime.network.copying import uncompiled
from lhc_triton.runtime.network.int8 import Int8Conv2d
from lhc_triton.runtime.network.left_out import left_layers
from lhc_triton.runtime.network.quantising import check_dtype, quantised
from lhc_triton.runtime.network.reading import Case, read
from lhc_triton.runtime.network.record import LayerRow, Record, make_row
from lhc_triton.runtime.network.trials import gpus_of


def accelerate(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    plan: Plan | None = None,
    tune: Tune = "cached",
    backend: BackendName = "auto",
    graphs: bool = True,
    dtype: Literal["int8"] | None = None,
) -> AcceleratedModel:
    """Return a network for inference that computes what ``model`` computes, and skips its dead weights.

    Convolutions with a topology (LHCConv2d, or nn.Conv2d with structured zeros) go to a sparse backend where
    it is faster, the others stay dense. Where torch.fx can trace the model, batch norm is folded and bias,
    residual, ReLU or SiLU, and 2x2 max pool run in the convolutions' epilogues; activations are channels_last
    inside, and outputs have the memory format that the model gives them.

    Filters and channels that do nothing are removed first, as ``lhc.shrink`` does, where that is predicted to
    be faster: with backend="auto" and a plan that is made here.

    Every layer is compared with the model's on ``example_input``; what differs is put back to dense. The
    whole network then runs beside the untouched model on the example, on other values of its kind, and on
    another batch, image size and memory format where the model takes them, the last one twice; every output
    is compared.
    What differs is given up: first the traced network, for convolutions that are swapped in place, then the
    sparse backends, then everything. ``explain()`` tells why. The model is copied and left as it was. Its
    forward hooks go with the copy; where modules inside have hooks, convolutions are swapped in place. What
    its code keeps in classes and global variables is shared, as instances of one class share it. Where
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
        dtype: None keeps the model's own; "int8" quantises a float32 model after training: in convolutions
            that a sparse backend runs (on the CPU those without zeros, too, where that is faster), weights
            have a step per filter, activations one per tensor: those that lose least of the weights, and of
            the layer's input on ``example_input``, which should then be a batch of real images. A layer whose
            output on its float32 input is off by more than 0.05 (norm error) stays in float32, as do those
            with the largest effect on the network's output while that is off by more than 0.15 on the
            example. All errors are in ``explain()`` and ``report()``.

    Raises:
        ValueError: the model has no convolution, NaN weights or an unfinished mask warm-up; it does not take
            the example; it cannot be copied, or a copy computes something else; the plan is for another
            model; a forced backend cannot serve a layer, or the network; ``dtype`` is another one, or the
            model's or the backend's does not go with it.
        TypeError: an argument has another type.
    """
    check_names(tune, backend)
    inputs = check_inputs(model, example_input)
    check_dtype(dtype, model, backend)
    tune = "off" if deterministic() else tune
    gpus = gpus_of(inputs)
    with uncompiled(), generators_kept(gpus):
        case = read(model, inputs, plan, tune, backend)
        if case.slower is not None:
            warnings.warn(_left_out(case.slower), stacklevel=2)
        built = agreeing(case, choose(case))  # builds and verifies, from the fastest network down
        if dtype == "int8":
            case, built = quantised(case, built, own_plan=plan is None)
    pure = built.traced or not (case.observed.varies or case.observed.stateful)
    fast = AcceleratedModel(
        built.network,
        plan_in_force(case.plan, built.choices),
        report(case, built),
        graphs and pure,
        plain_attributes(case.work),
        public_names(case.work),
        settled(case.work, len(case.inputs)),
    )
    with generators_kept(gpus):
        check_replays(fast, case)
    return fast


def choose(case: Case) -> dict[str, Decision]:
    """Choose a backend for every fusible convolution; ValueError where a forced one cannot serve."""
    planned = {layer.name: layer for layer in case.plan.layers}
    skipped = dict(case.plan.skipped)
    return {
        name: decide(planned[name], conv.weight.dtype, conv.weight.device, case.tune, case.requested)
        if name in planned
        else Decision("dense", skipped.get(name, "not in the plan"))
        for name, conv in case.convs.items()
    }


def report(case: Case, built: Built) -> Record:
    """Tell how the network was made."""
    slower = () if case.slower is None else (_left_out(case.slower),)
    return Record(
        type(case.work).__name__,
        case.requested,
        built.traced,
        built.sites if built.replaced else (),
        _rows(case, built),
        tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in case.inputs),
        built.error,
        (*case.remarks, *left_layers(case.work, case.plan, built.sites), *slower, *built.notes),
    )


def _dtype_of(built: Built, name: str) -> str:
    module = built.network.get_submodule(name)
    if isinstance(module, Int8Conv2d):
        return "int8"
    weight = module.weight
    assert isinstance(weight, Tensor)
    return str(weight.dtype).removeprefix("torch.")


def _left_out(why: str) -> str:
    return f"the fastest sparse kernel is left out: {why}"


def plan_in_force(plan: Plan, choices: Choices) -> Plan:
    """Return the plan with what was chosen in the end."""
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
            choice.time_us,
            _dtype_of(built, site.module),
        )
    return tuple(rows.values())
