"""Fourth step of accelerate: hold networks against the model until one does what it does."""

from __future__ import annotations

import dataclasses

from lhc_triton.runtime.network.accelerated import AcceleratedModel
from lhc_triton.runtime.network.building import (
    Built,
    Choices,
    build,
    judged,
    put_back,
    trace_case,
)
from lhc_triton.runtime.network.reading import Case, unlike_its_copy
from lhc_triton.runtime.network.snapshots import preserved
from lhc_triton.runtime.network.tracing import TraceError


def agreeing(case: Case, choices: Choices) -> Built:
    """Return the fastest network that does what the model does; its notes tell why none faster did.

    First the traced network is tried, then convolutions swapped in place, then all of them dense, and in the
    end the model runs as it is.

    Raises:
        ValueError: the backend was forced, and no network on it does; or not even the model's copy does.
    """
    traced = _traced(case, choices)
    if isinstance(traced, Built):
        return traced
    built = judged(case, build(case, choices, None))
    built = built.noted(f"{traced}: convolutions are swapped in place, nothing is fused")
    if built.problem is None:
        return built
    elusive = case.observed.varies and not case.observed.stateful
    if elusive and case.judge.verdict(built.network, values=False).problem is None:
        # The layers were compared one by one. What is left may be the same numbers in another order.
        random = "drawn in another order, the random numbers keep"
        hidden = "state that the model keeps where no copy can follow keeps"
        why = random if case.observed.random else hidden
        return built.noted(after=(f"{why} outputs from being compared",))
    built = _dense(case, built)
    return built if built.problem is None else _as_it_is(case, built)


def _traced(case: Case, choices: Choices) -> Built | str:
    """Return the traced network if it does what the model does, else why there is none that does."""
    try:
        built = judged(case, build(case, choices, trace_case(case)))
    except TraceError as failure:
        return str(failure)
    return built if built.problem is None else built.problem


def _dense(case: Case, built: Built) -> Built:
    """Return the network with every layer put back to dense, for one that differs from the model."""
    sparse = {name: choice for name, choice in built.choices.items() if choice.backend != "dense"}
    problem = built.problem or ""
    if not sparse:
        return built
    if case.requested != "auto":
        raise ValueError(
            f"{type(case.work).__name__} cannot run on the forced backend {case.requested!r}: {problem}; "
            'use backend="auto"'
        )
    dense = {name: put_back(choice, problem) for name, choice in sparse.items()}
    again = judged(case, build(case, {**built.choices, **dense}, None))
    return again.noted(*built.notes, f"every layer was put back to dense: {problem}")


def _as_it_is(case: Case, built: Built) -> Built:
    """Return the model's copy itself; ValueError if that differs from the model."""
    verdict = case.judge.verdict(case.work)
    if verdict.problem is not None:  # where its forward asks for gradients, it keeps them
        for parameter in case.trainable:
            parameter.requires_grad_(True)
        verdict = case.judge.verdict(case.work)
    if verdict.problem is not None:
        raise ValueError(unlike_its_copy(case.work, verdict.problem))
    built = built.noted(after=(f"even with dense layers {built.problem}: the model runs as it is",))
    return dataclasses.replace(built, network=case.work, replaced=False, error=verdict.error, problem=None)


def check_replays(fast: AcceleratedModel, case: Case) -> None:
    """Record the example's signature where replays are used; give them up if they compute otherwise."""
    shapes = [[(x.shape, x.stride()) for x in trial.inputs] for trial in case.observed.trials]
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
