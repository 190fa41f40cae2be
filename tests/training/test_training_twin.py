"""Networks that start from the trained weights of their dense twin: pruned ones, and learned ones."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CONFIG, assert_same_run, lines_of, one_thread, tiny_data

from lhc_triton.conversion import lhc_layers
from lhc_triton.handcrafted import impose
from lhc_triton.models import load_network
from lhc_triton.pruning import prune
from lhc_triton.topology import LHCConfig
from lhc_triton.training import TrainConfig, epochs, train
from lhc_triton.training.data.fashion import FORMAT
from lhc_triton.training.networks import apply_topology, build_network, check_topology, prune_network
from lhc_triton.training.stage import train_epoch

PRUNED = dataclasses.replace(CONFIG, topology="pruned")
EXAMPLE = torch.zeros(1, 1, 28, 28)


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The folder of a run that trained a dense twin."""
    folder = tmp_path_factory.mktemp("twin")
    train(CONFIG, folder, progress=False, data=tiny_data())
    return folder


def trained(folder):
    """The state of the best dense network of a run."""
    (file,) = folder.glob("dense_best-*.safetensors")
    return {name.removeprefix("model/"): tensor for name, tensor in load_file(file).items()}


def first_state(config, folder, monkeypatch, stage):
    """The network's state before the first epoch of a stage, and the run's result."""
    states = []

    def remember(trainee, images, config, plan, *others):
        if plan.stage == stage and not states:
            states.append({name: tensor.clone() for name, tensor in trainee.model.state_dict().items()})
        return train_epoch(trainee, images, config, plan, *others)

    monkeypatch.setattr(epochs, "train_epoch", remember)
    result = train(config, folder, progress=False, data=tiny_data())
    return states[0], result


@pytest.mark.parametrize("settings", [{}, {"penalty": "macs"}, {"mac_budget": 0.2}])
def test_pruning_keeps_the_best_blocks_of_the_twin_and_trains_them_on(settings, twin, tmp_path, monkeypatch):
    config = dataclasses.replace(PRUNED, dense_twin=str(twin), **settings)
    start, result = first_state(config, tmp_path, monkeypatch, "fine")
    expected = build_network(config, tiny_data().format)
    expected.load_state_dict(trained(twin))
    impose(expected, "standard", LHCConfig(in_block=8, out_block=8))
    prune(expected, EXAMPLE, budget=0.3, objective=settings.get("penalty", "weights"))
    if "mac_budget" in settings:
        prune(expected, EXAMPLE, budget=0.2, objective="macs")
    for name, tensor in expected.state_dict().items():
        assert name.endswith("effects") or torch.equal(start[name], tensor), name
    found = {
        name: layer.topology for name, layer in lhc_layers(load_network(result.files["lhc"]).model).items()
    }
    assert all(torch.equal(start[f"{name}.topology"], topology) for name, topology in found.items())
    assert not torch.equal(
        start["classifier.weight"], load_network(result.files["lhc"]).model.classifier.weight
    )
    assert result.epochs == {"dense": 0, "coarse": 0, "fine": 2}
    assert result.coarse_epoch is None
    assert (result.mac_density if settings else result.density) <= 0.3


def test_a_pruned_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    class StopError(Exception):
        pass

    def stop(row):
        if (row.stage, row.epoch) in (("dense", 4), ("fine", 0)):
            raise StopError

    train(PRUNED, tmp_path / "whole", progress=False, data=tiny_data())
    for _ in range(2):
        with pytest.raises(StopError):
            train(PRUNED, tmp_path / "stopped", progress=False, data=tiny_data(), on_epoch=stop)
    train(PRUNED, tmp_path / "stopped", progress=False, data=tiny_data())
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_learning_from_the_twin_starts_at_its_weights_with_their_larger_half(twin, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, start="twin", dense_twin=str(twin))
    start, result = first_state(config, tmp_path, monkeypatch, "coarse")
    for name, tensor in trained(twin).items():
        assert torch.equal(start[name], tensor), name
    effects = start["features.3.effects"]
    norms = start["features.3.weight"].view(2, 8, 1, 8, 3, 3).square().mean((1, 3))
    assert effects[norms > norms.median()].min() > 0 > effects[norms < norms.median()].max()
    assert (result.coarse_epoch, result.epochs["dense"]) != (None, 5)


def coarse_masks(folder):
    """The topology that the coarse stage chose, by layer."""
    (file,) = folder.glob("coarse_best-*.safetensors")
    state = load_file(file)
    return {n.removeprefix("model/"): t for n, t in state.items() if n.endswith(".topology")}


@pytest.mark.parametrize("settings", [{}, {"penalty": "macs"}, {"mac_budget": 0.2}])
def test_what_learning_leaves_over_its_budgets_is_trimmed_before_the_fine_stage(
    settings, tmp_path, monkeypatch
):
    slow = dataclasses.replace(CONFIG, effect_lr=1e-6, trim=True, dense_twin="none", **settings)
    with pytest.warns(UserWarning, match="target"):  # that the search missed it, all the same
        start, result = first_state(slow, tmp_path, monkeypatch, "fine")
    assert result.steered_density <= 0.3
    assert result.mac_density <= settings.get("mac_budget", 1)
    assert result.density_reached or "mac_budget" in settings  # which may ask for more
    chosen = coarse_masks(tmp_path)
    assert chosen
    for name, mask in chosen.items():
        assert not (start[name] & ~mask).any()  # nothing comes back
    assert any((mask & ~start[name]).any() for name, mask in chosen.items())
    for name, layer in lhc_layers(load_network(result.files["lhc"]).model).items():
        assert torch.equal(layer.topology, start[f"{name}.topology"])


