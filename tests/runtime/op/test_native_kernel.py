"""The native CPU kernel against a float64 oracle: geometry, blocks, layouts of inputs, threads, memory.

What every backend must do is tested with the others, in test_backend_oracle.py and test_op_contract.py.
"""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_problems import Problem, layers
from oracle import norm_error

from lhc_kernels.cpu import problem
from lhc_triton.planning.schema import ConvGeometry

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))
ROOT = Path(__file__).resolve().parents[3]
NONE = (0, 0, 0, 0)

# What decides how the output is cut into regions of pixels, and these into blocks.
LAYERS = {
    "interior of many blocks": ConvGeometry(1, 64, 48, 21, 35),
    "many images": ConvGeometry(5, 40, 32, 8, 8),
    "border on one side": ConvGeometry(1, 32, 32, 9, 13, (3, 3), (1, 1), (2, 1, 2, 0)),
    "no border": ConvGeometry(2, 40, 32, 9, 18, (3, 3), (1, 1), NONE),
    "border wider than the kernel": ConvGeometry(1, 32, 32, 5, 4, (3, 3), (1, 1), (6, 5, 4, 7)),
    "nothing but border": ConvGeometry(2, 32, 32, 2, 2, (2, 2), (9, 9), (8, 8, 8, 8)),
    "large kernel": ConvGeometry(1, 32, 16, 12, 12, (7, 5), (1, 1), (3, 3, 2, 2)),
    "kernel as large as the image": ConvGeometry(2, 16, 16, 6, 6, (6, 6), (1, 1), (3, 2, 3, 2)),
    "dilated beyond the image": ConvGeometry(1, 64, 16, 16, 16, (3, 3), (1, 1), (12,) * 4, (12, 12)),
    "dilated, stride 2": ConvGeometry(2, 40, 32, 21, 22, (3, 3), (2, 2), (2, 2, 2, 2), (2, 2)),
    "stride 2": ConvGeometry(4, 64, 64, 16, 16, (3, 3), (2, 2)),
    "stride 3, uneven": ConvGeometry(2, 40, 32, 19, 23, (5, 3), (3, 1), (2, 2, 1, 1)),
    "stride beyond the kernel": ConvGeometry(2, 40, 32, 19, 23, (2, 1), (4, 5), (1, 0, 0, 0)),
    "one row": ConvGeometry(1, 40, 64, 1, 256, (1, 3), (1, 1), (0, 0, 1, 1)),
    "pointwise": ConvGeometry(2, 70, 50, 8, 8, (1, 1), (1, 1), NONE),
    "pointwise, stride 2": ConvGeometry(2, 64, 50, 14, 14, (1, 1), (2, 2), NONE),
    "tiny images": ConvGeometry(8, 64, 64, 2, 2),
    "odd images": ConvGeometry(5, 64, 64, 7, 7),
    "one pixel": ConvGeometry(1, 32, 32, 1, 1),
    "one pixel of many images": ConvGeometry(61, 32, 32, 1, 1),
    "no image": ConvGeometry(0, 32, 32, 5, 5),
    "more weights than a chunk": ConvGeometry(1, 512, 96, 3, 4),
    "image larger than a second-level cache": ConvGeometry(1, 96, 32, 60, 50),
}


def at_threads(count, run):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_geometry_equals_the_dense_convolution_on_any_number_of_threads(layer):
    for groups_per_tile, density in ((1, 0.1), (2, 0.5)):
        case = Problem(
            LAYERS[layer], in_block=32, out_block=16, density=density, groups_per_tile=groups_per_tile,
            shuffle=True, has_residual=True, activation="relu",
        )  # fmt: skip
        oracle = case.oracle()
        for threads in (1, 2, 5):
            y = at_threads(threads, lambda: case.run("native"))  # noqa: B023
            assert y.shape == oracle.shape
            assert norm_error(y, oracle) < 1e-6


@pytest.mark.parametrize("in_block", [1, 2, 3, 7, 16, 33, 100, 128])
def test_input_blocks_of_any_size(in_block):
    geometry = ConvGeometry(2, 130, 32, 6, 7)
    for density in (0.2, 1.0):
        case = Problem(geometry, in_block=in_block, out_block=16, density=density, has_bias=False)
        assert norm_error(case.run("native"), case.oracle()) < 1e-6


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 24, 32, 40, 48, 64, 100, 128])
def test_tiles_of_any_width(width):
    # A last tile that is narrower, filters that are not adjacent, and weights whose last row ends the tensor.
    geometry = ConvGeometry(2, 40, 2 * width + 5, 6, 7)
    for pool in ("none", "max2x2"):
        case = Problem(geometry, in_block=16, out_block=width, density=0.4, has_residual=True, pool=pool)
        assert norm_error(case.run("native"), case.oracle()) < 1e-6
    case = Problem(geometry, in_block=16, out_block=1, density=0.4, groups_per_tile=width, shuffle=True)
    assert norm_error(case.run("native"), case.oracle()) < 1e-6


