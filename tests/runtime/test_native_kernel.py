"""The native CPU kernel: its variants and schedules, threads, memory, and calls that do not fit.

What every backend must do is tested with the others, in test_backend_oracle.py and test_op_contract.py.
"""

import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from op_problems import Problem, relative_error

from lhc_kernels.cpu import problem
from lhc_kernels.cpu.building import FLAGS, SOURCES, find_compiler
from lhc_triton.planning.schema import ConvGeometry

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))
ROOT = Path(__file__).resolve().parent.parent.parent

# What decides where the kernel reads its pixels and how they are handed to the threads.
LAYERS = {
    "direct, vectors across images": ConvGeometry(3, 40, 32, 8, 8),
    "direct, wider than a vector": ConvGeometry(1, 64, 48, 21, 35),
    "direct, border on one side": ConvGeometry(1, 32, 32, 9, 13, (3, 3), (1, 1), (2, 1, 2, 0)),
    "direct, large kernel": ConvGeometry(1, 32, 16, 12, 12, (7, 5), (1, 1), (3, 3, 2, 2)),
    # Planes a multiple of 1 KiB apart: vectors of eight floats read them from a copy.
    "spread": ConvGeometry(1, 64, 48, 32, 32),
    "spread, many images": ConvGeometry(5, 40, 32, 16, 16),
    "spread, bands of rows": ConvGeometry(1, 96, 32, 112, 112),
    "spread, more rows out than in": ConvGeometry(2, 40, 32, 8, 32, (3, 5), (1, 1), (3, 2, 2, 2)),
    "spread, fewer rows out than in": ConvGeometry(1, 40, 32, 32, 16, (5, 3), (1, 1), (0, 0, 1, 1)),
    "crowded, but dilated too far to be spread": ConvGeometry(
        1, 512, 16, 16, 16, (3, 3), (1, 1), (12, 12, 12, 12), (12, 12)
    ),
    "spread, one row": ConvGeometry(1, 40, 64, 1, 256, (1, 3), (1, 1), (0, 0, 1, 1)),
    "spread, dilated": ConvGeometry(1, 40, 32, 32, 32, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    "pointwise": ConvGeometry(2, 70, 50, 8, 8, (1, 1), (1, 1), (0, 0, 0, 0)),
    "pointwise, stride 2": ConvGeometry(2, 64, 50, 14, 14, (1, 1), (2, 2), (0, 0, 0, 0)),
    "copied, no border": ConvGeometry(2, 40, 32, 9, 18, (3, 3), (1, 1), (0, 0, 0, 0)),
    "copied, images side by side": ConvGeometry(8, 64, 64, 2, 2),
    "copied, odd images side by side": ConvGeometry(5, 64, 64, 7, 7),
    "copied, rows narrower than a vector, images apart": ConvGeometry(2, 40, 32, 16, 5),
    "copied, narrow rows and stride 2": ConvGeometry(3, 40, 32, 31, 12, (3, 3), (2, 2)),
    "copied, images apart": ConvGeometry(4, 64, 64, 16, 16, (3, 3), (2, 2)),
    "copied, stride 3": ConvGeometry(2, 40, 32, 19, 23, (5, 3), (3, 3), (2, 2, 1, 1)),
    "copied, dilated, stride 2": ConvGeometry(2, 40, 32, 21, 22, (3, 3), (2, 2), (2, 2, 2, 2), (2, 2)),
    "copied, bands of rows": ConvGeometry(1, 96, 32, 120, 120, (3, 3), (2, 2)),
    "copied, groups of images": ConvGeometry(40, 64, 16, 32, 32, (3, 3), (2, 2)),
    "one pixel": ConvGeometry(1, 32, 32, 1, 1),
    "one pixel of many images": ConvGeometry(19, 32, 32, 1, 1),
}


def at_threads(count, run):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_variant_equals_the_dense_convolution_on_any_number_of_threads(layer):
    for groups_per_tile, density in ((1, 0.1), (2, 0.5)):
        case = Problem(
            LAYERS[layer], in_block=32, out_block=16, density=density, groups_per_tile=groups_per_tile,
            shuffle=True, has_residual=True, activation="relu",
        )  # fmt: skip
        oracle = case.oracle()
        for threads in (1, 2, 5):
            y = at_threads(threads, lambda: case.run("native"))  # noqa: B023
            assert relative_error(y, oracle) < 1e-6


# Outputs too large to stay in the cache until they are pooled.
POOLED = {
    "odd sizes": ConvGeometry(2, 40, 48, 75, 61),
    "more bands than rows fill evenly": ConvGeometry(1, 32, 64, 98, 70),
    "large kernel": ConvGeometry(1, 16, 48, 90, 80, (5, 3), (1, 1), (2, 2, 1, 1)),
    "no border": ConvGeometry(1, 32, 32, 130, 96, (3, 1), (1, 1), (0, 0, 0, 0)),
    "pointwise": ConvGeometry(1, 64, 32, 104, 96, (1, 1), (1, 1), (0, 0, 0, 0)),
    "pointwise, border above": ConvGeometry(1, 64, 32, 104, 96, (1, 1), (1, 1), (4, 0, 0, 0)),
    "crowded planes": ConvGeometry(1, 32, 48, 112, 112),
    "stride 2": ConvGeometry(1, 16, 48, 151, 160, (3, 3), (2, 2)),
}


@pytest.mark.parametrize("layer", POOLED)
def test_large_outputs_are_pooled_right(layer):
    case = Problem(
        POOLED[layer], in_block=16, out_block=16, density=0.3, shuffle=True, activation="relu", pool="max2x2"
    )
    assert case.geometry.out_values > 2 << 17
    case.x[0, :, 20, 30] = float("nan")
    expected = case.run("reference")  # not the dense oracle, whose zero weights spread NaN
    assert expected.isnan().any()
    for threads in (1, 2, 5):
        y = at_threads(threads, lambda: case.run("native"))
        assert torch.equal(y.isnan(), expected.isnan())
        assert relative_error(y.nan_to_num(), expected.nan_to_num()) < 1e-6


@pytest.mark.parametrize("layer", ["direct, wider than a vector", "copied, images side by side"])
def test_unwritten_outputs_would_show(layer):
    case = Problem(LAYERS[layer], in_block=32, out_block=3, density=0.05, shuffle=True, groups_per_tile=3)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert relative_error(case.run("native"), case.oracle()) < 1e-6
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_around_the_input_is_not_read_into_the_output():
    geometry = ConvGeometry(1, 32, 16, 9, 20)
    case = Problem(geometry, in_block=32, out_block=16, density=1.0)
    oracle = case.oracle()
    wide = torch.full((3, 32, 9, 20), float("nan"))
    wide[1] = case.x[0]
    assert relative_error(case.run("native", x=wide[1:2]), oracle) < 1e-6


def test_no_memory_past_the_input_is_read():
    geometry = ConvGeometry(1, 1024, 16, 7, 7, (1, 1), (1, 1), (0, 0, 0, 0))  # whole pages, no whole vectors
    case = Problem(geometry, in_block=32, out_block=16)
    size = case.x.nbytes
    assert size % mmap.PAGESIZE == 0
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0  # a read there is fatal
    x = torch.frombuffer(memory, dtype=torch.float32, count=case.x.numel()).view_as(case.x).copy_(case.x)
    assert relative_error(case.run("native", x=x), case.oracle()) < 1e-6


def test_a_call_on_two_threads_at_once_gives_right_answers():
    cases = [Problem(LAYERS["copied, images apart"], in_block=32, out_block=16, seed=s) for s in (1, 2)]
    oracles = [case.oracle() for case in cases]
    wrong = []

    def work(case, oracle):
        arguments = case.arguments("native")
        for _ in range(100):
            if not relative_error(torch.ops.lhc.grouped_conv2d(**arguments), oracle) < 1e-6:
                wrong.append(case.seed)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, oracles, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_calls_leak_nothing():
    layers = [ConvGeometry(1, 16, 16, 8, 8), ConvGeometry(2, 16, 16, 8, 8, (3, 3), (2, 2))]
    calls = [Problem(g, in_block=16, out_block=16, pool="max2x2").arguments("native") for g in layers]
    with torch.inference_mode():
        for _ in range(500):
            for call in calls:
                torch.ops.lhc.grouped_conv2d(**call)
        before = resident_bytes()
        for _ in range(5000):
            for call in calls:
                torch.ops.lhc.grouped_conv2d(**call)
    assert resident_bytes() - before < 2**20  # one float lost each call would be 40 kB, a tensor 40 MB


def with_table(index, change):
    def wrong(arguments):
        tables = [table.clone() for table in arguments["tables"]]
        change(tables[index])
        return {"tables": tables}

    return wrong


def set_item(position, value):
    def change(table):
        table.view(-1)[position] = value

    return change


WRONG = {
    "entry out of range": (with_table(1, set_item(0, 9 * 4)), ValueError, "the entries reach 36"),
    "negative entry": (with_table(1, set_item(0, -1)), ValueError, "entries"),
    "tiles fall": (with_table(0, set_item(1, 10**6)), ValueError, "tile_ptr does not rise"),
    "tiles start late": (with_table(0, set_item(0, 1)), ValueError, "tile_ptr does not rise"),
    "filter twice": (with_table(2, set_item(0, 1)), ValueError, "each of the 10 filters once"),
    "filter out of range": (with_table(2, set_item(0, 10)), ValueError, "each of the 10 filters once"),
    "filter lost": (with_table(2, set_item(0, -1)), ValueError, "each of the 10 filters once"),
    "bias type": (lambda a: {"bias": a["bias"].double()}, TypeError, "bias is torch.float64 on cpu, x torch"),
    "residual type": (
        lambda a: {"residual": torch.zeros(2, 10, 5, 7, dtype=torch.half)}, TypeError,
        "residual is torch.float16",
    ),
    "float64": (
        lambda a: {"x": a["x"].double(), "weight": a["weight"].double()}, ValueError,
        '"native" does not serve float64; use one of float32',
    ),
    "sparse x": (lambda a: {"x": a["x"].to_sparse()}, ValueError, "takes dense tensors"),
    "no channels": (lambda a: {"x": a["x"][:, :0]}, ValueError, "the entries reach"),
    "vast border": (lambda a: {"padding": [2**40, 0, 0, 0]}, ValueError, r"sizes below 2\*\*30"),
    "vast dilation": (lambda a: {"dilation": [2**62, 1]}, ValueError, "too small"),
    "vast output": (lambda a: {"padding": [2**29, 0, 2**29, 0]}, RuntimeError, "allocate|overflow"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_call_that_does_not_fit_gets_one_clear_error(case):
    change, error, message = WRONG[case]
    geometry = ConvGeometry(2, 12, 10, 9, 8, (3, 3), (2, 1), (1, 2, 0, 1))
    arguments = Problem(geometry, in_block=4, density=1.0).arguments("native")
    torch.ops.lhc.grouped_conv2d(**arguments)
    with pytest.raises(error, match=message):
        torch.ops.lhc.grouped_conv2d(**{**arguments, **change(arguments)})


@pytest.mark.parametrize(
    "flags", ["-O1 -mavx2 -mfma", "-O1"], ids=["vectors of eight", "the least vectors of the machine"]
)
def test_the_same_source_serves_narrower_vectors(flags):
    if "avx2" in flags and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no AVX2")
    environment = {**os.environ, "LHC_TRITON_NATIVE_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    environment.pop("LHC_TRITON_CACHE")  # the build is kept for the next run
    tests = ["tests/runtime/test_backend_oracle.py", "tests/runtime/test_native_kernel.py"]
    which = ["-p", "no:cacheprovider", "-k", "native and (dense or poison or denormal or pooled or past)"]
    command = [sys.executable, "-m", "pytest", *which, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("source", ["cells_float.cpp", "cells_pairs.cpp"])
@pytest.mark.parametrize("cpu", ["x86-64-v3", "x86-64-v4 -mavx512bf16"])
def test_sums_stay_in_registers(cpu, source, tmp_path):
    # A sum that is stored in every round makes the kernel 2 to 3 times as slow.
    if platform.machine() != "x86_64":
        pytest.skip("the instructions are those of x86")
    assembly = tmp_path / "cells.s"
    command = [*find_compiler(), *FLAGS, *f"-march={cpu}".split(), "-S", SOURCES / source, "-o", assembly]
    subprocess.run(command, check=True)
    loops = 0
    for block in re.split(r"^\.L\w+:$", assembly.read_text(), flags=re.MULTILINE):
        products = re.findall(r"\t(?:vfmadd\w+ps|vdpbf16ps)\t(.*)", block)
        if len(products) < 12 or "vdivps" in block:
            continue
        loops += 1
        moves = re.findall(r"\tvmov[au]p[sd]\t(.*)", block)
        assert not [operands for operands in moves if re.match(r"%[xyz]mm\d+, .*\(|.*\(%r[sb]p\)", operands)]
    assert loops >= (0 if "v3" in cpu and "pairs" in source else 3)


def test_the_kernel_compiles_for_neon(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("there is no cross compiler for aarch64")
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name not in ("binding.cpp", "operands.cpp", "tape.cpp"):  # which need torch's headers
            command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-c", str(source)]
            subprocess.run([*command, "-o", str(tmp_path / "out.o")], check=True)
