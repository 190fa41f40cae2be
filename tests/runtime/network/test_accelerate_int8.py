"""accelerate(dtype="int8"): what is quantised, how far off it is, and what such a network can do."""

import copy
import dataclasses
import warnings

import pytest
import torch
from oracle import norm_error
from runtime_networks import image, resnet, shared, untraceable, vgg
from torch import nn

import lhc_triton as lhc
from lhc_triton.planning.backends import BACKENDS as REGISTRY
from lhc_triton.runtime.network.int8 import Int8Conv2d
from lhc_triton.runtime.op.accuracy import INT8_LIMIT
from lhc_triton.runtime.op.backends import unavailable

NO_NATIVE = unavailable("native", torch.int8, "cpu")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))),
]
MODELS = {"vgg": vgg, "resnet": resnet, "untraceable": untraceable, "shared": shared}


def int8_layers(fast):
    return {name: m for name, m in fast.network.named_modules() if isinstance(m, Int8Conv2d)}


def in_int8(model, backend="reference", x=None, **options):
    return lhc.accelerate(model, image() if x is None else x, backend=backend, dtype="int8", **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_planned_layers_run_in_int8_near_the_model(name, backend):
    model, x = MODELS[name](), image(3, 16)
    before = copy.deepcopy(model.state_dict())
    fast = in_int8(model, backend, x)
    report = fast.report()
    rows = [row for row in report["layers"] if row["dtype"] == "int8"]
    assert {row["layer"] for row in rows} == set(int8_layers(fast))
    assert rows
    assert {row["backend"] for row in rows} == {backend}
    assert all(row["rel_err"] <= INT8_LIMIT for row in rows)
    assert any(row["rel_err"] > 1e-3 for row in rows)  # a layer of zeros alone has no error
    assert report["totals"]["rel_err"] == pytest.approx(norm_error(fast(x), model(x).double()), rel=1e-3)
    assert 1e-4 < report["totals"]["rel_err"] < 0.1
    layers = {row["layer"].partition("__")[0] for row in rows}  # calls with other epilogues are other modules
    assert any(f"{len(layers)} of " in note and "run in int8" in note for note in report["notes"])
    assert f"{backend} int8" in fast.explain()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
@pytest.mark.parametrize("name", ["vgg", "resnet", "shared"])
def test_both_backends_give_the_same_network(name):
    x = image(2, 20, seed=5)
    expected, found = (in_int8(MODELS[name](), backend, x)(x) for backend in ("reference", "native"))
    # The sums are exact, but what follows them is not: rarely, an activation falls to the next step.
    assert norm_error(found, expected.double()) < 2e-3


def lost(values, step):
    """The sum of squares that rows of values lose in steps of theirs."""
    step = step.view(-1, *[1] * (values.dim() - 1))
    return ((values / step).round().clamp(-127, 127) * step - values).square().flatten(1).sum(1)


def test_weights_and_activations_have_the_steps_that_lose_least():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.randn_like(conv.weight) ** 3 / 50)  # most are far smaller than the largest
        conv.weight[:, :, 0] = 0
        conv.weight[3] = 0  # a filter without weights
    x = image(2, 9, channels=16)
    (layer,) = int8_layers(in_int8(nn.Sequential(conv), x=x)).values()
    largest = conv.weight.detach().abs().amax((1, 2, 3)) / 127
    steps = layer.scale / layer.in_step
    assert steps[3] == 1
    alive = torch.arange(16) != 3
    assert (steps[alive] < largest[alive]).any()
    for share in (1.0, 0.9, 0.75, 0.5, 0.3):
        assert (
            lost(conv.weight[alive], steps[alive])
            <= lost(conv.weight[alive], largest[alive] * share) * 1.0001
        ).all()
        assert lost(x[None], layer.in_step) <= lost(x[None], share * x.abs().max() / 127) * 1.001
    off = (layer.dense_weight() - conv.weight)[alive].square().flatten(1).sum(1)
    torch.testing.assert_close(off, lost(conv.weight[alive], steps[alive]))
    assert layer.blocks.dtype == torch.int8
    assert int(layer.blocks.abs().max()) == 127


