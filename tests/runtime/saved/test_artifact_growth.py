"""Graphs of files cannot grow a tensor without bound; the sizes that this is judged by are the real ones."""

from __future__ import annotations

import copy
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from artifact_files import document_of, quick, rewrite_file, run
from runtime_networks import image, vgg
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from zoo.networks import ZOO, build

import lhc_triton as lhc
from lhc_triton.artifact import ArtifactError, load, save
from lhc_triton.runtime.op.epilogue import like_format
from lhc_triton.runtime.saved.operations import (
    IDENTITIES,
    MODULES,
    OPERATIONS,
    operation_of,
    stochastic_depth,
)
from lhc_triton.runtime.saved.sizes import of_module, of_operation, stand_in


class Compared(fx.Interpreter):
    """Runs a graph for real, and holds every step's sizes against those that the rules tell."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.seen: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        real = super().run_node(n)
        if n.op in OPERATIONS or n.op == "call_module":
            args, kwargs = tree_map_only(
                Tensor, lambda x: stand_in(x.shape, x.dtype), self.fetch_args_kwargs_from_env(n)
            )
            if n.op == "call_module":
                module = self.fetch_attr(n.target)
                self.seen.add(type(module).__name__)
                told = of_module(module, *args)
            else:
                operation = operation_of(n)
                self.seen.add(f"{n.op} {operation.name}")
                told = of_operation(n.op, operation.target, args, kwargs)
            assert sizes_of(told) == sizes_of(real), n.format_node()
        return real


def sizes_of(value: Any) -> Any:
    leaves, structure = tree_flatten(value)
    plain = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return plain, len(leaves) if isinstance(value, list | tuple) else structure


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_every_step_of_real_networks_has_the_sizes_that_are_told(name: str, backend: str) -> None:
    model, inputs = build(name)
    fast = lhc.accelerate(model, inputs, tune="off", backend=backend)
    compared = Compared(fast.network)
    compared.run(*inputs)
    assert compared.seen


def untraced(x: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function that a trace would look into."""
    return x.tracer.create_proxy("call_function", function, (x, *args), kwargs)


def normed(x: Any) -> Any:
    return F.batch_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], None, x[1, :, 0, 0], False, 0.0, 1e-5)