def test_a_topology_within_its_budgets_is_not_trimmed(tmp_path, monkeypatch):
    wide = dataclasses.replace(CONFIG, density=1.0, trim=True, dense_twin="none")
    start, _ = first_state(wide, tmp_path, monkeypatch, "fine")
    assert all(torch.equal(start[name], mask) for name, mask in coarse_masks(tmp_path).items())


def test_what_cannot_come_down_to_a_budget_stays_over_it_with_a_warning(tmp_path, monkeypatch):
    low = dataclasses.replace(CONFIG, mac_budget=0.01, trim=True, dense_twin="none")
    with pytest.warns(UserWarning, match=r"not trimmed to its budget of macs: budget=0.01 cannot be reached"):
        _, result = first_state(low, tmp_path, monkeypatch, "fine")
    assert result.density <= 0.3


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"density": 0.01}, "0.01 of the weights"), ({"mac_budget": 0.01}, "0.01 of the macs")],
)
@pytest.mark.parametrize("given", [False, True], ids=["named", "given"])
def test_a_pruned_run_whose_blocks_are_too_large_is_refused_before_its_twin_is_trained(
    settings, said, given, tmp_path
):
    config = dataclasses.replace(PRUNED, dense_twin="train", **settings)
    model = build_network(config, FORMAT) if given else None
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"topology pruned cannot come down to {said}: .* smaller blocks"):
        train(config, tmp_path / "run", progress=False, data=tiny_data(), model=model)
    assert not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("in_block", [8, 6], ids=["whole", "a smaller last block"])
@pytest.mark.parametrize("objective", ["weights", "macs"])
def test_what_is_refused_beforehand_cannot_be_pruned_and_the_rest_is_not(in_block, objective):
    config = dataclasses.replace(
        PRUNED, in_block=in_block, out_block=8, dense_twin="train", penalty=objective
    )
    torch.manual_seed(in_block)
    for density in (0.02, 0.06, 0.1, 0.12, 0.2):
        config = dataclasses.replace(config, density=density)
        model = apply_topology(build_network(config, FORMAT), config)
        try:
            prune_network(model, EXAMPLE, config)
            possible = True
        except ValueError:
            possible = False
        try:
            check_topology(config, FORMAT)
            refused = False
        except ValueError:
            refused = True
        assert not (possible and refused)
        if in_block == 8:
            assert possible is not refused


def test_where_the_least_hangs_on_the_weights_a_pruned_run_is_not_refused_beforehand():
    check_topology(dataclasses.replace(PRUNED, density=0.01, penalty="latency"), FORMAT)


def test_a_run_without_a_twin_may_take_one_over_later(twin, tmp_path):
    alone = dataclasses.replace(CONFIG, density=0.5, dense_twin="none")
    before = train(alone, tmp_path, progress=False, data=tiny_data())
    lines = lines_of(tmp_path)
    config = dataclasses.replace(alone, dense_twin=str(twin))
    after = train(config, tmp_path, progress=False, data=tiny_data())
    assert lines_of(tmp_path) == lines
    assert (before.dense_accuracy, after.lhc_accuracy) == (None, before.lhc_accuracy)
    assert after.dense_accuracy == json.loads((twin / "result.json").read_text())["dense_accuracy"]
    assert torch.equal(
        load_network(after.files["dense"]).model.classifier.weight,
        load_network(twin / "dense.safetensors").model.classifier.weight,
    )


def test_a_run_from_the_twin_is_another_run(twin, tmp_path):
    config = dataclasses.replace(CONFIG, dense_twin=str(twin))
    train(config, tmp_path, progress=False, data=tiny_data())
    lines = lines_of(tmp_path)
    with pytest.raises(ValueError, match=r"another run \(start 'random', now 'twin'\)"):
        train(dataclasses.replace(config, start="twin"), tmp_path, progress=False, data=tiny_data())
    assert lines_of(tmp_path) == lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "pruned", "dense_twin": "none"}, "topology pruned needs the weights of a dense twin"),
        ({"start": "twin", "dense_twin": "none"}, "start twin needs the weights of a dense twin"),
        ({"topology": "pruned", "density": None}, "topology pruned needs a density"),
        ({"topology": "pruned", "mac_share": 0.5}, "mac_share 0.5 needs a learned topology"),
        ({"topology": "pruned", "gradual": True}, "gradual True needs a learned topology"),
        ({"topology": "standard", "mac_budget": 0.2}, "mac_budget 0.2 needs a learned topology"),
        ({"trim": True, "penalty": "latency"}, "trim keeps budgets of weights or macs, penalty is latency"),
        ({"start": "elsewhere"}, "start 'elsewhere' is not one of random, twin"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
