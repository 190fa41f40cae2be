"""The small VGG, its files, and the networks that ship with the package."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lhc_triton.conversion import convert, freeze, lhc_layers, summary
from lhc_triton.models import load_pretrained, load_vgg, save_vgg, small_vgg
from lhc_triton.models.pretrained import pretrained_path
from lhc_triton.models.weights import read_tensors, write_tensors
from lhc_triton.topology import LHCConfig
from lhc_triton.training import FashionMNIST
from lhc_triton.training.stage import accuracy

ARCHITECTURE = {"widths": [8, "M", 12], "in_channels": 1, "num_classes": 10, "lhc": None}
LHC = {"density": 0.1, "in_block": 4, "out_block": 4, "shapes": "free"}


def network(seed: int = 0, sparse: bool = False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = small_vgg((8, "M", 12))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.normal_()
        if sparse:
            freeze(convert(model, LHCConfig(**LHC)))
    return model.eval()


def test_the_small_vgg_has_the_documented_size():
    model = small_vgg()
    found = summary(model, (1, 1, 28, 28))
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(row.kind != "linear" for row in found.rows) == 6
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert 1.1e6 < weights < 1.2e6


def test_the_small_vgg_takes_other_sizes():
    model = small_vgg((4, "M", 6), in_channels=3, num_classes=7)
    assert model(torch.zeros(1, 3, 9, 11)).shape == (1, 7)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (((),), ValueError, "begin with a number"),
        ((("M", 4),), ValueError, "begin with a number"),
        (((4, 0),), ValueError, "width 0"),
        (((4, "A"),), TypeError, "'A'"),
        (((4, 2.0),), TypeError, "2.0"),
        (((4,), 0), ValueError, "in_channels 0"),
        (((4,), 1, 0), ValueError, "num_classes 0"),
    ],
)
def test_wrong_sizes_of_a_vgg_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        small_vgg(*arguments)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_saved_network_computes_the_same_up_to_half_precision(tmp_path, sparse):
    model = network(sparse=sparse)
    path = tmp_path / "net.safetensors"
    save_vgg(model, path, {**ARCHITECTURE, "lhc": LHC if sparse else None}, {"epochs": 3})
    read, notes = load_vgg(path)
    assert notes == {"epochs": 3}
    assert not read.training
    assert bool(lhc_layers(read)) == sparse
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}
    x = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(read(x), model(x), rtol=1e-2, atol=1e-2)
    for name, layer in lhc_layers(read).items():
        assert layer.frozen
        assert torch.equal(layer.topology, lhc_layers(model)[name].topology)
        assert torch.equal(layer.weight, layer.masked_weight())


def test_a_network_that_is_still_learning_its_topology_is_not_saved(tmp_path):
    model = convert(small_vgg((8, "M", 12)), LHCConfig(**LHC))
    with pytest.raises(ValueError, match="not frozen"):
        save_vgg(model, tmp_path / "net", {**ARCHITECTURE, "lhc": LHC})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_half_precision_cannot_hold_are_not_saved(tmp_path, value):
    model = network()
    torch.nn.init.constant_(model.classifier.weight, value)
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        save_vgg(model, tmp_path / "net", ARCHITECTURE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_weights_file_is_named(tmp_path, keep):
    path = tmp_path / "net.safetensors"
    save_vgg(network(), path, ARCHITECTURE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net\.safetensors: not an intact"):
        load_vgg(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": [8, "M", 13]},
        {"widths": [8, "M", 12, 12]},
        {"widths": [8, "M", 10**9]},
        {"widths": [8, "M", 1.5]},
        {"widths": ["M"]},
        {"widths": [8] * 65},
        {"widths": 8},
        {"num_classes": 11},
        {"in_channels": True},
        {"lhc": LHC},
        {"lhc": {**LHC, "more": 1}},
        {"lhc": 0.1},
    ],
)
def test_a_file_whose_weights_are_not_those_of_its_architecture_is_named(tmp_path, changes):
    path = tmp_path / "net.safetensors"
    save_vgg(network(), path, {**ARCHITECTURE, **changes})
    with pytest.raises(ValueError, match=r"net\.safetensors: does not hold") as caught:
        load_vgg(path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_dtype_or_not_finite_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_vgg(network(), path, ARCHITECTURE)
    tensors, document = read_tensors(path, "vgg weights", 1)
    for wrong, said in (
        (torch.zeros(10, 12, dtype=torch.int64), "dtype"),
        (torch.full((10, 12), float("nan")), "finite"),
    ):
        write_tensors(path, {**tensors, "classifier.weight": wrong}, document)
        with pytest.raises(ValueError, match=f"classifier.weight .*{said}"):
            load_vgg(path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match="net"):
        load_vgg(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no lhc_triton metadata"):
        load_vgg(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"lhc_triton": "{"})
    with pytest.raises(ValueError, match="not JSON"):
        load_vgg(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"lhc_triton": json.dumps({"kind": "vgg weights"})})
    with pytest.raises(ValueError, match="version None"):
        load_vgg(path)


def test_a_document_with_nan_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_tensors(tmp_path / "x", {}, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tensors_of_shared_storage_are_written_and_replace_a_file_that_is_being_read(tmp_path):
    path, base = tmp_path / "x", torch.arange(6.0)
    document = {"kind": "k", "version": 1}
    write_tensors(path, {"a": base, "b": base[2:], "c": base.reshape(2, 3).t()}, document)
    tensors, _ = read_tensors(path, "k", 1)
    write_tensors(path, {"a": -base}, document)
    assert torch.equal(tensors["c"], base.reshape(2, 3).t())
    assert load_file(path).keys() == {"a"}


def test_an_unknown_pretrained_network_is_refused():
    with pytest.raises(ValueError, match="'huge' is not one of lhc, dense"):
        load_pretrained("huge")


def test_the_pretrained_pair_keeps_its_promise():
    """By its notes, whose accuracies are those of all 10,000 test images."""
    notes = {kind: load_vgg(pretrained_path(kind))[1] for kind in ("dense", "lhc")}
    assert notes["lhc"]["test_accuracy"] >= notes["dense"]["test_accuracy"] - 0.01
    assert notes["lhc"]["epochs"] == notes["dense"]["epochs"]
    assert notes["lhc"]["command"].startswith("lhc-triton train --preset shipped")
    found = summary(load_pretrained("lhc"), (1, 1, 28, 28))
    converted = [row for row in found.rows if row.kind == "lhc"]
    assert len(converted) == 5
    assert sum(row.weights for row in converted) >= 8 * sum(row.live_weights for row in converted)
    assert sum(row.macs for row in converted) >= 4 * sum(row.live_macs for row in converted)
    assert not lhc_layers(load_pretrained("dense"))


@pytest.mark.parametrize("kind", ["dense", "lhc"])
def test_a_pretrained_network_reaches_its_noted_accuracy(kind):
    """On every tenth test image, so up to the error of a sample of 1,000."""
    test = FashionMNIST.packaged().test
    found = accuracy(load_pretrained(kind), test.subset(torch.arange(0, len(test), 10)), "fp32")
    assert abs(found - load_vgg(pretrained_path(kind))[1]["test_accuracy"]) < 0.025
