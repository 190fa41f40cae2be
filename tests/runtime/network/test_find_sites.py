"""What an epilogue may absorb, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import norm_error
from runtime_networks import finish, image, resnet, shared, untraceable, vgg
from torch import Tensor, fx, nn

from lhc_triton.runtime.network.fusion import fuse
from lhc_triton.runtime.network.sites import Site, find_sites, rewrite
from lhc_triton.runtime.network.tracing import TraceError, record_shapes, trace


def rewritten(model: nn.Module, *inputs: Tensor) -> tuple[tuple[Site, ...], fx.GraphModule]:
    traced = trace(copy.deepcopy(model).eval())
    sites = find_sites(traced, record_shapes(traced, inputs)[0])
    modules = {}
    for site in sites:
        norm = traced.get_submodule(site.norm) if site.norm else None
        modules[site.module] = fuse(
            traced.get_submodule(site.layer),
            norm,
            layer=None,
            backend="dense",
            activation=site.activation,
            pool=site.pool,
        )
    return sites, rewrite(traced, sites, modules)


def check(model: nn.Module, *inputs: Tensor) -> tuple[Site, ...]:
    """Rewrite in float64 and compare with the model; return the sites."""
    model = model.double().eval()
    inputs = tuple(value.double() for value in inputs)
    with torch.no_grad():
        expected = model(*[value.clone() for value in inputs])
        sites, fast = rewritten(model, *inputs)
        assert norm_error(fast(*[value.clone() for value in inputs]), expected) < 1e-12
        bigger = [torch.cat([value, value.flip(0), value]) for value in inputs]
        assert norm_error(fast(*[v.clone() for v in bigger]), model(*[v.clone() for v in bigger])) < 1e-12
    return sites


class Calls(nn.Module):
    """Two convolutions, a norm and a function of them: one case of a table."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.offset = nn.Parameter(torch.randn(1, 4, 12, 12))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def calls(body: Callable[..., Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return finish(Calls(body))


def test_a_vgg_absorbs_norm_relu_and_pool() -> None:
    sites = check(vgg(), image())
    assert [site.epilogue for site in sites] == ["bn+relu", "bn+relu+maxpool", "bn+relu", "bn+relu+maxpool"]


def test_a_resnet_absorbs_norms_relus_and_residuals() -> None:
    sites = check(resnet(), image(size=16))
    epilogues = {site.layer: site.epilogue for site in sites}
    assert epilogues["layer1.0.conv2"] == "bn+add+relu"
    assert epilogues["layer1.1.conv2"] == "bn+add+relu"
    assert epilogues["layer1.1.downsample.0"] == "bn"
    assert epilogues["layer2.1.conv3"] == "bn+add+relu"
    assert epilogues["conv1"] == "bn+relu"


def test_a_shared_convolution_gets_one_module_per_epilogue() -> None:
    sites = check(shared(), image())
    assert [(site.layer, site.module) for site in sites[1:]] == [
        ("conv", "conv"),
        ("conv", "conv__1"),
        ("conv", "conv__2"),
    ]
    assert [site.epilogue for site in sites[1:]] == ["bn+relu", "add", "relu"]


def test_calls_with_equal_epilogues_share_their_module() -> None:
    sites = check(calls(lambda m, x: m.a(m.a(x).relu()).relu()), image(channels=4))
    assert [site.module for site in sites] == ["a", "a"]


ADDITIONS = {
    "operator": lambda m, x: (m.a(x) + x).relu(),
    "swapped": lambda m, x: (x + m.a(x)).relu(),
    "torch.add": lambda m, x: F.relu(torch.add(m.a(x), x)),
    "method": lambda m, x: torch.relu(m.a(x).add(x)),
    "method in place": lambda m, x: m.a(x).add_(x).relu_(),
    "alpha 1": lambda m, x: torch.add(m.a(x), x, alpha=1).relu(),
}


@pytest.mark.parametrize("form", ADDITIONS)
def test_every_form_of_a_residual_is_absorbed(form: str) -> None:
    assert check(calls(ADDITIONS[form]), image(channels=4))[0].epilogue == "add+relu"


RELUS = {
    "module": lambda m, x: m.relu(m.a(x)),
    "F.relu": lambda m, x: F.relu(m.a(x)),
    "F.relu in place": lambda m, x: F.relu(m.a(x), inplace=True),
    "torch.relu": lambda m, x: torch.relu(m.a(x)),
    "torch.relu_": lambda m, x: torch.relu_(m.a(x)),
    "method": lambda m, x: m.a(x).relu(),
    "method in place": lambda m, x: m.a(x).relu_(),
}


@pytest.mark.parametrize("form", RELUS)
def test_every_form_of_relu_is_absorbed(form: str) -> None:
    assert check(calls(RELUS[form]), image(channels=4))[0].epilogue == "relu"


