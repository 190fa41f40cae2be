"""What adding a backend, or an activation, takes: one record, or one line of a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from op_problems import Problem
from oracle import norm_error
from runtime_networks import image, vgg
from torch import Tensor, nn

import lhc_triton as lhc
from lhc_triton.planning import COST_MODELS, ConvGeometry
from lhc_triton.planning.backends import BACKENDS, Backend, register
from lhc_triton.runtime.choosing.dispatch import auto_backend, backend_status
from lhc_triton.runtime.op import reference
from lhc_triton.runtime.op.call import Call
from lhc_triton.runtime.op.epilogue import ACTIVATIONS, Activation

GEOMETRY = ConvGeometry(2, 12, 10, 9, 8, (3, 3), (2, 1), (1, 2, 0, 1))


@pytest.fixture
def toy() -> Iterator[list[Call]]:
    """A backend that "auto" prefers, ten thousand times as fast as any other on paper; it keeps its calls."""
    calls: list[Call] = []

    def run(call: Call) -> Tensor:
        calls.append(call)
        return reference.run(call)

    price = replace(COST_MODELS["torch"], sparse_backend="toy", launch_us=0.0).scaled(1.0, 1e-4, "made up")
    register(Backend("toy", ("cpu",), ("float32",), run, activations=("none",), auto={"cpu": 3}, price=price))
    yield calls
    del BACKENDS["toy"], COST_MODELS["toy"]


def test_one_registration_reaches_plan_accelerate_report_and_files(toy, tmp_path):
    model, x = vgg(), image()
    for requested in ("toy", "auto"):
        toy.clear()
        fast = lhc.accelerate(model, x, backend=requested, tune="off")
        rows = {row["layer"]: row["backend"] for row in fast.report()["layers"]}
        assert {"3", "7", "10"} <= {layer for layer, backend in rows.items() if backend == "toy"}
        assert {call.backend for call in toy} == {"toy"}
        with torch.inference_mode():
            assert norm_error(fast(image(seed=4)), model(image(seed=4))) < 1e-5
    assert lhc.plan(model, x, backend="toy")["3"].backend == "toy"
    lhc.save(fast, tmp_path / "net.safetensors")
    again = lhc.load(tmp_path / "net.safetensors")
    assert torch.equal(again(x), fast(x))
    assert lhc.Plan.from_json(fast.plan.to_json()) == fast.plan
    assert auto_backend(torch.float32, "cpu") == "toy"
    assert auto_backend(torch.float16, "cpu") != "toy"
    assert "toy" in {row["backend"] for row in backend_status("cpu")}


def test_what_it_does_not_serve_is_told_and_a_name_is_given_once(toy):
    with pytest.raises(ValueError, match='backend "toy" does not serve float64; use one of float32'):
        Problem(GEOMETRY, dtype=torch.float64).run("toy")
    with pytest.raises(ValueError, match="backend 'toy' is registered already"):
        register(BACKENDS["toy"])


@pytest.mark.parametrize("pool", ["none", "max2x2"])
@pytest.mark.parametrize("backend", ["toy", "reference", "torch", "native"])
def test_an_activation_is_applied_whether_the_kernel_offers_it_or_not(toy, monkeypatch, backend, pool):
    halved = Activation(lambda y, out: torch.mul(y, 0.5, out=out), lambda y: y.mul_(0.5))
    monkeypatch.setitem(ACTIVATIONS, "halved", halved)
    problem = Problem(GEOMETRY, has_residual=True, pool=pool)
    y = problem.run(backend, activation="halved")
    assert norm_error(y, problem.oracle() / 2) < 1e-5
    assert y.is_contiguous(memory_format=torch.channels_last)
    relu = Problem(GEOMETRY, has_residual=True, pool=pool, activation="relu")
    assert norm_error(relu.run(backend), relu.oracle()) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "native", "dense"])
def test_a_line_of_the_table_is_absorbed_by_accelerate(monkeypatch, backend):
    softplus = Activation(
        lambda y, out: out.copy_(F.softplus(y)), lambda y: y.copy_(F.softplus(y)), (nn.Softplus,)
    )
    monkeypatch.setitem(ACTIVATIONS, "softplus", softplus)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Softplus()).eval()
    with torch.no_grad():
        model[2].weight[:16, :, 1] = 0
    fast = lhc.accelerate(model, image(), backend=backend, tune="off")
    assert [row["epilogue"] for row in fast.report()["layers"]] == ["relu", "softplus"]
    with torch.inference_mode():
        assert norm_error(fast(image(seed=3)), model(image(seed=3))) < 1e-5


class Gated(nn.Module):
    """SiLU as a module, and as a function, behind convolutions with structured zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.act = nn.SiLU(inplace=True)
        self.second, self.third = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        return F.silu(self.third(F.silu(self.second(x)) + x), inplace=True)


@pytest.mark.parametrize("backend", ["auto", "torch", "native", "dense"])
def test_silu_runs_in_the_epilogue(backend):
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        model.second.weight[:16, :, 1] = 0
        model.third.weight[16:, :16] = 0
    fast = lhc.accelerate(model, image(), backend=backend, tune="off")
    rows = {row["layer"]: row for row in fast.report()["layers"]}
    assert [row["epilogue"] for row in rows.values()] == ["bn+silu", "silu", "silu"]
    left = [n.target for n in fast.network.graph.nodes if n.op == "call_function"]
    assert F.silu not in left
    with torch.inference_mode():
        assert norm_error(fast(image(seed=3)), model(image(seed=3))) < 1e-5
        strange = torch.full_like(image(), math.nan)
        assert bool(fast(strange).isnan().all())
