"""Tries accelerate() on random networks: it may refuse, or compute what the model computes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from oracle import norm_error
from random_comparison import Difference, difference, leaf_difference, leaves
from random_networks import Call, Case, Network, draw_case, draw_network
from torch import Tensor, nn

import lhc_triton as lhc

# What the model itself rounds to, and by how much its weights are shaken where that may explain a difference.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SHAKE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
_MODES: tuple[Any, ...] = (torch.no_grad, torch.no_grad, torch.inference_mode, torch.enable_grad)


@dataclass(frozen=True)
class Outcome:
    """What one trial showed.

    Attributes:
        seed: draws the same trial again.
        backend: that was asked for.
        description: the network.
        verdict: "same"; "random": of equal kind, values not compared; "refused"; "unstable": rounding alone
            moves the model's output that far; "no network": the model refuses its example; or "wrong".
        problem: what is wrong, or why it was refused.
        sparse: convolutions that run sparse.
        notes: of the accelerated network.
    """

    seed: int
    backend: str
    description: str
    verdict: str
    problem: str = ""
    sparse: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, backend {self.backend!r}: {self.verdict}", self.description]
        lines += [self.problem] if self.problem else []
        return "\n  ".join([*lines, *(f"note: {note}" for note in self.notes)])


def try_seed(seed: int) -> Outcome:
    """Accelerate the network of a seed, and compare a sequence of calls with the untouched model's."""
    seen: dict[str, Tensor] = {}
    model = draw_network(seed, seen)
    case = draw_case(seed, model)
    about = (seed, case.backend, model.description)
    try:
        _call_before(model, case)
        _call_before(draw_network(seed), case, more=1)
    except Exception as error:
        return Outcome(*about, "no network", f"{type(error).__name__}: {error}")
    before, example = _state(model), case.example.copied()
    try:
        fast = lhc.accelerate(model, example.arguments, tune="off", backend=case.backend)
    except (ValueError, TypeError) as error:
        verdict = "refused" if _may_refuse(model, case, str(error)) else "wrong"
        return Outcome(*about, verdict, f"refused: {error}")
    except Exception as error:
        return Outcome(*about, "wrong", f"accelerate() raised {type(error).__name__}: {error}")
    report = fast.report()
    ran = (report["totals"]["sparse_layers"], tuple(report["notes"]))
    changed = _first_change(before, _state(model))
    if changed:
        return Outcome(*about, "wrong", f"accelerate() changed the model's {changed}", *ran)
    if not _equal(example.arguments, case.example.arguments):
        return Outcome(*about, "wrong", "accelerate() changed the example", *ran)
    if model.random and any("put back" in note for note in report["notes"]):
        return Outcome(*about, "wrong", "random at every call, and blamed for it", *ran)
    verdict, problem = _Comparison(case, fast, seen).run()
    return Outcome(*about, verdict, problem, *ran)


def _call_before(network: Network, case: Case, more: int = 0) -> None:
    """Call a network as often as it was called before it is accelerated."""
    training = {module: module.training for module in network.modules()}
    network.eval()  # which some models answer with None
    with torch.no_grad():
        for call in [case.example, case.calls[1]][: case.before + more]:
            network(*call.copied().arguments)
    for module, mode in training.items():
        module.training = mode


def _may_refuse(model: Network, case: Case, line: str) -> bool:
    """Return whether a refusal is one: of a forced backend, or of a forward that changes weights."""
    if "\n" in line or (model.random and "differs by" in line):
        return False
    return case.backend != "auto" or "writes to its parameter" in line


