"""Calls of the native kernel that do not fit: one clear error or the right result, and no foreign memory."""

import resource
import threading

import pytest
import torch
from op_problems import Problem
from oracle import norm_error

from lhc_kernels.cpu import problem
from lhc_triton.planning.schema import ConvGeometry

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))
GEOMETRY = ConvGeometry(2, 12, 10, 9, 8, (3, 3), (2, 1), (1, 2, 0, 1))


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
    "more filters than columns": (
        lambda a: {"out_channels": 2**34, "bias": None}, ValueError, "each of the 17179869184 filters once",
    ),
    "bias type": (lambda a: {"bias": a["bias"].double()}, TypeError, "bias is torch.float64 on cpu, exp"),
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
    "vast image": (
        lambda a: {"x": torch.zeros(1, 1, 1, 1).expand(1, 12, 9, 2**31 + 64)}, ValueError,
        r"sizes below 2\*\*30",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_call_that_does_not_fit_gets_one_clear_error(case):
    change, error, message = WRONG[case]
    arguments = Problem(GEOMETRY, in_block=4, density=1.0).arguments("native")
    torch.ops.lhc.grouped_conv2d(**arguments)
    with pytest.raises(error, match=message):
        torch.ops.lhc.grouped_conv2d(**{**arguments, **change(arguments)})


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("which", ["x", "weight", "bias", "residual", "scale", 0, 1, 2])
def test_a_tensor_whose_storage_was_freed_is_named(backend, which):
    case = Problem(GEOMETRY, in_block=4, has_residual=True, has_scale=True)
    arguments = case.arguments(backend)
    arguments["tables"] = [table.clone() for table in arguments["tables"]]  # numpy's cannot be resized
    tensor = arguments["tables"][which] if isinstance(which, int) else arguments[which]
    name = ("tile_ptr", "entries", "filters")[which] if isinstance(which, int) else which
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} of shape .* does not fit into its storage of 0 bytes"):
        torch.ops.lhc.grouped_conv2d(**arguments)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("which", ["x", "weight", "bias", "residual", "scale", 0, 1, 2])
def test_an_operand_without_values_gives_no_result(backend, which):
    """One on the meta device would make the operator's shape function answer, with memory as it lies."""
    case = Problem(GEOMETRY, in_block=4, has_residual=True, has_scale=True)
    arguments = case.arguments(backend)
    if isinstance(which, int):
        arguments["tables"][which] = arguments["tables"][which].to("meta")
    else:
        arguments[which] = arguments[which].to("meta")
    with pytest.raises((ValueError, TypeError), match="on meta"):
        torch.ops.lhc.grouped_conv2d(**arguments)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("which", ["bias", "residual", "scale"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int8])
def test_an_operand_of_another_type_is_named(backend, which, dtype):
    arguments = Problem(GEOMETRY, in_block=4, has_residual=True, has_scale=True).arguments(backend)
    with pytest.raises(TypeError, match=f"{which} is {dtype} on cpu, expected torch.float32 on x's cpu"):
        torch.ops.lhc.grouped_conv2d(**{**arguments, which: arguments[which].to(dtype)})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "padding", [[2**62, 0, 0, 0], [2**31, 2**31, 2**31, 0], [0, 2**63 - 1, 0, 2**63 - 1]]
)
def test_a_border_that_no_memory_holds_is_one_clear_line(backend, padding):
    arguments = Problem(GEOMETRY, in_block=4).arguments(backend)
    with pytest.raises(ValueError, match=r"ask for more than .* values") as caught:
        torch.ops.lhc.grouped_conv2d(**{**arguments, "padding": padding})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 0)])
def test_blocks_of_no_size_are_refused(backend, shape):
    arguments = Problem(GEOMETRY, in_block=4).arguments(backend)
    with pytest.raises(ValueError, match="in_block and tile_width must not be 0"):
        torch.ops.lhc.grouped_conv2d(**{**arguments, "weight": torch.zeros(shape)})


def tables_of(entries, filters):
    """One tile with these entries."""
    tile_ptr = torch.tensor([0, len(entries)], dtype=torch.int32)
    return [
        tile_ptr,
        torch.tensor([*entries, 0], dtype=torch.int32),
        torch.tensor([filters], dtype=torch.int32),
    ]


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Kernels far larger than the image, whose sizes multiply beyond 64 bits, for an output of some pixels.
VAST = {
    "no entries": (2**20, [2, 65536], [2**24, 1], [2**24 - 1, 1], [2**24 - 1, 0, 65535, 0], []),
    "products beyond 64 bits": (
        3, [2, 2**18], [2**30, 1], [2**30 - 1, 1], [2**30 - 1, 0, 2**18 - 1, 0], [0, 2**19 - 1],
    ),
    "millions of taps": (3, [2048, 2048], [1, 1], [1, 1], [2047, 0, 2047, 0], [0, 2048 * 2048 - 1]),
    "a tap far outside": (3, [1, 2], [1, 1], [1, 2**29], [0, 0, 2**29, 0], [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("case", VAST)
def test_kernels_far_larger_than_the_image_take_no_more_than_their_entries(case):
    channels, kernel, stride, dilation, padding, entries = VAST[case]
    x = torch.randn(1, channels, 1, 1)
    weight = torch.randn(len(entries), channels, 2)
    arguments = {
        "x": x, "weight": weight, "tables": tables_of(entries, [1, 0]), "bias": torch.tensor([0.5, -0.25]),
        "residual": None, "scale": None, "out_channels": 2, "kernel_size": kernel, "stride": stride,
        "padding": padding, "dilation": dilation, "activation": "none", "pool": "none",
        "backend": "native", "config": [],
    }  # fmt: skip
    before = peak_bytes()
    y = torch.ops.lhc.grouped_conv2d(**arguments)
    assert peak_bytes() - before < 64 << 20
    expected = arguments["bias"].double()
    if entries:  # the last tap of each kernel meets the only pixel
        expected = expected + (x[0, :, 0, 0].double() @ weight[-1].double()).flip(0)
    assert y.shape == (1, 2, 1, 1)
    assert norm_error(y[0, :, 0, 0], expected) < 1e-6


def test_tables_that_change_during_a_call_reach_no_foreign_memory():
    # Whatever the other thread writes: a result or a complaint, never a crash.
    case = Problem(ConvGeometry(1, 64, 64, 12, 12), in_block=8, out_block=4, density=0.5)
    arguments = case.arguments("native")
    tables, kept = arguments["tables"], [table.clone() for table in arguments["tables"]]
    stop = threading.Event()

    def scribble():
        generator = torch.Generator().manual_seed(0)
        while not stop.is_set():
            for table, right in zip(tables, kept, strict=True):
                place = torch.randint(0, table.numel(), (1,), generator=generator)
                table.view(-1)[place] = torch.randint(-(2**31), 2**31 - 1, (1,), generator=generator).int()
                table.copy_(right)

    busy = threading.Thread(target=scribble)
    busy.start()
    complaints = 0
    try:
        for _ in range(2000):
            try:
                torch.ops.lhc.grouped_conv2d(**arguments)
            except ValueError:
                complaints += 1
    finally:
        stop.set()
        busy.join()
    assert norm_error(case.run("native"), case.oracle()) < 1e-6
