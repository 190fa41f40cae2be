"""torch.ops.lhc.grouped_conv2d: schema, fake kernel, compile, export, autograd, FLOPs, wrong inputs."""

import os
import subprocess
import sys

import pytest
import torch
from op_problems import Problem
from oracle import norm_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.op import grouped_conv2d

HOST = ("reference", "torch", "native")
GEOMETRY = ConvGeometry(2, 12, 10, 9, 8, (3, 3), (2, 1), (1, 2, 0, 1))
op = torch.ops.lhc.grouped_conv2d


class Layer(nn.Module):
    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__()
        self.arguments = problem.arguments(backend)
        self.arguments.pop("x")
        self.weight = nn.Buffer(self.arguments.pop("weight"))
        for i, table in enumerate(self.arguments.pop("tables")):
            self.register_buffer(f"table{i}", table)

    def forward(self, x):
        tables = [self.table0, self.table1, self.table2]
        return op(x, self.weight, tables, **self.arguments)


def test_the_schema_is_the_agreed_one():
    assert str(op.default._schema) == (
        "lhc::grouped_conv2d(Tensor x, Tensor weight, Tensor[] tables, Tensor? bias, Tensor? residual, "
        "Tensor? scale, SymInt out_channels, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
        "SymInt[] dilation, str activation, str pool, str backend, SymInt[] config, "
        "Tensor? out_step=None) -> Tensor"
    ).replace("SymInt", "int")


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("pool", ["none", "max2x2"])
def test_opcheck_passes(backend, pool):
    problem = Problem(GEOMETRY, pool=pool, has_residual=True, has_scale=True)
    torch.library.opcheck(op, (), problem.arguments(backend))


@pytest.mark.parametrize("size", [(2, 9, 8), (0, 9, 8), (1, 2, 2), (2, 4, 1)])
def test_the_fake_kernel_has_the_result_s_shape_type_and_strides(size):
    batch, height, width = size
    for channels, pool in ((10, "none"), (1, "none"), (10, "max2x2")):
        if pool != "none" and width < 2:
            continue
        geometry = ConvGeometry(batch, 12, channels, height, width)
        problem = Problem(geometry, pool=pool, dtype=torch.float16)
        real, arguments = problem.run("torch"), problem.arguments("torch")
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = {
                k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
            }
            fakes["tables"] = [mode.from_tensor(t) for t in fakes["tables"]]
            fake = op(**fakes)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("backend", HOST)
def test_compile_sees_one_graph(backend):
    problem = Problem(GEOMETRY, activation="relu")
    layer = Layer(problem, backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(problem.x), layer(problem.x))


