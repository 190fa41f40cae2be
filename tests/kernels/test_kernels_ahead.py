"""Launches compiled ahead in worker processes: what they compile is what a launch in earnest looks for."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled only where TRITON_INTERPRET is unset", allow_module_level=True)

from dataclasses import replace

import torch
import triton
from triton.runtime.driver import driver

from lhc_kernels import KernelConfig
from lhc_kernels.ahead import CompileOnly, Compilers
from lhc_kernels.aot import TARGETS
from lhc_kernels.prepared import Signature, Step, prepare

pytestmark = pytest.mark.aot

HOPPER = TARGETS["sm_90"].gpu
INT32 = torch.int32


def signature(
    config: KernelConfig | None = None, batch: int = 8, side: int = 28, activation: str = "relu"
) -> Signature:
    """Return a 3x3 layer of 64 -> 64 channels in float16, two tiles of 32 filters, eight entries."""
    half = torch.float16
    return Signature(
        ((batch, 64, side, side), half), ((8, 32, 32), half),
        (((3,), INT32), ((9,), INT32), ((2, 32), INT32)),
        ((64,), half), None, None, None, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), activation,
        () if config is None else tuple(config.to_list()), (132, 232448, 90),
    )  # fmt: skip


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Compile for a GPU that is not there, as all tests of this lane do, into a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver.set_active(CompileOnly(HOPPER))


@pytest.fixture
def compiled():
    """Whether each kernel that Triton was asked for was found on disk, in order."""
    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: object) -> None:
        hits.append(cache_hit)

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        yield hits


CONFIGS = {
    "grid": KernelConfig(64, 32, 32, 4, 3, 2),
    "split": KernelConfig(64, 32, 32, 4, 3, variant="split", splits=2),
    "box": KernelConfig(64, 32, 32, 4, 3, variant="box"),
    "resident": KernelConfig(64, 32, 32, 4, 3, variant="resident", max_registers=96),
}


@pytest.mark.usefixtures("hopper")
def test_what_workers_compile_is_found_by_a_launch(compiled):
    launches = [signature(config) for config in CONFIGS.values()]
    with Compilers(HOPPER, workers=2) as compilers:
        compilers.begin(launches)
        found = [compilers.wait(launch) for launch in launches]
    assert [(f.problem, f.stack_bytes) for f in found] == [("", 0)] * 4
    assert all(0 < f.registers <= 128 for f in found)
    assert found[3].registers <= 96
    for launch in launches:
        assert prepare(launch).compile()
    assert compiled == [True] * 5  # a split has two kernels


@pytest.mark.usefixtures("hopper")
def test_what_does_not_compile_says_why():
    broken = signature(replace(CONFIGS["grid"], max_registers=64, block_m=256, block_n=64))
    wrong = signature()._replace(activation="gelu")
    with Compilers(HOPPER, workers=1) as compilers:
        assert compilers.wait(broken).stack_bytes > 0
        assert compilers.wait(wrong).problem.startswith("ValueError: activation is 'gelu'")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", ["grid", "split"])
def test_another_batch_or_image_size_compiles_nothing_anew(compiled, name):
    for batch, side in ((1, 28), (8, 28), (16, 28), (16, 16), (3, 1), (5, 7)):
        prepare(signature(CONFIGS[name], batch, side, "silu")).compile()
    assert len(compiled) == (2 if name == "split" else 1)


@pytest.mark.usefixtures("hopper")
def test_another_batch_of_boxes_compiles_nothing_anew(compiled):
    for batch in (8, 16, 24):  # whose best boxes are the same
        prepare(signature(CONFIGS["box"], batch, activation="silu")).compile()
    assert len(compiled) == 1


def test_a_signature_is_prepared_once_and_launched_from_what_is_at_hand():
    first = prepare(signature(CONFIGS["box"]))
    assert prepare(signature(CONFIGS["box"])) is first
    assert isinstance(first.steps[0], Step)
