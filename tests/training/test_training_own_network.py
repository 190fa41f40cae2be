"""Training somebody's own network: stages, resume, files, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_runs import CONFIG, assert_same_run, one_thread, tiny_data

import lhc_triton as lhc
from lhc_triton.models.pretrained import load_network
from lhc_triton.sources import open_network
from lhc_triton.training import train

OWN = replace(CONFIG, factory="zoo.mine:stripes")


class Stop(Exception):
    pass


def test_an_own_network_is_trained_written_and_read_again(tmp_path):
    result = train(OWN, tmp_path, progress=False, data=tiny_data())
    assert result.network == "zoo.mine:stripes"
    assert json.loads((tmp_path / "result.json").read_text())["network"] == "zoo.mine:stripes"
    found = open_network("zoo.mine:stripes", tmp_path / "lhc.safetensors", "4x1x28x28")
    layers = lhc.lhc_layers(found.model)
    assert layers
    assert all(layer.frozen for layer in layers.values())
    live = sum(float(layer.live_weights()) for layer in layers.values())
    assert live / sum(layer.weight.numel() for layer in layers.values()) == pytest.approx(result.density)
    fast = lhc.accelerate(found.model, found.inputs, tune="off")
    torch.testing.assert_close(fast(*found.inputs), found.model(*found.inputs), rtol=1e-4, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    def stop(row):
        if row.stage == "coarse" and row.epoch == 1:
            raise Stop

    with one_thread():
        train(OWN, tmp_path / "whole", progress=False, data=tiny_data())
        with pytest.raises(Stop):
            train(OWN, tmp_path / "killed", progress=False, data=tiny_data(), on_epoch=stop)
        train(OWN, tmp_path / "killed", progress=False, data=tiny_data())
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_file_of_an_own_network_needs_what_makes_it(tmp_path):
    train(OWN, tmp_path, progress=False, data=tiny_data())
    with pytest.raises(ValueError, match=r"zoo\.mine:stripes is not this package's: give package"):
        load_network(tmp_path / "lhc.safetensors")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("zoo.mine", "factory 'zoo.mine' is not of the form package.module:factory"),
        ("zoo.mine:make", r"Mine does not run on an input of shape \(2, 1, 28, 28\)"),
        ("zoo.mine:grey", r"zoo.mine:grey gives \(2, 3\) for 2 images of 10 classes, not \(2, 10\)"),
        ("zoo.mine:raises", "zoo.mine:raises raised RuntimeError"),
    ],
)
def test_a_network_that_will_not_do_is_refused_before_anything_is_trained(tmp_path, factory, said):
    with pytest.raises(ValueError, match=said):
        train(replace(OWN, factory=factory), tmp_path / "run", progress=False, data=tiny_data())
    assert not (tmp_path / "run").exists()