# Calls of x [2, 16, 6, 9], which between them use every operation of the list.
CALLS: list[Any] = [
    lambda x: (x + 1, 2 - x, x * x[:1], x / 2, x - x[0], x.flatten(1) + x.flatten(1)[:, :1]),
    lambda x: [untraced(x + 0, f, x[:1]) for f in (operator.iadd, operator.isub, operator.imul)],
    lambda x: (untraced(x + 0, operator.itruediv, 2), operator.truediv(x, x), operator.floordiv(x, 2)),
    lambda x: (x.size(1) // 2 + 3 * x.size(0), x.shape[2] - 1, x.dim(), -x, x**2, x.size(), x.shape),
    lambda x: (x[:, 1], x[..., None, ::2], x[0], x[:, -3:, 1:2], untraced(x, like_format, x)),
    lambda x: (torch.add(x, x[:, :1], alpha=2), torch.sub(x, 1), torch.mul(x, x), torch.div(x, 3)),
    lambda x: (torch.neg(x), torch.pow(x, 2), torch.sqrt(x), torch.exp(x), torch.abs(x), torch.tanh(x)),
    lambda x: (torch.clamp(x, 0, 1), torch.relu(x), torch.relu_(x + 0), torch.sigmoid(x)),
    lambda x: (torch.stack([x, x], dim=-1), torch.stack([x, x]), torch.cat([x, x[:, :3]], dim=1)),
    lambda x: (torch.cat([x, x], -1), torch.cat([x, x, x]), torch.softmax(x, 1)),
    lambda x: (torch.chunk(x, 3, dim=1), torch.split(x, 5, 1), torch.split(x, [4, 12], dim=1), x.split(2)),
    lambda x: (x.chunk(2), x.split([3, 3, 3], -1), torch.transpose(x, 1, -1), x.transpose(2, 3)),
    lambda x: (torch.permute(x, (0, 2, 3, 1)), x.permute(3, 2, 1, 0), x.permute(0, 2, 3, 1).contiguous()),
    lambda x: (torch.reshape(x, (2, -1)), x.reshape(2, 4, 4, -1), x.view(2, 16, 54), x.view(x.size(0), -1)),
    lambda x: (torch.unsqueeze(x, 1), x.unsqueeze(-1), torch.squeeze(x[:1]), x[:, :1].squeeze(1)),
    lambda x: (x.squeeze(0), torch.flatten(x, 2), torch.flatten(x), x.flatten(1, 2)),
    lambda x: x[:, :1].expand(-1, 7, -1, -1),
    lambda x: (torch.mean(x, (2, 3)), torch.mean(x, 1, keepdim=True), torch.mean(x), x.mean(-1), x.mean()),
    lambda x: (x.mean((-1, 1), keepdim=True), x.sum(), x.sum(1), x.sum((0, 3), True)),
    lambda x: (F.relu(x), F.relu6(x), F.silu(x), F.hardswish(x), F.hardsigmoid(x), F.leaky_relu(x, 0.2)),
    lambda x: (F.softmax(x, 1), F.log_softmax(x, dim=1), F.elu(x), F.gelu(x), F.mish(x), F.softplus(x)),
    lambda x: (F.hardtanh(x), untraced(x, F.tanh), untraced(x, F.sigmoid), F.dropout(x, 0.5, False)),
    lambda x: (F.dropout2d(x, 0.5, False), untraced(x, stochastic_depth, 0.1, "row", False)),
    lambda x: (x.ndim, x.ndim == 4, x == x[:1], torch._assert(x.ndim == 4, "four axes")),
    lambda x: (F.prelu(x, x[0, :, 0, 0]), F.interpolate(x, scale_factor=1.7), F.interpolate(x, (5, 4))),
    lambda x: (F.interpolate(x, 7, mode="bilinear"), F.interpolate(x, scale_factor=(2.0, 0.5))),
    lambda x: F.interpolate(x[0], 4),
    lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x[..., :8], 2), F.channel_shuffle(x, 4)),
    lambda x: (F.group_norm(x, 4), F.layer_norm(x, [6, 9]), normed(x), F.linear(x, x[0, :5, 0])),
    lambda x: (F.max_pool2d(x, 2), F.max_pool2d(x, (3, 2), (2, 1), 1, ceil_mode=True), F.max_pool2d(x[0], 2)),
    lambda x: (F.max_pool2d(x, 2, 3, 0, 2), F.avg_pool2d(x, 3, 2, 1, True), F.avg_pool2d(x, 5, 4, 2, True)),
    lambda x: untraced(x, F.max_pool2d, 2, return_indices=True),
    lambda x: (F.adaptive_avg_pool2d(x, (None, 3)), F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 2)),
    lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, 0, 2, 3, 4, 5)), F.pad(x, (1, 1, 2, 2), mode="circular")),
    lambda x: (x.relu(), (x + 0).relu_(), x.sigmoid(), x.softmax(1), x.add(1), (x + 0).add_(x[:, :1])),
    lambda x: (x.mul(x), (x + 0).mul_(2), x.sub(1), (x + 0).sub_(x), x.div(2), (x + 0).div_(2), x.neg()),
    lambda x: (x.pow(2), x.sqrt(), x.exp(), x.abs(), x.tanh(), x.clamp(0, 1), x.log_softmax(1)),
]  # fmt: skip

