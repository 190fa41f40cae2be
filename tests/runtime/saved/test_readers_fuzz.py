"""Damaged plans, weights, stores and settings: a value or an error in one line, in little memory and time."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import CASES, FIRST, attempt, bits, cut, header, little_room, named
from op_problems import Problem

from lhc_triton import LHCConfig, convert, freeze
from lhc_triton.artifact import is_artifact
from lhc_triton.models.architecture import Architecture
from lhc_triton.models.pretrained import load_network, save_network
from lhc_triton.planning import Plan
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.training import TrainConfig, read_config

READERS: dict[str, Callable[[Path], Any]] = {
    "plan": lambda path: Plan.from_json(path.read_text(encoding="utf-8", errors="surrogateescape")).explain(),
    "weights": load_network,
    "store": lambda path: TimingStore(path).read_checked(),
    "settings": lambda path: read_config(path).to_toml(),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    layer = Problem(ConvGeometry(1, 48, 64, 8, 8)).layer
    (folder / "plan").write_text(Plan((layer,), (("stem", "dense"),), "cpu", "float32").to_json())
    architecture = Architecture("small-vgg", (8, 16, 16), "cifar", 1, 10, 28)
    model = freeze(convert(architecture.build(), LHCConfig(density=0.3, in_block=4, out_block=4)))
    save_network(model, folder / "weights", architecture)
    for key in ("a layer", "another"):
        TimingStore(folder / "store").put(key, {"torch": 12.5, "dense": 30.0, "native": "failed"})
    (folder / "settings").write_text(TrainConfig().to_toml())
    return {name: (folder / name).read_bytes() for name in READERS}


def words(rng: random.Random, content: bytes) -> bytes:
    """Put something else in the place of a number or a word."""
    at = rng.randrange(len(content))
    end = at + rng.randrange(1, 12)
    junk = (
        b"9" * 400,
        b"-1",
        b"1e400",
        b"nan",
        b"null",
        b"[" * 5000,
        b"\x1b[2J",
        b"99999999999",
        b'"',
        b"{}",
    )
    return content[:at] + rng.choice(junk) + content[end:]


def test_the_files_that_are_damaged_are_whole(whole: dict[str, bytes], tmp_path: Path) -> None:
    for name, read in READERS.items():
        (tmp_path / name).write_bytes(whole[name])
        read(tmp_path / name)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_told_in_one_line(kind: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    refused = 0
    with little_room():
        for case in range(FIRST, FIRST + CASES):
            rng = random.Random(case)
            damage = rng.choice((bits, cut, words, words, header if kind == "weights" else bits))
            (tmp_path / kind).write_bytes(damage(rng, whole[kind]))
            with named(case, damage):
                _, problem = attempt(lambda: READERS[kind](tmp_path / kind))
                assert not is_artifact(tmp_path / kind)
                if problem is not None:
                    assert isinstance(problem, ValueError | OSError), problem
                    assert len(str(problem).splitlines()) == 1
                    assert len(str(problem)) < 2000
                    refused += 1
    assert refused >= CASES // 10