@pytest.mark.parametrize("width", [5, 12, 16, 40])
def test_filters_may_lie_in_any_columns_of_their_tiles(width):
    # Empty columns before and between the filters, as no plan makes them, but a caller may.
    case = Problem(ConvGeometry(2, 24, 9, 6, 7), in_block=8, out_block=3, density=0.5, has_residual=True)
    arguments, oracle = case.arguments("native"), case.oracle()
    tile_ptr, entries, filters = arguments["tables"]
    for seed in range(8):
        columns = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:3]
        weight = torch.randn(arguments["weight"].shape[0], 8, width)
        weight[:, :, columns] = arguments["weight"]
        spread = torch.full((filters.shape[0], width), -1, dtype=torch.int32)
        spread[:, columns] = filters
        changed = {"weight": weight, "tables": [tile_ptr, entries, spread]}
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            y = torch.ops.lhc.grouped_conv2d(**{**arguments, **changed})
        finally:
            torch.use_deterministic_algorithms(False)
        assert norm_error(y, oracle) < 1e-6


@settings(max_examples=300, deadline=None)
@given(layers())
def test_any_layer_equals_the_dense_convolution(case):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: unwritten outputs would show
    try:
        y = case.run("native")
    finally:
        torch.use_deterministic_algorithms(False)
    oracle = case.oracle()
    assert y.shape == oracle.shape
    # A single output may be a small difference of large sums.
    assert (y.double() - oracle).norm() <= 1e-6 * case.magnitude().norm()


@settings(max_examples=80, deadline=None)
@given(layers(), st.integers(0, 2**16))
def test_special_values_go_where_the_live_entries_take_them(case, seed):
    generator = torch.Generator().manual_seed(seed)
    for value in (float("nan"), float("inf"), -float("inf")):
        case.x[torch.rand(case.x.shape, generator=generator) < 1 / 300] = value
    y, expected = case.run("native"), case.run("reference")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
    finite = expected.isfinite()
    assert norm_error(y[finite], expected[finite].double()) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_an_infinite_weight_meets_no_pixel_outside_the_image(backend):
    case = Problem(ConvGeometry(1, 8, 4, 4, 5), in_block=8, out_block=4, density=1.0, has_bias=False)
    case.weight[:, :, 0, 0] = float("inf")  # the upper left tap, which the first row and column lack
    case.x = case.x.abs() + 0.1
    y = case.run(backend)
    assert y[:, :, 1:, 1:].isposinf().all()
    assert y[:, :, 0].isfinite().all()
    assert y[:, :, :, 0].isfinite().all()


# How a caller's tensor may lie in memory: [3, 40, 9, 11] out of something larger.
def _from(shape, memory_format, cut):
    wide = torch.full(shape, float("nan")).contiguous(memory_format=memory_format)
    assert cut(wide).shape == (3, 40, 9, 11)
    return cut(wide)


