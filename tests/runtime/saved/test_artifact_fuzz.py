"""Damaged artefacts, at random but seeded: an error in one line or a network, in little memory and time."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_files import document_of, quick, rewrite_file, run
from fuzzing import CASES, FIRST, attempt, bits, cut, header, little_room, named
from runtime_networks import image, resnet, shared, untraceable, vgg
from torch import Tensor, nn

from lhc_triton.artifact import ArtifactError, load, save
from lhc_triton.runtime.saved.sealed_file import sealed

BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vgg": (vgg, "torch"),
    "resnet": (resnet, "auto"),
    "shared": (shared, "dense"),
    "layers": (untraceable, "reference"),
}
JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 3, 255, 2**16, 2**31, 2**40, 2**63, 10**400, -0.5, 1e300, "", "x", "self",
    "__debug__", "\x1b[2J", "dense", "native", "torch", [], [0], [[]], [None], {}, {"node": "x"},
    {"tuple": []}, [1, 1], [2**24, 1], "y" * 10_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: the file's bytes, its parts, the model for it, and what the network answers."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for name, (model, backend) in BASES.items():
        fast = quick(model(), backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(fast, folder / name)
        given = model() if name == "layers" else None
        answer = run(load(folder / name, given), image())
        found[name] = ((folder / name).read_bytes(), document_of(folder / name), given, answer)
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def changed_value(rng: random.Random, old: Any) -> Any:
    if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.5:
        return rng.choice((old + 1, old - 1, -old, 2 * old, old << 20, old // 2))
    if isinstance(old, list) and old and rng.random() < 0.5:
        return rng.choice((old[1:], old[::-1], [*old, old[-1]], old * 100))
    return rng.choice(JUNK)


def document(rng: random.Random, _: bytes, parts: Any) -> bytes:
    """Change a few values of the document, and give the file the digest that belongs to it."""
    changed, tensors = copy.deepcopy(parts[0]), dict(parts[1])
    found = [place for place in places(changed) if place]
    # few of the many alike entries of the plan
    few = [place for place in found if len(place) < 5 or place[0] != "plan"]
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(few if rng.random() < 0.8 else found)
        try:
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if rng.random() < 0.1 and isinstance(holder, dict):
                holder[rng.choice(("self", "more", "", "a.b", "\x1b"))] = holder.pop(path[-1])
            else:
                holder[path[-1]] = changed_value(rng, holder[path[-1]])
        except (KeyError, IndexError, TypeError):
            continue  # the change before took it away
    return b"".join(sealed(json.dumps(changed), tensors))


def tensors_of(rng: random.Random, _: bytes, parts: Any) -> bytes:
    """Drop, add, swap, cut or convert tensors."""
    tensors: dict[str, Tensor] = dict(parts[1])
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    old = tensors.pop(name)
    kinds = (torch.float64, torch.float16, torch.int8, torch.bool, torch.int64)
    new = rng.choice((
        None, tensors.get(other), old.to(rng.choice(kinds)), old.reshape(-1)[:0], old.reshape(-1),
        old.unsqueeze(0),
        torch.full_like(old, float("nan") if old.is_floating_point() else 1), torch.zeros(2**16),
    ))  # fmt: skip
    if new is not None:
        tensors[rng.choice((name, name, f"{name}.more", "")) or "0"] = new
    return b"".join(sealed(json.dumps(parts[0]), tensors))


DAMAGES = (bits, bits, header, header, cut, document, document, document, tensors_of)


def outcome(path: Path, base: Any, damage: Callable[..., bytes]) -> str:
    """Load a damaged file, with and without its digest, and run what comes out."""
    _, _, model, answer = base
    kinds = []
    for verify in (True, False):
        fast, problem = attempt(lambda verify=verify: load(path, model, verify=verify))
        if problem is not None:
            assert isinstance(problem, ArtifactError), problem
            assert str(problem).isprintable()
            assert len(str(problem)) < 1000
            kinds.append("refused")
            continue
        kinds.append("loaded")
        json.dumps(fast.report(), allow_nan=False)
        assert len(fast.explain()) < 10**6
        # It may fail, as another network would whose layers do not fit each other.
        given, _ = attempt(lambda fast=fast: run(fast, image()))
        if verify and damage in (bits, header, cut):  # then nothing that counts is changed
            assert given is not None
            assert torch.equal(given, answer)
    return "/".join(kinds)


def test_damaged_files_are_refused_or_are_networks(bases: dict[str, Any], tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    with little_room():
        for case in range(FIRST, FIRST + CASES):
            rng = random.Random(case)
            base, damage = bases[rng.choice(list(bases))], rng.choice(DAMAGES)
            (tmp_path / "net").write_bytes(damage(rng, base[0], base[1]))
            with named(case, damage):
                kind = outcome(tmp_path / "net", base, damage)
            counts[f"{damage.__name__} {kind}"] = counts.get(f"{damage.__name__} {kind}", 0) + 1
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    assert sum(n for name, n in counts.items() if "refused" in name) >= CASES // 2


def test_the_damages_are_worth_trying(bases: dict[str, Any], tmp_path: Path) -> None:
    """What the cases start from loads, so that a refusal is one of the damage."""
    for content, (made, tensors), model, answer in bases.values():
        (tmp_path / "net").write_bytes(content)
        assert torch.equal(run(load(tmp_path / "net", model), image()), answer)
        rewrite_file(tmp_path / "net", made, tensors)
        assert torch.equal(run(load(tmp_path / "net", model), image()), answer)