LAYERS: list[nn.Module] = [
    nn.Conv2d(16, 8, (3, 2), (2, 1), (1, 3), (2, 1)),
    nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"),
    nn.ConvTranspose2d(16, 6, (4, 3), (2, 3), (1, 0), (1, 2), dilation=(1, 2)), nn.Linear(9, 4),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((2, 3)),
    nn.AvgPool2d(3, 2, (1, 0), ceil_mode=True), nn.AdaptiveAvgPool2d((None, 2)),
    nn.AdaptiveMaxPool2d(5), nn.Upsample(scale_factor=(2.5, 0.5)),
    nn.Upsample((4, 11), mode="bilinear"), nn.Upsample(size=3), nn.UpsamplingNearest2d(scale_factor=2),
    nn.UpsamplingBilinear2d((7, 3)), nn.PixelShuffle(4), nn.ChannelShuffle(2),
    nn.ZeroPad2d((1, 2, 3, 4)), nn.ReflectionPad2d(2), nn.ReplicationPad2d((0, 1, 2, 0)),
    nn.ConstantPad2d(1, 0.5), nn.Flatten(2), nn.Flatten(), nn.BatchNorm2d(16), nn.GroupNorm(4, 16),
    nn.LayerNorm([6, 9]), nn.Softmax(1), nn.LogSoftmax(1), nn.PReLU(16), nn.ReLU(), nn.ReLU6(),
    nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.LeakyReLU(), nn.ELU(), nn.GELU(),
    nn.Mish(), nn.Softplus(), nn.Hardtanh(), nn.Tanh(), nn.Identity(), nn.PixelUnshuffle(3),
]  # fmt: skip

UNBATCHED = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.PixelShuffle,
)


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_every_listed_operation_has_the_sizes_that_are_told() -> None:
    seen: set[str] = set()
    for function in CALLS:
        compared = Compared(fx.symbolic_trace(Calls(function)))
        compared.run(torch.rand(2, 16, 6, 9))
        seen |= compared.seen
    assert seen == {f"{kind} {name}" for kind, operations in OPERATIONS.items() for name in operations}


def test_every_listed_module_has_the_sizes_that_are_told() -> None:
    x = torch.rand(2, 16, 6, 9)
    for layer in LAYERS:
        compared = Compared(fx.symbolic_trace(nn.Sequential(layer).eval()))
        compared.run(x)
        unbatched = not isinstance(
            layer, nn.Upsample | nn.BatchNorm2d | nn.GroupNorm | nn.PReLU | nn.ChannelShuffle
        )
        if unbatched and not isinstance(layer, nn.Flatten | nn.Softmax | nn.LogSoftmax):
            compared.run(x[0])
    kinds = {type(layer) for layer in LAYERS}
    assert kinds == set(MODULES)
    assert set(IDENTITIES) - kinds <= {nn.Dropout, nn.Dropout1d, nn.Dropout2d}  # stored as nn.Identity


def test_an_index_of_numbers_gives_its_own_sizes() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.tensor([[3, 1], [0, 0], [2, 5]]))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.order] + x[self.order[0, 1]].mean()

    Compared(fx.symbolic_trace(Picked())).run(torch.rand(2, 16, 6, 9))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("saved") / "net"
    save(quick(vgg()), path)
    return document_of(path)