def test_what_an_int8_layer_computes_is_the_convolution_of_its_integers():
    model, x = vgg(), image()
    fast = in_int8(model, x=x)
    layer = next(iter(int8_layers(fast).values()))
    inputs = torch.randn(2, layer.in_channels, 9, 9) * 2
    step = layer.in_step
    integers = (inputs * (1 / step)).round().clamp(-127, 127) * step
    expected = nn.functional.conv2d(integers.double(), layer.dense_weight().double(), None, padding=1)
    expected = (expected + layer.bias.double().view(1, -1, 1, 1)).relu()
    expected = expected if layer.pool == "none" else nn.functional.max_pool2d(expected, 2)
    layer.out_step = None
    assert norm_error(layer(inputs), expected) < 1e-5


def test_activations_stay_int8_between_int8_layers_and_only_there():
    fast = in_int8(vgg(), graphs=False)
    found = []
    for layer in int8_layers(fast).values():
        layer.register_forward_hook(lambda m, given, out: found.append((given[0].dtype, out.dtype)))
    fast(image())
    assert found == [(torch.float32, torch.int8), (torch.int8, torch.int8), (torch.int8, torch.float32)]
    # In blocks that add a residual, what is added, and what it is added to, stay in float32.
    writers = {name for name, m in int8_layers(in_int8(resnet())).items() if m.out_step is not None}
    assert writers
    assert writers <= {
        "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1",
        "layer2.1.conv2",
    }  # fmt: skip


def halved(*convs):
    """Zero a half of the blocks of 16 channels and 16 filters."""
    for conv in convs:
        with torch.no_grad():
            conv.weight[:16, 16:], conv.weight[16:, :16] = 0, 0


class Outliers(nn.Module):
    """Its second convolution has a few inputs that are far larger than all others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
        halved(self.first, self.second)

    def forward(self, x):
        x = self.first(x).sigmoid()
        spikes = torch.zeros_like(x)
        spikes[:, :, 0, 0] = 300 * x[:, :, 0, 0]
        return self.second(x + spikes)[:, :, 1:]


def test_a_layer_that_int8_puts_too_far_off_stays_in_float32():
    torch.manual_seed(0)
    model, x = Outliers(), image(2, 40, channels=32)
    fast = in_int8(model, x=x)
    first, second = fast.report()["layers"]
    assert (first["dtype"], second["dtype"]) == ("int8", "float32")
    assert "in float32: int8 would be off by" in second["reason"]
    assert f"more than {INT8_LIMIT:g}" in second["reason"]
    assert norm_error(fast(x), model(x).double()) < INT8_LIMIT


class Cancelling(nn.Module):
    """The difference of what two convolutions give is small, and so is not near once they are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
        halved(self.one)
        self.other.load_state_dict(self.one.state_dict())
        with torch.no_grad():
            self.other.weight += 1e-3 * torch.randn(32, 32, 1, 1) * (self.one.weight != 0)

    def forward(self, x):
        return self.one(x) - self.other(x)


def test_layers_go_back_to_float32_until_the_output_is_near_enough():
    torch.manual_seed(0)
    model, x = Cancelling(), image(2, 12, channels=32)
    fast = in_int8(model, x=x)
    reasons = [row["reason"] for row in fast.report()["layers"]]
    assert not int8_layers(fast)
    assert all("in float32: with it in int8, on the example the output differs by" in why for why in reasons)
    assert norm_error(fast(x), model(x).double()) < 1e-2


