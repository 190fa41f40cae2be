"""Network files: the small VGG's, the other networks', and those that ship with the package."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lhc_triton.conversion import convert, freeze, lhc_layers, summary
from lhc_triton.handcrafted import impose
from lhc_triton.models import (
    Architecture,
    load_network,
    load_pretrained,
    pretrained,
    save_network,
    small_vgg,
)
from lhc_triton.models.pretrained import load_initial, pretrained_path
from lhc_triton.models.weights import read_tensors, write_tensors
from lhc_triton.topology import LHCConfig
from lhc_triton.training import open_data

ARCHITECTURE = Architecture("small-vgg", (8, "M", 12), "cifar", 1, 10, 28)
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
    save_network(model, path, ARCHITECTURE, {"epochs": 3})
    saved = load_network(path)
    read = saved.model
    assert (saved.training, saved.architecture) == ({"epochs": 3}, ARCHITECTURE)
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
        save_network(model, tmp_path / "net", ARCHITECTURE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_half_precision_cannot_hold_are_not_saved(tmp_path, value):
    model = network()
    torch.nn.init.constant_(model.classifier.weight, value)
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        save_network(model, tmp_path / "net", ARCHITECTURE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_weights_file_is_named(tmp_path, keep):
    path = tmp_path / "net.safetensors"
    save_network(network(), path, ARCHITECTURE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net\.safetensors: not an intact"):
        load_network(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": [8, "M", 13]},
        {"widths": [8, "M", 12, 12]},
        {"widths": [8, "M", 10**9]},
        {"widths": [8192] * 64},
        {"widths": [8, "M", 1.5]},
        {"widths": [8, ["M"]]},
        {"widths": ["M"]},
        {"widths": [8] * 65},
        {"widths": 8},
        {"num_classes": 11},
        {"in_channels": True},
        {"image_size": 1},
        {"images": "mnist"},
        {"images": "imagenet"},
        {"network": "resnet34"},
        {"network": ["vgg16"]},
        {"more": 1},
    ],
)
def test_a_file_whose_weights_are_not_those_of_its_architecture_is_named(tmp_path, changes):
    path = tmp_path / "net.safetensors"
    save_network(network(), path, ARCHITECTURE)
    tensors, document = read_tensors(path, "network weights", 3)
    write_tensors(path, tensors, {**document, "architecture": {**ARCHITECTURE.to_dict(), **changes}})
    with pytest.raises(ValueError, match=r"net\.safetensors: does not hold") as caught:
        load_network(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {"features.9": LHC},
        {"features.0": LHC},
        {"features.4": {**LHC, "more": 1}},
        {"features.4": 3},
        [],
        None,
    ],
)
def test_a_file_whose_layers_are_not_those_of_its_topology_is_named(tmp_path, layers):
    path = tmp_path / "net.safetensors"
    save_network(network(sparse=True), path, ARCHITECTURE)
    tensors, document = read_tensors(path, "network weights", 3)
    assert document["layers"] == {"features.4": LHC}
    write_tensors(path, tensors, {**document, "layers": layers})
    with pytest.raises(ValueError, match=r"net\.safetensors: does not hold"):
        load_network(path)


def test_only_live_weights_are_written_and_a_wrong_number_of_them_is_refused(tmp_path, monkeypatch):
    path, model = tmp_path / "net.safetensors", network(sparse=True)
    save_network(model, path, ARCHITECTURE)
    tensors, document = read_tensors(path, "network weights", 3)
    layer, live = model.features[4], tensors["features.4.weight"]
    assert torch.equal(live, layer.weight[layer.mask() != 0].half())
    assert 0 < len(live) < layer.weight.numel()
    for name, wrong in (
        ("features.4.weight", live[:-1]),
        ("features.4.weight", layer.masked_weight()),
        ("features.4.topology", tensors["features.4.topology"].float()),
        ("features.4.topology", tensors["features.4.topology"][:1]),
        ("features.4.topology", ~tensors["features.4.topology"]),
    ):
        write_tensors(path, {**tensors, name: wrong}, document)
        with pytest.raises(ValueError, match=r"does not hold the network it names \(features\.4\."):
            load_network(path)
    write_tensors(path, {n: t for n, t in tensors.items() if n != "features.4.weight"}, document)
    with pytest.raises(ValueError, match=r"features\.4\.weight"):
        load_network(path)
    write_tensors(path, tensors, document)
    monkeypatch.setattr(pretrained, "MAX_FILE_BYTES", 4 * layer.weight.numel() - 1)
    with pytest.raises(ValueError, match=f"would take {4 * layer.weight.numel()} bytes"):
        load_network(path)


SMALL = (8, 8, 16, 16)


@pytest.mark.parametrize(
    ("architecture", "topology"),
    [
        (Architecture("resnet34", SMALL, "cifar", 3, 5, 32), "blocks"),
        (Architecture("resnet50", SMALL, "imagenet", 3, 5, 64), "cross"),
        (Architecture("vgg19", (4, "M", 8, "M", 8), "cifar", 3, 7, 32), "dense"),
    ],
)
def test_every_network_is_saved_with_its_topology_layer_by_layer(tmp_path, architecture, topology):
    model, path = architecture.build().eval(), tmp_path / "net"
    if topology == "blocks":
        small = LHCConfig(in_block=2, out_block=2)
        freeze(
            convert(model, lambda n, c: small if c.out_channels < 16 else LHCConfig(in_block=8, out_block=4))
        )
    elif topology != "dense":
        impose(model, topology)
    save_network(model, path, architecture)
    saved = load_network(path)
    assert saved.architecture == architecture
    ours, theirs = lhc_layers(model), lhc_layers(saved.model)
    assert {n: layer.config for n, layer in ours.items()} == {n: layer.config for n, layer in theirs.items()}
    assert all(torch.equal(layer.block_mask(), theirs[name].block_mask()) for name, layer in ours.items())
    x = torch.randn(2, 3, architecture.image_size, architecture.image_size)
    torch.testing.assert_close(saved.model(x), model(x), rtol=2e-2, atol=2e-2)


def test_weights_of_another_dtype_or_not_finite_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(network(), path, ARCHITECTURE)
    tensors, document = read_tensors(path, "network weights", 3)
    for wrong, said in (
        (torch.zeros(10, 12, dtype=torch.int64), "dtype"),
        (torch.full((10, 12), float("nan")), "finite"),
    ):
        write_tensors(path, {**tensors, "classifier.weight": wrong}, document)
        with pytest.raises(ValueError, match=f"classifier.weight .*{said}"):
            load_network(path)


def test_a_pickle_is_no_file_to_start_from(tmp_path):
    path = tmp_path / "vgg16.pth"
    torch.save(network().state_dict(), path)
    with pytest.raises(ValueError, match=r"vgg16\.pth: .* pickles.*safetensors\.torch\.save_file"):
        load_initial(network(), path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match="net"):
        load_network(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no lhc_triton metadata"):
        load_network(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"lhc_triton": "{"})
    with pytest.raises(ValueError, match="not JSON"):
        load_network(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"lhc_triton": json.dumps({"kind": "network weights"})})
    with pytest.raises(ValueError, match="version None"):
        load_network(path)


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


def resnet34(classes: int):
    return Architecture("resnet34", SMALL, "cifar", 3, classes, 32).build()


def saved_state(path, model, changes=None, drop=()):
    state = {**model.state_dict(), **(changes or {})}
    save_file({name: t.contiguous() for name, t in state.items() if name not in drop}, path)
    return state


def test_weights_to_start_from_leave_another_classifier_at_random(tmp_path):
    given, model = resnet34(100), resnet34(10)
    before = model.fc.weight.clone()
    state = saved_state(tmp_path / "w", given, drop=("bn1.num_batches_tracked",))
    assert load_initial(model, tmp_path / "w") == ("fc.weight", "fc.bias")
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    assert load_initial(resnet34(100), tmp_path / "w") == ()


def test_imagenet_weights_of_a_vgg_start_its_cifar_form_computing_the_same_features(tmp_path):
    """Its convolutions have no bias: each goes into the batch norm after it. The classifier differs."""
    widths = (4, "M", 6)
    given = Architecture("vgg16", widths, "imagenet", 3, 9, 32).build()
    for module in given.features:
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.bias)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    saved_state(tmp_path / "w", given)
    model = Architecture("vgg16", widths, "cifar", 3, 9, 32).build()
    assert load_initial(model, tmp_path / "w") == ("classifier.weight", "classifier.bias")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval().features(x), given.eval().features(x))


def test_weights_to_start_from_that_do_not_fit_give_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        load_initial(resnet34(10), path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: not an intact"):
        load_initial(resnet34(10), path)
    given = Architecture("resnet50", SMALL, "cifar", 3, 10, 32).build()
    for changes, drop, said in (
        (
            {"conv1.weight": torch.zeros(8, 3, 7, 7)},
            (),
            r"conv1.weight is \[8, 3, 7, 7\], not \[8, 3, 3, 3\]",
        ),
        ({"conv1.weight": torch.full((8, 3, 3, 3), torch.nan)}, (), r"conv1.weight holds values"),
        ({"bn1.num_batches_tracked": torch.zeros(())}, (), r"num_batches_tracked has dtype torch.float32"),
        ({"c9.weight": torch.zeros(1), "c9.bias": torch.zeros(1)}, (), r"not know c9\.bias and 1 more"),
        ({}, ("layer4.2.bn3.bias",), r"lacks layer4\.2\.bn3\.bias"),
    ):
        saved_state(path, given, changes, drop)
        with pytest.raises(ValueError, match=f"weights are not this network's .*{said}"):
            load_initial(Architecture("resnet50", SMALL, "cifar", 3, 10, 32).build(), path)


def test_an_unknown_pretrained_network_is_refused():
    with pytest.raises(ValueError, match="'huge' is not one of lhc, dense, cifar10-lhc, cifar10-dense"):
        load_pretrained("huge")


def test_the_pretrained_pair_keeps_its_promise():
    """By its notes, whose accuracies are those of all 10,000 test images."""
    notes = {kind: load_network(pretrained_path(kind)).training for kind in ("dense", "lhc")}
    assert notes["lhc"]["test_accuracy"] >= notes["dense"]["test_accuracy"] - 0.01
    assert notes["lhc"]["epochs"] == notes["dense"]["epochs"]
    assert notes["lhc"]["command"].startswith("lhc-triton train --preset shipped")
    found = summary(load_pretrained("lhc"), (1, 1, 28, 28))
    converted = [row for row in found.rows if row.kind == "lhc"]
    assert len(converted) == 5
    assert sum(row.weights for row in converted) >= 8 * sum(row.live_weights for row in converted)
    assert sum(row.macs for row in converted) >= 4 * sum(row.live_macs for row in converted)
    assert not lhc_layers(load_pretrained("dense"))


def test_the_pair_for_cifar10_keeps_the_papers_promise_but_for_its_length_and_width():
    """By its notes, whose accuracies are those of all 10,000 test images (JPEG copies)."""
    notes = {kind: load_network(pretrained_path(f"cifar10-{kind}")).training for kind in ("dense", "lhc")}
    assert notes["lhc"]["test_accuracy"] >= notes["dense"]["test_accuracy"] - 0.01
    for note in notes.values():
        assert note["command"].startswith("lhc-triton train --preset modern --set data_folder=FOLDER")
    model = load_pretrained("cifar10-lhc")
    found = summary(model, (1, 3, 32, 32)).converted
    assert found.weights >= 9.9 * found.live_weights
    assert found.macs >= 4.9 * found.live_macs
    assert not lhc_layers(load_pretrained("cifar10-dense"))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("kind", ["dense", "lhc"])
def test_a_pretrained_network_reaches_its_noted_accuracy(kind):
    """On every tenth test image, so up to the error of a sample of 1,000."""
    test = open_data("fashion-mnist").test
    ((images, labels),) = test.batches([torch.arange(0, len(test), 10)])
    with torch.no_grad():
        found = float((load_pretrained(kind)(images).argmax(1) == labels).float().mean())
    assert abs(found - load_network(pretrained_path(kind)).training["test_accuracy"]) < 0.025
