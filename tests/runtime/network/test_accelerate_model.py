"""accelerate(): whole networks, forced backends, and what is put back."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import norm_error
from runtime_networks import finish, image, resnet, shared, untraceable, vgg
from torch import Tensor, nn
from torch.nn.utils import prune

import lhc_triton as lhc
from lhc_triton.planning import plan as make_plan
from lhc_triton.planning.backends import BACKENDS
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.op.call import Call
from lhc_triton.runtime.op.dense import DenseConv2d

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "resnet": resnet,
    "untraceable": untraceable,
    "shared": shared,
}


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path))


def run(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module(*inputs)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("backend", ["auto", "dense", "reference", "torch"])
def test_an_accelerated_network_computes_what_the_model_computes(network: str, backend: str) -> None:
    model = NETWORKS[network]()
    fast = accelerate(model, image(size=16), backend=backend, tune="off")
    for x in (image(size=16), image(batch=3, size=20, seed=5), image(batch=1, size=13, seed=6)):
        reference = copy.deepcopy(model).double()
        assert norm_error(run(fast, x), run(reference, x.double())) < 1e-5


@pytest.mark.parametrize("network", ["vgg", "resnet"])
def test_a_forced_backend_runs_every_planned_layer(network: str) -> None:
    fast = accelerate(NETWORKS[network](), image(size=16), backend="torch", tune="off")
    rows = fast.report()["layers"]
    assert all(row["backend"] == "torch" for row in rows if row["patterns"] is not None)
    assert (
        sum(isinstance(m, GroupedConv2d) for m in fast.modules()) == fast.report()["totals"]["sparse_layers"]
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())


def test_learned_layers_are_accelerated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 40, 3, padding=1), nn.BatchNorm2d(40))
    lhc.convert(model, lhc.LHCConfig(in_block=8, out_block=16))
    finish(model, density=1.0)
    fast = accelerate(model, image(), backend="torch", tune="off")
    (row,) = [row for row in fast.report()["layers"] if row["backend"] == "torch"]
    assert row["density"] == pytest.approx(model[2].density)
    assert norm_error(run(fast, image(seed=9)), run(model, image(seed=9))) < 1e-5


def test_the_model_is_left_exactly_as_it_was() -> None:
    model = vgg().train()
    model[1].eval()
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    parameters = [(id(p), p.requires_grad) for p in model.parameters()]
    fast = accelerate(model, image(), tune="off")
    assert flags == [module.training for module in model.modules()]
    assert parameters == [(id(p), p.requires_grad) for p in model.parameters()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model[0]._forward_hooks) == [handle.id]
    assert not any(
        torch._C._is_alias_of(a, b) for a in fast.state_dict().values() for b in model.parameters()
    )
    assert "module '0' has forward hooks, which are kept" in fast.explain()


def test_report_and_explain_tell_the_same_story() -> None:
    fast = accelerate(resnet(), image(size=16), backend="torch", tune="off")
    report = json.loads(json.dumps(fast.report()))
    assert {"device", "dtype", "traced", "backend", "layers", "totals"} <= set(report)
    assert (report["device"], report["dtype"], report["traced"]) == ("cpu", "float32", True)
    keys = {
        "layer", "backend", "density", "patterns", "tiles", "tile_width", "macs", "live_macs", "planned_macs",
        "predicted_us", "measured_us", "reason", "rel_err",
    }  # fmt: skip
    assert all(keys <= set(row) for row in report["layers"])
    assert all(row["live_macs"] <= row["planned_macs"] <= row["macs"] for row in report["layers"])
    assert all(row["rel_err"] < 1e-5 for row in report["layers"])
    lines = fast.explain().splitlines()
    table = [line for line in lines if line.startswith(("layer1.", "layer2."))]
    assert len(table) == 12
    assert len({line.index("torch") for line in table}) == 1
    assert len({len(line) for line in table}) == 1
    assert lines[4].split() == ["layer", "backend", "density", "tiles", "MACs", "predicted", "measured"]
    assert all(len(line) <= 80 for line in lines)
    first = report["layers"][0]
    told = " ".join(" ".join(lines[6:9]).split())
    assert f"error {first['rel_err']:.0e}: {first['reason']}" in told


def test_measured_times_have_a_column_of_their_own() -> None:
    fast = accelerate(resnet(), image(size=16), backend="torch", tune="off")
    rows = [dataclasses.replace(row, predicted_us=12.0, measured_us=345.0) for row in fast.record.rows]
    fast.record = dataclasses.replace(fast.record, rows=(rows[0], *fast.record.rows[1:]))
    table = [line.split() for line in fast.explain().splitlines() if rows[0].layer in line]
    assert table[0][-2:] == ["12", "345"]


def test_macs_are_those_of_the_example() -> None:
    fast = accelerate(vgg(), image(batch=2, size=16), backend="torch", tune="off")
    first = fast.report()["layers"][0]
    assert first["macs"] == 2 * 16 * 16 * 16 * 3 * 9


def test_an_untraceable_model_is_done_module_by_module_and_says_so() -> None:
    fast = accelerate(untraceable(), image(), backend="torch", tune="off")
    assert isinstance(fast.network.body, GroupedConv2d)
    assert isinstance(fast.network.norm, nn.BatchNorm2d)
    assert fast.report()["traced"] is False
    assert "nothing is fused" in fast.explain()


def test_a_convolution_that_is_not_called_is_left_alone() -> None:
    model = untraceable()
    model.spare = nn.Conv2d(16, 16, 3)
    fast = accelerate(model, image(), tune="off")
    assert type(fast.network.spare) is nn.Conv2d


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        before = x.view(-1)
        x += self.a(x)  # which torch.fx by itself records as x = x + self.a(x)
        return x * before.sum()


class AsksForTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x / 2 if isinstance(x, Tensor) else x)  # traced, x is none


@pytest.mark.parametrize(("kind", "traced"), [(InPlace, True), (AsksForTensors, False)])
def test_a_trace_is_used_only_if_it_computes_what_the_model_does(kind: type, traced: bool) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    fast = accelerate(model, image(), tune="off")
    assert fast.report()["traced"] is traced
    assert norm_error(run(fast, image(seed=4)), run(model, image(seed=4))) < 1e-5


def _broken_torch_backend(monkeypatch: pytest.MonkeyPatch, out_channels: int, how: str) -> None:
    backend = BACKENDS["torch"]

    def broken(call: Call) -> Tensor:
        y: Tensor = backend.run(call)
        if call.geometry.out_channels != out_channels:
            return y
        if how == "raises":
            raise RuntimeError("out of luck")
        return y * 1.5 if how == "wrong" else y * float("nan")

    monkeypatch.setitem(BACKENDS, "torch", dataclasses.replace(backend, run=broken))


@pytest.mark.parametrize("how", ["wrong", "nan", "raises"])
@pytest.mark.parametrize("network", [vgg, untraceable])
def test_a_layer_that_differs_is_put_back_to_dense(
    monkeypatch: pytest.MonkeyPatch, how: str, network: Callable[[], nn.Module]
) -> None:
    model = network()
    plan = make_plan(model, image(), backend="torch")
    width = 48 if network is vgg else 24
    _broken_torch_backend(monkeypatch, width, how)
    fast = accelerate(model, image(), plan=plan, tune="off")
    rows = {row["layer"]: row for row in fast.report()["layers"]}
    back = rows["10" if network is vgg else "body"]
    assert back["backend"] == "dense"
    assert "put back from torch" in back["reason"]
    assert back["rel_err"] < 1e-5
    assert "put back to dense" in fast.explain()
    assert norm_error(run(fast, image(seed=7)), run(model, image(seed=7))) < 1e-5
    if network is vgg:
        assert rows["3"]["backend"] == "torch"


def test_a_forced_backend_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken_torch_backend(monkeypatch, 48, "wrong")
    with pytest.raises(ValueError, match=r"layer '10' cannot run on the forced backend 'torch': its output"):
        accelerate(vgg(), image(), backend="torch", tune="off")


def test_a_network_that_differs_only_as_a_whole_runs_dense_or_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lhc_triton.runtime.network.reading.network_tolerance", lambda *_: 0.0)
    fast = accelerate(vgg(), image(), plan=make_plan(vgg(), image(), backend="torch"), tune="off")
    assert {row["backend"] for row in fast.report()["layers"]} == {"dense"}
    assert "the network differs from the model" in fast.report()["layers"][1]["reason"]
    assert "the model runs as it is" in fast.explain()
    assert torch.equal(run(fast, image(seed=5)), run(vgg(), image(seed=5)))


def test_a_model_without_zeros_runs_dense_and_says_so() -> None:
    torch.manual_seed(0)
    fast = accelerate(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), image(), tune="off")
    assert "no convolution has a topology" in fast.explain()
    assert fast.report()["layers"][0]["epilogue"] == "relu"


def test_a_model_that_draws_random_numbers_draws_the_same_ones() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.conv = nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(self.conv(self.stem(x)), 0.5, training=True)

    torch.manual_seed(0)
    model = finish(Noisy())
    fast = accelerate(model, image(), tune="off", backend="torch")
    assert fast.report()["totals"]["sparse_layers"] == 1
    assert "random numbers" in fast.explain()
    outputs = []
    for network in (fast, model):
        torch.manual_seed(7)
        outputs.append(run(network, image(seed=2)))
    assert norm_error(*outputs) < 1e-5


def test_a_model_with_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(16, 16, 3, padding=1)
            self.b = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.a(x) + self.b(y), "best": (x + y).argmax(1)}

    torch.manual_seed(0)
    model = finish(Two())
    x, y = image(channels=16), image(channels=16, seed=8)
    fast = accelerate(model, (x, y), backend="torch", tune="off")
    with torch.no_grad():
        mine, theirs = fast(y, x), model(y, x)
    assert norm_error(mine["sum"], theirs["sum"]) < 1e-5
    assert torch.equal(mine["best"], theirs["best"])


def test_a_model_without_one_plain_convolution_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")).eval()
    fast = accelerate(model, image(), tune="off")
    assert torch.equal(run(fast, image()), run(model, image()))
    assert fast.report()["layers"] == []


def test_without_a_compiler_one_warning_says_so_and_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lhc_kernels.cpu.problem", lambda: "no C++ compiler is on the PATH")
    model = vgg()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as seen:
        fast = accelerate(model, image())
    assert len(seen) == 1
    assert "no C++ compiler is on the PATH" in fast.explain()
    assert norm_error(run(fast, image()), run(model, image())) < 1e-5
    accelerate(model, image(), backend="torch", tune="off")  # asked for: nothing to warn of
    accelerate(model.double(), image().double(), tune="off")  # a type that no compiler would bring


def test_grouped_and_odd_convolutions_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(16, 24, 3),
        nn.ConvTranspose2d(24, 8, 2),
    )
    finish(model)
    fast = accelerate(model, image(), backend="torch", tune="off")
    assert "layer '3' is left as it is: padding_mode='circular'" in fast.explain()
    assert isinstance(fast.network.get_submodule("1"), DenseConv2d)
    assert type(fast.network.get_submodule("3")) is nn.Conv2d
    assert isinstance(fast.network.get_submodule("4"), GroupedConv2d)
    assert norm_error(run(fast, image(seed=5)), run(model, image(seed=5))) < 1e-5


def test_a_bare_convolution_is_a_model_too() -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Conv2d(16, 16, 3))
    conv = finish(holder)[0]
    x = image(channels=16)
    for plan in (None, make_plan(conv, x, backend="torch")):
        fast = accelerate(conv, x, plan=plan, backend="torch", tune="off")
        assert fast.report()["totals"]["sparse_layers"] == 1
        assert norm_error(run(fast, x), run(conv, x)) < 1e-5


def test_weights_that_torch_prunes_by_hooks_are_taken_as_they_stand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).eval()
    prune.ln_structured(model[1], "weight", amount=8, n=2, dim=0)
    model(image())
    fast = accelerate(model, image(), tune="off")
    assert norm_error(run(fast, image(seed=3)), run(model, image(seed=3))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_models_of_other_types_are_accelerated_in_their_type(dtype: torch.dtype) -> None:
    model = vgg().to(dtype)
    fast = accelerate(model, image().to(dtype), backend="torch", tune="off")
    assert fast.report()["dtype"] == str(dtype).removeprefix("torch.")
    assert run(fast, image().to(dtype)).dtype == dtype


def test_full_tuning_measures_and_cached_tuning_remembers() -> None:
    model = vgg()
    cold = accelerate(model, image(), tune="cached")
    assert all(row["measured_us"] is None for row in cold.report()["layers"])
    full = accelerate(model, image(), tune="full").report()["layers"]
    warm = accelerate(model, image(), tune="cached").report()["layers"]
    planned = [row for row in full if row["density"] < 1]
    assert planned
    assert all(row["measured_us"] > 0 for row in planned)
    assert [row["backend"] for row in warm] == [row["backend"] for row in full]


@pytest.mark.parametrize("network", NETWORKS)
def test_copies_states_and_types_go_round(network: str) -> None:
    model = NETWORKS[network]()
    fast = accelerate(model, image(), backend="torch", tune="off")
    x = image(seed=2)
    expected = run(fast, x)
    assert torch.equal(run(copy.deepcopy(fast), x), expected)
    other = accelerate(NETWORKS[network](seed=0), image(), backend="torch", tune="off")
    for buffer in other.buffers():
        if buffer.is_floating_point():
            buffer.zero_()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(run(other, x), expected)
    wide = copy.deepcopy(fast).to(torch.float64)
    assert wide.report()["dtype"] == "float64"
    assert norm_error(run(wide, x.double()), expected) < 1e-5
    assert norm_error(run(copy.deepcopy(fast).to(memory_format=torch.channels_last), x), expected) < 1e-5


def test_an_accelerated_model_stays_in_eval_mode_without_gradients() -> None:
    fast = accelerate(vgg(), image(), tune="off")
    assert not fast.train().training
    assert not any(module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not fast(image()).requires_grad


@pytest.mark.parametrize("network", ["vgg", "resnet", "untraceable"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_under_autocast_sparse_layers_run_in_their_own_type(network: str, backend: str) -> None:
    model = NETWORKS[network]()
    fast = accelerate(model, image(), backend=backend, tune="off")
    expected = run(model.double(), image().double())
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_error(run(fast, image()).float(), expected) < 1e-2


def test_a_move_that_one_layer_cannot_follow_moves_nothing() -> None:
    fast = accelerate(vgg(), image(), backend="torch", tune="off")
    with pytest.raises(ValueError, match="cannot move"):
        fast.to(torch.float8_e4m3fn)
    assert {t.dtype for t in fast.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("network", ["vgg", "resnet"])
def test_compile_and_export_go_around_it(network: str) -> None:
    fast = accelerate(NETWORKS[network](), image(size=16), backend="torch", tune="off")
    x = image(size=16, seed=4)
    expected = run(fast, x)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert norm_error(run(compiled, x), expected) < 1e-6
    exported = torch.export.export(fast, (x,)).module()
    assert norm_error(run(exported, x), expected) < 1e-6


def test_an_exported_batch_may_be_dynamic() -> None:
    fast = accelerate(vgg(), image(), backend="torch", tune="off")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fast, (image(batch=4),), dynamic_shapes=(({0: batch},),))
    x = image(batch=3, seed=4)
    assert norm_error(run(program.module(), x), run(fast, x)) < 1e-6


def test_the_plan_in_force_is_kept() -> None:
    plan = make_plan(vgg(), image(), backend="torch")
    fast = accelerate(vgg(), image(), plan=plan, backend="dense", tune="off")
    assert [layer.name for layer in fast.plan.layers] == [layer.name for layer in plan.layers]
    assert {layer.backend for layer in fast.plan.layers} == {"dense"}


def test_a_plan_for_another_image_size_is_welcome() -> None:
    plan = make_plan(vgg(), image(batch=1, size=32))
    fast = accelerate(vgg(), image(), plan=plan, backend="torch", tune="off")
    assert norm_error(run(fast, image()), run(vgg(), image())) < 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_of_autograd_gives_the_same_plain_tensor(mode: Any) -> None:
    fast = accelerate(resnet(), image(), backend="torch", tune="off")
    with mode():
        y = fast(image())
    assert not y.requires_grad
    assert torch.equal(y, fast(image()))
    x = image().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        fast(x).sum().backward()


def test_an_accelerated_network_can_be_traced_by_torchscript() -> None:
    fast = accelerate(resnet(), image(), tune="off")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every check of a shape
        traced = torch.jit.trace(fast.network, image(), check_trace=False)
        assert norm_error(traced(image()), run(fast, image())) < 1e-6