def test_export_keeps_the_operator_for_any_batch_size():
    problem = Problem(GEOMETRY)
    layer = Layer(problem, "torch")
    program = torch.export.export(layer, (problem.x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    assert any(node.target is op.default for node in program.graph.nodes)
    x = torch.randn(5, 12, 9, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual", "scale"])
def test_backward_says_that_the_operator_is_for_inference(name):
    problem = Problem(GEOMETRY, has_residual=True, has_scale=True)
    arguments = problem.arguments("torch")
    arguments[name] = arguments[name].clone().requires_grad_()
    y = op(**arguments)
    with pytest.raises(RuntimeError, match="inference only"):
        y.sum().backward()


@pytest.fixture(autouse=True)
def flops_are_known():
    grouped_conv2d.register_flops()


def test_flops_count_what_the_tiles_compute():
    problem = Problem(GEOMETRY, groups_per_tile=1, in_block=4, out_block=5, pool="max2x2")
    with FlopCounterMode(display=False) as counter:
        problem.run("torch")
    assert counter.get_total_flops() == 2 * problem.layer.planned_macs
    assert problem.layer.planned_macs == problem.layer.topology.live_macs > 0


def test_flops_of_a_union_tile_count_its_zeros():
    problem = Problem(GEOMETRY, groups_per_tile=2, in_block=4, out_block=5)
    with FlopCounterMode(display=False) as counter:
        problem.run("torch")
    assert counter.get_total_flops() == 2 * problem.layer.planned_macs
    assert problem.layer.planned_macs > problem.layer.topology.live_macs


def test_importing_the_operator_does_not_import_triton():
    code = (
        "import sys, lhc_triton.runtime.op.grouped_conv2d as o; "
        "assert 'triton' not in sys.modules; o.register_flops()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def changed(**changes):
    return lambda arguments: {**arguments, **changes}


def table(index, change):
    def wrong(arguments):
        tables = list(arguments["tables"])
        tables[index] = change(tables[index])
        return {**arguments, "tables": tables}

    return wrong


WRONG = {
    "x 3-D": (lambda a: {**a, "x": a["x"][0]}, ValueError, r"x has 3 dimensions"),
    "weight 2-D": (lambda a: {**a, "weight": a["weight"][0]}, ValueError, r"\[E, in_block, tile_width\]"),
    "weight type": (lambda a: {**a, "weight": a["weight"].half()}, TypeError, "pack it in x's type"),
    "two tables": (lambda a: {**a, "tables": a["tables"][:2]}, ValueError, "2 tables given, expected"),
    "long tables": (table(0, lambda t: t.long()), TypeError, "expected int32"),
    "short entries": (table(1, lambda t: t[:-1]), ValueError, "do not fit the weight"),
    "short filters": (table(2, lambda t: t[:-1]), ValueError, "do not fit the weight"),
    "kernel of 0": (changed(kernel_size=[0, 3]), ValueError, r"kernel_size=\[0, 3\], expected 2"),
    "one stride": (changed(stride=[1]), ValueError, r"stride=\[1\], expected 2 integers >= 1"),
    "no padding": (changed(padding=[]), ValueError, r"padding=\[\], expected 4"),
    "two paddings": (changed(padding=[1, 1]), ValueError, r"padding=\[1, 1\], expected 4 integers >= 0"),
    "negative padding": (changed(padding=[1, 1, 1, -1]), ValueError, "expected 4 integers >= 0"),
    "dilation of 0": (changed(dilation=[1, 0]), ValueError, "dilation"),
    "activation": (changed(activation="gelu"), ValueError, "activation='gelu', expected one of"),
    "pool": (changed(pool="avg"), ValueError, "pool='avg', expected one of"),
    "no filters": (changed(out_channels=0), ValueError, "out_channels=0"),
    "bias": (changed(bias=torch.zeros(9)), ValueError, r"bias has shape \(9,\), expected \(10,\)"),
    "scale": (changed(scale=torch.zeros(1)), ValueError, "scale has shape"),
    "residual": (changed(residual=torch.zeros(2, 10, 9, 8)), ValueError, "residual has shape"),
    "tiny image": (lambda a: {**a, "x": a["x"][..., :1]}, ValueError, "9x1 pixels is too small"),
    "tiny pool": (
        lambda a: {**a, "x": a["x"][:, :, :1], "pool": "max2x2"}, ValueError, "too small",
    ),
    "unknown backend": (changed(backend="cudnn"), ValueError, '"cudnn" is unknown; use one of "reference"'),
    "triton on the CPU": (changed(backend="triton"), ValueError, "needs a CUDA device; on the CPU use"),
    "int8": (
        lambda a: {**a, "x": a["x"].to(torch.int8), "weight": a["weight"].to(torch.int8)},
        ValueError, "does not serve int8; use one of float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_gets_one_clear_line(case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    change, error, message = WRONG[case]
    arguments = Problem(GEOMETRY).arguments("torch")
    op(**arguments)
    with pytest.raises(error, match=message) as caught:
        op(**change(arguments))
    assert "\n" not in str(caught.value)


def test_tables_of_another_layer_are_refused_before_memory_is_read():
    arguments = Problem(GEOMETRY, in_block=4, density=1.0).arguments("torch")
    with pytest.raises(ValueError, match="entries"):
        op(**{**arguments, "x": arguments["x"][:, :4]})


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_is_computed_in_float64(backend):
    problem = Problem(GEOMETRY, dtype=torch.float64)
    assert norm_error(problem.run(backend), problem.oracle()) < 1e-14
