"""Further inputs of the example's kind, and what a network makes of them.

A network that agrees with its model on one input may still have that input baked in. So both run the same
sequence: the example, other values of its kind, another batch and image size, and the last of these twice.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lhc_triton.conversion import evaluating
from lhc_triton.errors import one_line
from lhc_triton.generators import generators_kept
from lhc_triton.runtime.network.outputs import Outcome, differences, outcome
from lhc_triton.runtime.network.snapshots import Snapshot, parameter_values, restore_parameters, same_state

_MAX_RANGE = 1 << 24  # of distinct integers
_LARGE = 1 << 17  # values
MIN_SIDE = 8  # smaller images are not made smaller


@dataclass(frozen=True)
class Trial:
    """One call: its label for people, and the positional arguments."""

    label: str
    inputs: tuple[Tensor, ...]

    def copies(self) -> tuple[Tensor, ...]:
        """Return inputs that a run may write to, in the same memory formats."""
        return tuple(value.clone() for value in self.inputs)


@dataclass(frozen=True)
class Observed:
    """What a model does on a sequence of trials.

    Attributes:
        trials: those that the model takes, the example first.
        outcomes: one for each.
        random: whether it drew from one of the common random generators.
        varies: whether it did, or the same input gave another output the second time.
        stateful: whether it leaves buffers or attributes changed.
        autocast: whether convolutions ran under autocast that ``forward`` switches on.
        dtypes: types of the convolutions' results.
    """

    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    random: bool
    varies: bool
    stateful: bool
    autocast: bool
    dtypes: frozenset[torch.dtype]


def further_trials(inputs: Sequence[Tensor]) -> Iterator[tuple[Trial, ...]]:
    """Yield what else to try, each as alternatives of which the first that the model takes counts.

    Other values of the example's size and then another size and batch; of a large example both are smaller.
    """
    yield _alternatives(inputs, 1) if is_large(inputs) else (Trial("other values", _drawn(inputs, 1)),)
    yield _alternatives(inputs, 2)


def is_large(inputs: Sequence[Tensor]) -> bool:
    """Return whether smaller inputs stand in for an example where they can, to save time."""
    return sum(x.numel() for x in inputs) > _LARGE


def _alternatives(inputs: Sequence[Tensor], seed: int) -> tuple[Trial, ...]:
    """Return trials of another batch and size, of which a model takes what it can.

    Each comes in the image's other memory format first, for whoever reads strides.
    """
    image = _image(inputs)
    same = Trial("other values, again", _drawn(inputs, seed + 2))
    if image is None:
        return (same,)
    height, width = image.shape[-2:]
    other = (1 if image.shape[0] > 1 else 2) if image.dim() > 3 else 0
    batch = f"batch {other}" if other else "an image"
    sizes = [(_smaller(height, 0.3), _smaller(width, 0.45)), (_smaller(height, 0.5), _smaller(width, 0.75))]
    trials = [
        Trial(f"{batch} of {h}x{w} pixels", _drawn(inputs, seed, image, other, (h, w)))
        for h, w in sizes
        if (h, w) != (height, width)
    ]
    if other:
        trials.append(Trial(batch, _drawn(inputs, seed, image, other)))
    both = (one for trial in trials for one in (_in_other_format(trial, image), trial) if one is not None)
    return (*both, same)


def _image(inputs: Sequence[Tensor]) -> Tensor | None:
    """Return the input that is an image, its height and width last: the likeliest that there is."""
    for dims, floats in (((4,), True), ((4,), False), ((3, 5), True)):
        for value in inputs:
            if value.dim() in dims and value.is_floating_point() == floats and value.dtype != torch.bool:
                return value
    return None


def _in_other_format(trial: Trial, image: Tensor) -> Trial | None:
    """Return a trial with all images in the format that ``image`` has not; None where there is no other."""
    if image.dim() != 4:
        return None
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    name, other = ("contiguous", torch.contiguous_format) if last else ("channels_last", torch.channels_last)
    turned = (x.contiguous(memory_format=other) if x.dim() == 4 else x for x in trial.inputs)
    return Trial(f"{trial.label}, {name}", tuple(turned))


def _smaller(side: int, share: float) -> int:
    """Return a smaller side, a multiple of 32 (or of 4) as networks that halve their images like it."""
    step = 32 if side >= 96 else 4
    return side if side <= MIN_SIDE else max(step, int(side * share) // step * step)


def _drawn(
    inputs: Sequence[Tensor],
    seed: int,
    image: Tensor | None = None,
    batch: int = 0,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:
    """Return inputs like these with other values, and with another batch and image size where asked for.

    What has the image's batch gets the other one; what has its height and width, too, gets the other size.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for value in inputs:
        shape = list(value.shape)
        if image is not None and batch and value.dim() > 0 and value.shape[0] == image.shape[0]:
            shape[0] = batch
        if (
            image is not None
            and size is not None
            and value.dim() >= 3
            and value.shape[-2:] == image.shape[-2:]
        ):
            shape[-2:] = size
        drawn.append(_resampled(value, shape, generator, seed))
    return tuple(drawn)