class ByName(nn.Module):
    """It calls its convolution by name, and in a way that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)
        halved(self.conv)

    def forward(self, x):
        return self.conv(input=x) if float(x.sum()) < 1e9 else x


def test_a_layer_may_be_called_by_name():
    model, x = ByName(), image(channels=32)
    fast = in_int8(model, x=x)
    assert int8_layers(fast)
    assert 1e-4 < norm_error(fast(x), model(x).double()) < INT8_LIMIT


def test_a_layer_without_input_stays_in_float32():
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1))
    halved(model[0], model[2])
    with torch.no_grad():
        model[0].weight.abs_().neg_()
        model[0].bias.fill_(-1)
    fast = in_int8(model, x=image(channels=32).abs())
    assert "on the example its input is zero" in fast.report()["layers"][1]["reason"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_files_and_copies_compute_the_same_bits(name, backend, tmp_path):
    x = image(2, 14, seed=3)
    model = MODELS[name]()
    fast = in_int8(model, backend, x)
    expected = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an untraceable model's file needs the model
        lhc.save(fast, tmp_path / "net.safetensors")
    loaded = lhc.load(tmp_path / "net.safetensors", model=model if name == "untraceable" else None)
    assert torch.equal(loaded(x), expected)
    assert loaded.report() == fast.report()
    assert int8_layers(loaded).keys() == int8_layers(fast).keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_recordings_compute_the_same_bits(backend):
    x = image(2, 14, seed=3)
    fast = in_int8(vgg(), backend, x)
    first = fast(x)
    for _ in range(3):
        assert torch.equal(fast(x), first)
    assert not any("recording" in note for note in fast.report()["notes"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_export_takes_an_int8_network(backend):
    fast = in_int8(vgg(), backend)
    program = torch.export.export(fast, (image(),))
    assert torch.equal(program.module()(image()), fast(image()))


@pytest.mark.aot
def test_torch_compile_takes_an_int8_network():
    fast = in_int8(vgg())
    compiled = torch.compile(fast, fullgraph=True)
    assert norm_error(compiled(image()), fast(image()).double()) < 2e-3


def test_autocast_and_double_inputs_meet_the_layer_s_own_types():
    fast = in_int8(vgg(), graphs=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_error(fast(image()).float(), fast(image()).double()) < 0.05
    layer = next(iter(int8_layers(fast).values()))
    with pytest.raises(
        ValueError, match=r"the input is torch\.float64, the layer computes in torch\.float32"
    ):
        layer(torch.zeros(1, layer.in_channels, 8, 8, dtype=torch.float64))


def test_it_does_not_become_a_half_network():
    fast = in_int8(vgg())
    with pytest.raises(
        ValueError, match=r"in int8 cannot move to cpu in torch\.float16: .*call accelerate\(\)"
    ) as caught:
        fast.half()
    assert "\n" not in str(caught.value)
    assert fast(image()).dtype == torch.float32


def test_a_file_is_refused_where_its_backend_lacks_int8(tmp_path, monkeypatch):
    if NO_NATIVE is not None:
        pytest.skip(NO_NATIVE)
    lhc.save(in_int8(vgg(), "native"), tmp_path / "net.safetensors")
    monkeypatch.setitem(REGISTRY, "native", dataclasses.replace(REGISTRY["native"], dtypes=("float32",)))
    with pytest.raises(ValueError, match=r"quantised to int8 for backend .native.: .* does not serve int8"):
        lhc.load(tmp_path / "net.safetensors")


@pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
def test_auto_takes_int8_for_layers_without_zeros_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    fast = lhc.accelerate(model, image(1, 56, channels=64), dtype="int8", tune="off")
    assert all(row["density"] == 1 for row in fast.report()["layers"])
    assert {row["backend"] for row in fast.report()["layers"]} <= {"native", "dense"}
    assert lhc.Plan.from_json(fast.plan.to_json()) == fast.plan


WRONG = {
    "unknown": (
        {"dtype": "int4"},
        "dtype='int4' is not supported; use 'int8', or None for the model's own type",
    ),
    "a dtype": ({"dtype": torch.int8}, r"dtype=torch\.int8 is not supported; use 'int8'"),
    "dense": (
        {"dtype": "int8", "backend": "dense"},
        "backend 'dense' does not serve int8; use 'auto' or one of",
    ),
    "torch": (
        {"dtype": "int8", "backend": "torch"},
        "dtype='int8': backend .torch. does not serve int8; use one of",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_get_one_line(wrong):
    options, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message) as caught:
        lhc.accelerate(vgg(), image(), **options)
    assert "\n" not in str(caught.value)


def test_a_half_model_is_refused():
    with pytest.raises(
        ValueError, match=r"quantises float32 models, not torch\.bfloat16: call model\.float\(\) first"
    ):
        in_int8(vgg().bfloat16(), x=image().bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loaded", [False, True])
def test_integers_of_the_callers_are_no_steps_of_the_layers(backend, loaded, tmp_path):
    """An image in int8 is in nobody's steps, whether a layer may read another's int8 or not."""
    fast = in_int8(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).eval(), backend, tune="off")
    if loaded:
        lhc.save(fast, tmp_path / "net")
        fast = lhc.load(tmp_path / "net")
    x = (image() * 20).to(torch.int8)
    with pytest.raises(ValueError, match=r"the input is torch\.int8, the layer computes in torch\.float32"):
        fast(x)