LAST, FIRST = torch.channels_last, torch.contiguous_format
VIEWS = {
    "channels_last": lambda: _from((3, 40, 9, 11), LAST, lambda t: t),
    "contiguous": lambda: _from((3, 40, 9, 11), FIRST, lambda t: t),
    "some images": lambda: _from((6, 40, 9, 11), LAST, lambda t: t[::2]),
    "some channels, channels_last": lambda: _from((3, 100, 9, 11), LAST, lambda t: t[:, 30:70]),
    "some channels, contiguous": lambda: _from((3, 80, 9, 11), FIRST, lambda t: t[:, ::2]),
    "every other pixel": lambda: _from((3, 40, 18, 22), LAST, lambda t: t[:, :, ::2, ::2]),
    "a window": lambda: _from((3, 40, 15, 15), LAST, lambda t: t[:, :, 2:11, 3:14]),
    "rows and columns swapped": lambda: _from((3, 40, 11, 9), LAST, lambda t: t.transpose(2, 3)),
    "images and channels swapped": lambda: _from((40, 3, 9, 11), FIRST, lambda t: t.transpose(0, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_inputs_and_residuals_may_lie_in_memory_as_they_like(view):
    case = Problem(ConvGeometry(3, 40, 40, 9, 11), in_block=16, out_block=8, has_residual=True)
    x, residual = VIEWS[view](), VIEWS[view]()
    x.copy_(case.x), residual.copy_(case.residual)
    assert norm_error(case.run("native", x=x, residual=residual), case.oracle()) < 1e-6


def test_an_expanded_input_is_read_as_it_looks():
    case = Problem(ConvGeometry(3, 40, 16, 9, 11), in_block=16, out_block=8)
    case.x = torch.randn(1, 40, 1, 11).expand(3, 40, 9, 11)
    assert norm_error(case.run("native"), case.oracle()) < 1e-6


def guarded(tensor):
    """Return the tensor's values at the end of a page, behind which a read is fatal, and what keeps them."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "in_block"), [(16, 34), (12, 34), (5, 34), (3, 34), (1, 1), (1, 2), (5, 2)]
)
def test_no_memory_past_the_operands_is_read(width, in_block, dtype):
    geometry = ConvGeometry(1, 34, 3 * width, 7, 7)
    case = Problem(geometry, in_block=in_block, out_block=width, density=1.0, dtype=dtype, channels_last=True)
    arguments = case.arguments("native")
    whole = torch.ops.lhc.grouped_conv2d(**arguments)
    for name in ("x", "weight", "bias"):
        arguments[name] = guarded(arguments[name])
    assert torch.equal(torch.ops.lhc.grouped_conv2d(**arguments), whole)


# Outputs too large for a cache, odd sizes, and windows across all kinds of border.
POOLED = {
    "odd sizes": ConvGeometry(2, 40, 48, 75, 61),
    "large kernel": ConvGeometry(1, 16, 48, 90, 80, (5, 3), (1, 1), (2, 2, 1, 1)),
    "no border": ConvGeometry(1, 32, 32, 130, 96, (3, 1), (1, 1), NONE),
    "pointwise, border above": ConvGeometry(1, 64, 32, 104, 96, (1, 1), (1, 1), (5, 0, 0, 0)),
    "stride 2": ConvGeometry(1, 16, 48, 151, 160, (3, 3), (2, 2)),
}


@pytest.mark.parametrize("layer", POOLED)
def test_large_outputs_are_pooled_right(layer):
    case = Problem(
        POOLED[layer], in_block=16, out_block=16, density=0.3, shuffle=True, activation="relu", pool="max2x2"
    )
    case.x[0, :, 20, 30] = float("nan")
    expected = case.run("reference")  # not the dense oracle, whose zero weights spread NaN
    assert expected.isnan().any()
    for threads in (1, 2, 5):
        y = at_threads(threads, lambda: case.run("native"))
        assert torch.equal(y.isnan(), expected.isnan())
        assert norm_error(y.nan_to_num(), expected.nan_to_num()) < 1e-6


def test_the_same_bits_on_any_number_of_threads():
    case = Problem(ConvGeometry(3, 96, 80, 17, 19), in_block=32, out_block=16, density=0.3)
    first = at_threads(1, lambda: case.run("native"))
    for threads in (2, 3, 7):
        assert torch.equal(at_threads(threads, lambda: case.run("native")), first)


def test_a_call_on_two_threads_at_once_gives_right_answers():
    cases = [Problem(LAYERS["stride 2"], in_block=32, out_block=16, seed=s) for s in (1, 2)]
    oracles = [case.oracle() for case in cases]
    wrong = []

    def work(case, oracle):
        arguments = case.arguments("native")
        for _ in range(100):
            if not norm_error(torch.ops.lhc.grouped_conv2d(**arguments), oracle) < 1e-6:
                wrong.append(case.seed)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, oracles, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of fork() beside threads
def test_a_forked_child_computes_right_while_the_parent_does():
    case = Problem(LAYERS["odd images"], in_block=32, out_block=16)
    oracle, arguments, stop = case.oracle(), case.arguments("native"), threading.Event()

    def work():
        while not stop.is_set():
            torch.ops.lhc.grouped_conv2d(**arguments)

    busy = threading.Thread(target=work)
    busy.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                torch.set_num_threads(1)  # torch's own pool does not survive a fork
                right = norm_error(torch.ops.lhc.grouped_conv2d(**arguments), oracle) < 1e-6
                os._exit(0 if right else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        busy.join()


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


def test_a_layer_of_no_entries_is_its_epilogue():
    case = Problem(ConvGeometry(2, 8, 20, 5, 5), density=0.0, has_residual=True, activation="silu")
    assert np.diff(case.packed().tables[0]).sum() == 0
    assert norm_error(case.run("native"), case.oracle()) < 1e-6


@pytest.mark.parametrize(
    "flags", ["-O1 -mavx2 -mfma", "-O1"], ids=["vectors of eight", "the least vectors of the machine"]
)
def test_the_same_source_serves_narrower_vectors(flags):
    if "avx2" in flags and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no AVX2")
    environment = {**os.environ, "LHC_TRITON_NATIVE_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    environment.pop("LHC_TRITON_CACHE")  # the build is kept for the next run
    tests = ["tests/runtime/op/test_backend_oracle.py", "tests/runtime/op/test_native_kernel.py"]
    which = [
        "-p",
        "no:cacheprovider",
        "-k",
        "native and (dense or poison or denormal or width or past or half)",
    ]
    command = [sys.executable, "-m", "pytest", *which, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