def add_steps(document: dict[str, Any], steps: list[Any]) -> None:
    """Put steps (op, target, args, kwargs) after the input "x"; "it" stands for the step before."""
    first = {"node": document["nodes"][0]["name"]}
    for number, (op, target, args, kwargs) in enumerate(steps):
        before = {"node": f"grown{number - 1}"} if number else first
        names = {"it": before, "both": [before, before], "x": first}
        given = [names.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
        entry = {"name": f"grown{number}", "op": op, "target": target, "args": given, "kwargs": kwargs}
        document["nodes"].insert(number + 1, entry)


def call(target: str, *args: Any, **kwargs: Any) -> tuple[str, str, list[Any], dict[str, Any]]:
    return "call_function", target, list(args), kwargs


def method(target: str, *args: Any) -> tuple[str, str, list[Any], dict[str, Any]]:
    return "call_method", target, ["it", *args], {}


HOSTILE: dict[str, tuple[list[Any], dict[str, Any] | None, str]] = {
    "doubled": ([call("torch.cat", "both")] * 60, None, "values are held at a time"),
    "stacked": ([call("torch.stack", "both", 0)] * 60, None, "values are held at a time"),
    "upsampled": ([call("interpolate", "it", scale_factor=2.0**20)], None, "values are held at a time"),
    "upsampled to a size": ([call("interpolate", "it", 2**30)], None, "values are held at a time"),
    "upsampled by a module": (
        [("call_module", "up", ["it"], {})] * 6,
        {"type": "UpsamplingNearest2d", "size": None, "scale_factor": 64},
        "values are held at a time",
    ),
    "padded": ([call("pad", "it", [2**30, 0, 0, 2**30])], None, "values are held at a time"),
    "padded by a module": (
        [("call_module", "up", ["it"], {})],
        {"type": "ZeroPad2d", "padding": [2**25] * 4},
        "values are held at a time",
    ),
    "an outer product": (
        [
            *(method("reshape", -1, 1), method("transpose", 0, 1), call("mul", "it", {"node": "grown0"})),
            *(method("reshape", -1, 1), method("transpose", 0, 1), call("mul", "it", {"node": "grown3"})),
        ],
        None,
        "values are held at a time",
    ),
    "expanded": ([method("unsqueeze", 0), method("expand", 2**38, -1, -1, -1, -1)], None, "values are held"),
    "expanded beyond 64 bits": (
        [*[method("unsqueeze", 0)] * 2, method("expand", 2**40, 2**40, -1, -1, -1, -1)],
        None,
        "does not take inputs as its example's",
    ),
    "pooled to a large size": ([call("adaptive_avg_pool2d", "it", 2**20)], None, "values are held at a time"),
    "many pieces": ([call("torch.split", "x", 1, 3)] * 5000, None, "more than 65536 pieces of tensors"),
    "a long way": (
        [*[call("torch.cat", "both")] * 10, *[method("contiguous")] * 1000],
        None,
        "values are computed",
    ),
    "other sizes": ([method("reshape", 1, 3, 7)], None, "does not take inputs as its example's: "),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_grows_is_refused_in_one_line(kind: str, saved: Any, tmp_path: Path) -> None:
    document, tensors = copy.deepcopy(saved)
    steps, module, said = HOSTILE[kind]
    if module is not None:
        document["modules"]["up"] = module
    add_steps(document, steps)
    rewrite_file(tmp_path / "net", document, tensors)
    with pytest.raises(ArtifactError, match=said) as caught:
        load(tmp_path / "net")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_border_that_a_convolution_copies_counts(tmp_path: Path) -> None:
    save(quick(vgg(), backend="dense"), tmp_path / "net")
    document, tensors = document_of(tmp_path / "net")
    name, spec = list(document["modules"].items())[2]
    assert spec["type"] == "DenseConv2d"
    spec.update(padding=[0, 4096, 0, 4096], stride=[4096, 4096])
    rewrite_file(tmp_path / "net", document, tensors)
    with pytest.raises(ArtifactError, match=f"up to '{name}', [0-9]+ values are held at a time"):
        load(tmp_path / "net")


def test_an_example_that_no_machine_holds_is_refused(saved: Any, tmp_path: Path) -> None:
    document, tensors = copy.deepcopy(saved)
    document["record"]["inputs"][0][0] = [2**20, 3, 2**20, 2**20]
    rewrite_file(tmp_path / "net", document, tensors)
    with pytest.raises(ArtifactError, match=r"its example inputs have \d+ values; up to 268435456 are read"):
        load(tmp_path / "net")


def test_growth_that_its_inputs_justify_is_loaded(saved: Any, tmp_path: Path) -> None:
    document, tensors = copy.deepcopy(saved)
    first = document["nodes"][0]["name"]
    steps = [call("interpolate", "it", scale_factor=4.0), call("pad", "it", [4, 4, 4, 4])]
    steps += [call("torch.cat", "both", 1)] * 4
    add_steps(document, steps)
    rewrite_file(tmp_path / "net", document, tensors)
    expected = run(quick(vgg()), image(size=16))
    assert document["nodes"][1]["args"][0] == {"node": first}
    torch.testing.assert_close(run(load(tmp_path / "net"), image(size=16)), expected, rtol=0, atol=0)


def test_load_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Which torch's meta device would, and which takes longer than all else that load does."""
    save(quick(vgg()), tmp_path / "net")
    code = (
        "import sys, lhc_triton\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "lhc_triton.load(sys.argv[1])\n"
        "assert before or 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