class _Comparison:
    """Calls the accelerated network and an untouched twin of the model in turn."""

    def __init__(self, case: Case, fast: nn.Module, seen: dict[str, Tensor]) -> None:
        self.case = case
        self.fast = fast
        self.seen = seen
        self.twin_seen: dict[str, Tensor] = {}
        self.twin = draw_network(case.seed, self.twin_seen)
        self.twin.eval()
        _call_before(self.twin, case)
        self.tolerance = _TOLERANCE[_coarsest(self.twin)]
        self.values = not self.twin.random
        self.mode = random.Random(f"mode of {case.seed}").choice(_MODES)
        self.kept: list[tuple[str, Any, dict[str, Tensor], Any]] = []

    def run(self) -> tuple[str, str]:
        """Return the verdict and the problem, "" for none."""
        fine = "same" if self.values else "random"
        for place, call in enumerate(self.case.calls):
            theirs = call.copied()
            self.twin_seen.clear()
            try:
                with self.mode():
                    expected = self.twin(*theirs.arguments, **theirs.keywords)
            except Exception:  # nor does it have to work accelerated
                break
            problem = self._compare(call, expected, theirs)
            if problem == "":
                break
            if isinstance(problem, str):
                return "wrong", f"{call.what} (call {place}): {problem}"
            if problem is not None:
                unstable = _rounding_explains(self.case, place, expected, problem)
                return "unstable" if unstable else "wrong", f"{call.what} (call {place}): {problem.text}"
        for what, result, copied, expected in self.kept:
            changed = _first_change(copied, _tensors(result))
            if changed and difference(result, expected, self.tolerance):
                return "wrong", f"{what}: its output {changed} was changed by a later call"
        return fine, ""

    def _compare(self, call: Call, expected: Any, theirs: Call) -> Difference | str | None:
        """Return how a call differs from the twin's; "" for one that is refused as it may be."""
        mine = call.copied()
        self.seen.clear()
        try:
            with self.mode():
                result = self.fast(*mine.arguments, **mine.keywords)
        except Exception as error:
            line = str(error)
            may = call.beyond and isinstance(error, TypeError) and "\n" not in line
            return "" if may else f"raised {type(error).__name__}: {line[:200]}"
        found = difference(result, expected, self.tolerance, values=self.values)
        if found is not None:
            return found
        found = difference(self.seen, self.twin_seen, self.tolerance, values=self.values, strides=False)
        if found is not None:
            return f"what hooks of the caller's see: {found.text}"
        if not _equal(mine.arguments, theirs.arguments):
            return "the caller's input is left otherwise than by the model"
        if self.case.overwrite:
            self._overwrite(result, expected, theirs)
        else:
            self.kept.append((call.what, result, _tensors(result), expected))
        return None

    def _overwrite(self, result: Any, expected: Any, theirs: Call) -> None:
        """Write into both outputs, but for those that are the model's own tensors or its inputs."""
        own = _memory((*self.twin.parameters(), *self.twin.buffers(), *theirs.arguments))
        left, right = _tensors(result, False), _tensors(expected, False)
        with self.mode():
            for place, tensor in right.items():
                if not _memory((tensor,)) & own and tensor.is_floating_point() and 0 not in tensor.stride():
                    left[place].mul_(-3)
                    tensor.mul_(-3)


def _coarsest(network: Network) -> torch.dtype:
    """Return the coarsest type that a network computes in."""
    return torch.bfloat16 if "in_autocast" in network.description else network.fc.weight.dtype


def _rounding_explains(case: Case, place: int, expected: Any, problem: Difference) -> bool:
    """Return whether the model's own output moves about as far when its weights move by a rounding error."""
    if problem.amount == float("inf"):
        return False
    leaf = dict(leaves(expected))[problem.place]
    for seed in range(6):
        shaken = draw_network(case.seed)
        shaken.eval()
        _call_before(shaken, case)
        generator = torch.Generator().manual_seed(seed)
        scale = _SHAKE[_coarsest(shaken)]
        with torch.no_grad():
            for value in shaken.parameters():
                value.mul_(1 + scale * torch.randn(value.shape, generator=generator, dtype=value.dtype))
            for call in case.calls[: place + 1]:
                again = call.copied()
                result = shaken(*again.arguments, **again.keywords)
        found = leaf_difference(dict(leaves(result)).get(problem.place), leaf, 0.0)
        if found is not None and problem.amount / 10 < found.amount < float("inf"):
            return True
    return False


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _tensors(value: Any, copied: bool = True) -> dict[str, Tensor]:
    found = {place: leaf for place, leaf in leaves(value) if isinstance(leaf, Tensor)}
    return {place: leaf.clone() for place, leaf in found.items()} if copied else found


def _equal(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    return all(norm_error(a, b) == 0 for a, b in zip(mine, theirs, strict=True))


def _state(model: nn.Module) -> dict[str, Any]:
    """Return what accelerate() must leave as it is."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                for k, tensor in value.items():
                    found[f"{name}.{k} itself"] = id(tensor)
                    found[f"{name}.{k}"] = None if tensor is None else tensor.detach().clone()
            elif isinstance(value, Mapping):
                found[f"{name}.{key}"] = list(value)
            elif isinstance(value, bool | int | float | str | None):
                found[f"{name}.{key}"] = value
            else:
                found[f"{name}.{key}"] = id(value)
    return found


def _first_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Name the first value that is another one; NaN counts as equal to itself."""
    if before.keys() != after.keys():
        return ", ".join(sorted(before.keys() ^ after.keys()))
    for name, value in before.items():
        other = after[name]
        if not (norm_error(other, value) == 0 if isinstance(value, Tensor) else value == other):
            return name or "whole"
    return None
