"""Training somebody's own network: stages, resume, files, and what is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_training_distributed import torchrun
from tiny_runs import CONFIG, assert_same_run, lines_of, one_thread, tiny_data
from torch import nn
from zoo.mine import stripes

import lhc_triton as lhc
from lhc_triton.models.pretrained import load_network
from lhc_triton.sources import open_network
from lhc_triton.training import read_config, train

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


# An object in place of a factory's name.


def run(folder, model, config=CONFIG, **options):
    return train(config, folder, progress=False, data=tiny_data(), model=model, **options)


def test_a_given_model_is_trained_from_its_weights_and_left_as_it_is(tmp_path):
    model = stripes()
    before = copy.deepcopy(model.state_dict())
    result = run(tmp_path, model)
    assert result.network == "Sequential, given to train()"
    assert result.command is None
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    found = load_network(tmp_path / "lhc.safetensors", stripes)
    live = sum(float(layer.live_weights()) for layer in lhc.lhc_layers(found.model).values())
    assert live / sum(m.weight.numel() for m in lhc.lhc_layers(found.model).values()) == pytest.approx(
        result.density
    )


def test_other_first_weights_make_another_run(tmp_path):
    for number in range(2):
        torch.manual_seed(number)
        run(tmp_path / str(number), stripes(), replace(CONFIG, dense_twin="none"))
    assert lines_of(tmp_path / "0") != lines_of(tmp_path / "1")


def test_a_killed_run_of_a_given_model_goes_on_to_the_same_bits_whatever_weights_it_is_given(tmp_path):
    """A script that builds its network anew has other random weights: the folder keeps those of the start."""

    def stop(row):
        if row.stage == "dense" and row.epoch == 1:
            raise Stop

    with one_thread():
        model = stripes()
        run(tmp_path / "whole", model)
        with pytest.raises(Stop):
            run(tmp_path / "killed", model, on_epoch=stop)
        run(tmp_path / "killed", stripes())
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_of_a_given_model_is_resumed_with_its_structure_only(tmp_path):
    def stop(row):
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path, stripes(), on_epoch=stop)
    given = "factory 'Sequential, given to train\\(\\)'"
    with pytest.raises(ValueError, match=f"is of another run \\({given}, now None\\)") as none:
        train(CONFIG, tmp_path, progress=False, data=tiny_data())
    with pytest.raises(ValueError, match="the network of this run is Sequential, given to train") as noted:
        train(read_config(tmp_path / "config.toml"), tmp_path, progress=False, data=tiny_data())
    with pytest.raises(ValueError, match=f"is of another run \\({given}, now 'zoo.mine:stripes'\\)") as named:
        train(OWN, tmp_path, progress=False, data=tiny_data())
    other = stripes()
    other[2] = nn.ReLU()  # the same tensors
    with pytest.raises(ValueError, match=r"is of another run \(model 'Sequential of [0-9,]+ values") as ours:
        run(tmp_path, other)
    for caught in (none, noted, named, ours):
        assert "\n" not in str(caught.value)
    run(tmp_path, stripes(), read_config(tmp_path / "config.toml"))


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        (stripes, CONFIG, "model is a function, not a torch.nn.Module"),
        (stripes(), OWN, "the setting factory is 'zoo.mine:stripes', and a model is given: choose one"),
        (lhc.convert(stripes(), lhc.LHCConfig()), CONFIG, "has LHC layers already; give the dense network"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 3)),
            CONFIG,
            r"gives \(2, 3\) for 2 images of 10 classes",
        ),
        (nn.Linear(3, 10), CONFIG, r"Linear does not run on an input of shape \(2, 1, 28, 28\)"),
    ],
    ids=["function", "two networks", "converted", "classes", "images"],
)
def test_a_model_that_will_not_do_is_refused_before_anything_is_trained(tmp_path, model, config, said):
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        run(tmp_path / "run", model, config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


TOGETHER = """
sys.path.insert(0, str(Path(paths[1]).parent))
from zoo.mine import stripes
torch.manual_seed(int(os.environ["RANK"]))  # the first process's weights are the run's
rank, first = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
def on_epoch(row):
    if rank == "1" and first and (row.stage, row.epoch) == ("coarse", 1):
        os.kill(os.getpid(), signal.SIGKILL)
config = dataclasses.replace(CONFIG, dense_twin="none")
train(config, out, progress=False, data=tiny_data(), on_epoch=on_epoch, model=stripes())
"""


def test_two_processes_train_a_given_model_as_one_does_over_a_kill(tmp_path):
    done = torchrun(TOGETHER, tmp_path, str(tmp_path / "run"), "", restarts=1)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    with one_thread():
        run(tmp_path / "alone", stripes(), replace(CONFIG, dense_twin="none"))
    ours, theirs = (
        torch.tensor([[float(x) for x in line.split(",")[2:4]] for line in lines_of(tmp_path / name)[1:]])
        for name in ("run", "alone")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "run" / "layers.csv").read_text() == (tmp_path / "alone" / "layers.csv").read_text()
