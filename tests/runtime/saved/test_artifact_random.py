"""Random networks through files: the same outputs, types and strides included, or a refusal in one line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from fuzzing import CASES, FIRST
from random_comparison import difference
from random_networks import Case, Network, draw_case, draw_network

import lhc_triton as lhc


def called(network: Any, call: Any) -> tuple[Any, str]:
    """Return a call's output, or the type of its error."""
    torch.manual_seed(0)
    copied = call.copied()
    try:
        with torch.no_grad():
            return network(*copied.arguments, **copied.keywords), ""
    except Exception as error:
        return None, type(error).__name__


def with_other_numbers(seed: int) -> Network:
    """Return the network of a seed, every parameter and buffer another one."""
    network = draw_network(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network


def problem(seed: int, path: Path) -> str | None:
    """Say what is wrong with the network of a seed once it has been saved and loaded; None if nothing."""
    model = draw_network(seed)
    case: Case = draw_case(seed, model)
    try:
        fast = lhc.accelerate(model, case.calls[0].copied().arguments, tune="off", backend=case.backend)
    except (ValueError, TypeError):
        return None  # what accelerate refuses is not saved either
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lhc.save(fast, path)
    by_layers = any("load() will need model=" in str(warning.message) for warning in caught)
    again = lhc.load(path, with_other_numbers(seed) if by_layers else None)
    if model.random:
        return None
    for call in case.calls:
        (theirs, their_error), (mine, my_error) = called(fast, call), called(again, call)
        if their_error or my_error:
            if bool(their_error) != bool(my_error):
                return f"{call.what}: {my_error or 'no error'} instead of {their_error or 'none'}"
            continue
        found = difference(mine, theirs, 1e-6)
        if found is not None:
            return f"{call.what}: {found.text}"
    return None


def test_a_saved_and_loaded_network_does_what_it_did(tmp_path: Path) -> None:
    wrong = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(FIRST, FIRST + (CASES + 1) // 2):  # each takes as long as ten damaged files
            found = problem(seed, tmp_path / "net")
            if found is not None:
                wrong[seed] = found
    assert not wrong