def _changed_input(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1.0
    y = m.norm(m.a(x))
    x.relu_()
    return y + x


def _changed_later(m: nn.Module, x: Tensor) -> Tensor:
    x = m.b(x)
    y = m.a(x) + x
    x.add_(1.0)
    return y.relu() + x


def _changed_view(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1.0
    flat = x.flatten(1)
    y = m.a(x)
    flat.mul_(2.0)
    return m.norm(y) + x


def _changed_residual(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1.0
    return x.add_(m.a(x)).relu()


def _changed_shared_residual(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1.0
    before = x.view(-1)
    y = x.add_(m.a(x))
    return y * before.sum()


def _dropped_result(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y.relu_()
    return y * 2.0


LEFT_ALONE = {
    "two users": (lambda m, x: (y := m.a(x)).relu() + y, "-"),
    "two branches": (lambda m, x: m.norm(y := m.a(x)) + m.other(y), "-"),
    "alpha 2": (lambda m, x: torch.add(m.a(x), x, alpha=2).relu(), "-"),
    "a number": (lambda m, x: (m.a(x) + 1.0).relu(), "-"),
    "broadcast": (lambda m, x: (m.a(x) + x.mean((2, 3), keepdim=True)).relu(), "-"),
    "itself": (lambda m, x: ((y := m.a(x)) + y).relu(), "-"),
    "input changed before the norm's user": (_changed_input, "bn"),
    "residual changed before relu": (_changed_later, "add"),
    "view of the input changed": (_changed_view, "-"),
    "residual changed by the addition": (_changed_residual, "-"),
    "alias of a changed residual": (_changed_shared_residual, "-"),
    "result of relu_ dropped": (_dropped_result, "-"),
    "relu before the addition": (lambda m, x: m.a(x).relu() + x, "relu"),
    "norm after relu": (lambda m, x: m.norm(m.a(x).relu()), "relu"),
    "pool with padding": (lambda m, x: F.max_pool2d(m.a(x), 2, 2, 1), "-"),
    "pool with ceil": (lambda m, x: F.max_pool2d(m.a(x), 2, ceil_mode=True), "-"),
    "overlapping pool": (lambda m, x: F.max_pool2d(m.a(x), 2, stride=1), "-"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_somebody_else_sees_is_not_absorbed(case: str) -> None:
    body, expected = LEFT_ALONE[case]
    sites = check(calls(body), image(channels=4))
    assert {site.layer: site.epilogue for site in sites}["a"] == expected


def test_a_residual_of_batch_one_may_broadcast_later() -> None:
    model = calls(lambda m, x: (m.a(x) + m.offset).relu())
    assert check(model, image(batch=1, channels=4))[0].epilogue == "add+relu"


def test_convolutions_of_both_operands_share_one_addition() -> None:
    sites = check(calls(lambda m, x: m.norm(m.a(x)) + m.other(m.b(x))), image(channels=4))
    assert sorted(site.epilogue for site in sites) == ["bn", "bn+add"]


@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_without_affine_is_folded(affine: bool) -> None:
    torch.manual_seed(0)
    model = finish(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine)))
    assert check(model, image())[0].norm == "1"


def test_a_norm_without_running_statistics_is_not_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    traced = trace(model)
    assert find_sites(traced, record_shapes(traced, [image()])[0])[0].norm is None


def test_a_norm_is_folded_into_each_of_its_convolutions() -> None:
    sites = check(calls(lambda m, x: m.norm(m.a(x)) * m.norm(m.b(x))), image(channels=4))
    assert [site.norm for site in sites] == ["norm", "norm"]


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"padding": "same"},
        {"padding": "valid"},
        {"stride": (2, 1)},
        {"dilation": 2},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [3, (2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_dense_fusion_keeps_every_argument(options: dict[str, object], kernel: object) -> None:
    torch.manual_seed(0)
    model = finish(nn.Sequential(nn.Conv2d(4, 6, kernel, **options), nn.BatchNorm2d(6), nn.ReLU()))  # type: ignore[arg-type]
    assert check(model, image(channels=4))[0].epilogue == "bn+relu"


def test_other_padding_modes_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3))
    assert [site.layer for site in check(model, image())] == ["1"]


def test_data_dependent_control_flow_is_a_trace_error() -> None:
    with pytest.raises(TraceError, match="TypeError: float"):
        trace(untraceable())


@pytest.mark.parametrize("default", [False, True, None, 3])
def test_arguments_that_the_example_leaves_out_are_fixed_at_their_defaults(default: object) -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, features: object = default, scale: float = 2.0) -> Tensor:
            y = self.conv(x) * scale
            return y if features else y.mean((2, 3))

    model = Switch().eval()
    with pytest.raises(TraceError, match="control flow"):
        trace(model)
    traced = trace(model, 1)
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x"]
    with torch.no_grad():
        assert torch.equal(traced(image()), model(image()))


def test_the_traced_model_is_not_changed_by_a_rewrite() -> None:
    model = vgg()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced = trace(model)
    code = traced.code
    rewrite(traced, [], {})
    assert traced.code == code
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