def _resampled(value: Tensor, shape: Sequence[int], generator: torch.Generator, seed: int) -> Tensor:
    """Return a tensor of that shape with values drawn from ``value``; constant floats get noise.

    Integers come from the whole range of the given ones, and are distinct where those are. Every second draw
    of floats is mirrored between their extremes, which keeps the range and moves the mean.
    """
    flat = value.reshape(-1)
    count = int(np.prod(shape))
    if value.dtype != torch.bool and not value.is_floating_point() and not value.is_complex():
        least, above = int(flat.min()), int(flat.max()) + 1
        distinct = flat.unique().numel() == flat.numel() > 1 and above - least >= count
        if distinct and above - least <= _MAX_RANGE:
            numbers = least + torch.randperm(above - least, generator=generator)[:count]
        else:
            numbers = torch.randint(least, above, (count,), generator=generator)
        return numbers.reshape(tuple(shape)).to(value.device, value.dtype)
    picks = torch.randint(flat.numel(), (count,), generator=generator).to(value.device)
    fresh = flat[picks].reshape(tuple(shape))
    if value.is_floating_point():
        low, high = flat.min(), flat.max()
        if bool(low == high):
            fresh = fresh + torch.randn(tuple(shape), generator=generator).to(value.device, value.dtype)
        elif seed % 2 == 0:
            fresh = (low + high) - fresh
    like = value.dim() == 4 == fresh.dim() and value.is_contiguous(memory_format=torch.channels_last)
    if like and not value.is_contiguous():
        fresh = fresh.contiguous(memory_format=torch.channels_last)
    return fresh


@contextmanager
def seeded(seed: int, gpus: Sequence[int] = ()) -> Iterator[Callable[[], bool]]:
    """Start every common random generator at a seed, and put them back afterwards.

    What it yields tells whether any has been used since.
    """

    def states() -> list[Any]:
        mine = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()]
        return [*mine, *map(torch.cuda.get_rng_state, gpus)]

    with generators_kept(gpus):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        start = states()
        yield lambda: not all(map(same_state, start, states()))


def observe_model(
    model: nn.Module, inputs: Sequence[Tensor], copies: Mapping[int, Any] | None = None
) -> Observed:
    """Run a model through its trials, in eval mode, and give it back as it was.

    Args:
        model: the model.
        inputs: the example.
        copies: copies of its parameters by their ids, which save making others.

    Raises:
        ValueError: it does not take the example, or writes to its parameters.
    """
    convs = {m for m in model.modules() if isinstance(m, nn.Conv2d)}
    dtypes: set[torch.dtype] = set()
    autocast: list[bool] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if module in convs and isinstance(output, Tensor):
            dtypes.add(output.dtype)
            autocast.append(torch.is_autocast_enabled(output.device.type))

    outside = torch.is_autocast_enabled(inputs[0].device.type)
    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        with evaluating(model):
            start, parameters = Snapshot(model), parameter_values(model, copies or {})
            try:
                trials, outcomes = _run_trials(model, inputs)
                stateful = start.changed()
            finally:
                start.restore()
                written = restore_parameters(model, parameters)
    finally:
        handle.remove()
    if written:
        raise ValueError(
            f"forward of {type(model).__name__} writes to its parameter {written[0]!r}, which accelerated "
            "layers would not see; compute the weight once, before accelerate()"
        )
    drawn = any(one.random for one in outcomes)
    varies = drawn or bool(differences(outcomes[-1], outcomes[-2], 0.0))
    forward_casts = any(autocast) and not outside
    return Observed(tuple(trials), tuple(outcomes), drawn, varies, stateful, forward_casts, frozenset(dtypes))


def _run_trials(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Trial], list[Outcome]]:
    """Run a model on the example and whatever further trials it takes; the last one comes twice."""
    trials = [Trial("the example", tuple(inputs))]
    found = _call(model, trials[0], 0)
    if isinstance(found, str):
        shapes = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in inputs)
        raise ValueError(f"{type(model).__name__} does not take example_input {shapes}: {found}")
    outcomes = [found]
    for alternatives in further_trials(inputs):
        for trial in alternatives:
            before = Snapshot(model)
            found = _call(model, trial, len(trials))
            if not isinstance(found, str):
                trials.append(trial)
                outcomes.append(found)
                break
            before.restore()  # a call that was refused may have left something behind
    again = _call(model, trials[-1], len(trials))
    trials.append(trials[-1])
    outcomes.append(outcomes[-1] if isinstance(again, str) else again)
    return trials, [outcome.closed() for outcome in outcomes]


def observe(network: Callable[..., Any], trials: Sequence[Trial]) -> list[Outcome | str]:
    """Run a network through a model's trials, from the same random seeds.

    Returns:
        One outcome for each trial, or what went wrong, in one line; nothing after the first that did.
    """
    found: list[Outcome | str] = []
    with torch.no_grad():
        for seed, trial in enumerate(trials):
            found.append(_call(network, trial, seed))
            if isinstance(found[-1], str):
                break
    return [one if isinstance(one, str) else one.closed() for one in found]


def _call(network: Callable[..., Any], trial: Trial, seed: int) -> Outcome | str:
    """Return the outcome of one call, or the first line of what it raised."""
    inputs = trial.copies()
    try:
        with seeded(seed, gpus_of(trial.inputs)) as used:
            found = outcome(network(*inputs), trial.inputs, inputs)
            return dataclasses.replace(found, random=used())
    except Exception as error:  # foreign code: whatever it raises becomes one line
        return one_line(error)


def gpus_of(inputs: Sequence[Tensor]) -> list[int]:
    """Return the numbers of the GPUs that inputs are on."""
    return sorted({x.get_device() for x in inputs if x.is_cuda})
