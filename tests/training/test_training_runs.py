"""Whole runs on tiny data: what they leave behind, and that they follow the method and the settings."""

import csv
import dataclasses
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CONFIG, lines_of, one_thread, tiny_data

from lhc_triton.conversion import lhc_layers
from lhc_triton.models import load_network, small_vgg
from lhc_triton.schedule import TopologySchedule
from lhc_triton.training import EpochMetrics, ImageSet, TrainConfig, epochs, train
from lhc_triton.training.data.fashion import FORMAT
from lhc_triton.training.distributed import joined
from lhc_triton.training.networks import apply_topology, build_network
from lhc_triton.training.recipe import make_optimiser
from lhc_triton.training.stage import EpochPlan, Trainee, train_epoch


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped: (folder, result, metrics of its epochs)."""
    folder = tmp_path_factory.mktemp("whole")
    rows: list[EpochMetrics] = []
    result = train(CONFIG, folder, progress=False, data=tiny_data(), on_epoch=rows.append)
    return folder, result, rows


def test_the_result_tells_what_the_files_hold(whole):
    folder, result, rows = whole
    assert json.loads((folder / "result.json").read_text()) == result.to_dict()
    assert TrainConfig.from_toml((folder / "config.toml").read_text()) == CONFIG
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + len(rows) == 11
    saved = load_network(result.files["lhc"])
    model, notes = saved.model, saved.training
    layers = lhc_layers(model)
    live = sum(int(layer.masked_weight().count_nonzero()) for layer in layers.values())
    assert live / sum(layer.weight.numel() for layer in layers.values()) == pytest.approx(result.density)
    assert result.weight_reduction == pytest.approx(1 / result.density)
    assert result.mac_reduction == pytest.approx(1 / result.mac_density)
    assert notes["test_accuracy"] == result.lhc_accuracy
    assert TrainConfig.from_dict(notes["config"]) == CONFIG
    assert not lhc_layers(load_network(result.files["dense"]).model)


def test_stages_follow_the_method(whole):
    _, result, rows = whole
    by_stage = {name: [row for row in rows if row.stage == name] for name in ("dense", "coarse", "fine")}
    assert {name: len(found) for name, found in by_stage.items()} == {"dense": 5, "coarse": 3, "fine": 2}
    assert [row.warming_up for row in by_stage["coarse"]] == [True, False, False]
    assert [row.ramp for row in by_stage["coarse"]] == [0.0, 4.0, 4.0]
    assert by_stage["coarse"][0].penalty == 0
    assert by_stage["coarse"][2].density < by_stage["coarse"][0].density
    # The twins start from the same weights, on the same batches; the first epoch of the warm-up is dense.
    assert by_stage["coarse"][0].task_loss == pytest.approx(by_stage["dense"][0].task_loss, rel=0.05)
    chosen = by_stage["coarse"][result.coarse_epoch]
    assert not chosen.warming_up
    assert {row.density for row in by_stage["fine"]} == {chosen.density}
    assert result.lhc_val_accuracy == max(row.val_accuracy for row in by_stage["fine"])


def test_layers_are_logged_as_an_independent_count_finds_them(tmp_path):
    masks: list[dict[str, torch.Tensor]] = []

    def remember(row: EpochMetrics) -> None:
        if row.stage != "dense":
            state = load_file(tmp_path / "last.safetensors")
            masks.append({n: t for n, t in state.items() if n.endswith(".topology")})

    train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=remember)
    with (tmp_path / "layers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(x["stage"], x["epoch"], x["layer"]) for x in lines] == [
        (stage, str(epoch), layer)
        for stage, epochs in (("coarse", 3), ("fine", 2))
        for epoch in range(epochs)
        for layer in ("features.3", "features.7")
    ]
    weights = {"features.3": 64 * 28 * 28, "features.7": 64 * 14 * 14}  # of a block's tap, times the pixels
    for index, line in enumerate(lines):
        now, name = masks[index // 2], f"model/{line['layer']}.topology"
        live = {layer: int(now[f"model/{layer}.topology"].sum()) * each for layer, each in weights.items()}
        assert float(line["density"]) == pytest.approx(float(now[name].float().mean()))
        assert float(line["mac_share"]) == pytest.approx(live[line["layer"]] / sum(live.values()))
        assert int(line["patterns"]) == len({tuple(group.flatten().tolist()) for group in now[name]})
        assert sum(json.loads(line["shapes"]).values()) == now[name].shape[0] * now[name].shape[1]
        if index >= 2:
            pair = torch.stack([masks[index // 2 - 1][name].flatten(), now[name].flatten()]).double()
            assert float(line["correlation"]) == pytest.approx(float(torch.corrcoef(pair)[0, 1]))


def test_training_learns_to_tell_the_classes_apart(tmp_path):
    data = tiny_data(440)
    config = dataclasses.replace(CONFIG, augmentation="none", coarse_epochs=6, fine_epochs=3)
    result = train(config, tmp_path, progress=False, data=data)
    assert result.dense_accuracy > 0.9
    assert result.lhc_accuracy > 0.7
    assert abs(result.density - 0.3) < 0.05


def test_a_dense_network_can_be_taken_from_another_run_or_left_out(whole, tmp_path):
    folder, result, _ = whole
    taken = dataclasses.replace(CONFIG, density=0.5, parts=8, dense_twin=str(folder))
    other = train(taken, tmp_path / "taken", progress=False, data=tiny_data())
    assert other.dense_accuracy == result.dense_accuracy
    assert (other.dense_epoch, other.epochs["dense"]) == (result.dense_epoch, 0)
    dense = [load_file(f / "dense.safetensors") for f in (folder, tmp_path / "taken")]
    assert all(torch.equal(dense[0][name], dense[1][name]) for name in dense[0])
    assert str(folder) not in other.command
    alone = train(
        dataclasses.replace(CONFIG, dense_twin="none"), tmp_path / "alone", progress=False, data=tiny_data()
    )
    assert (alone.dense_accuracy, alone.dense_epoch) == (None, None)
    for without in ("taken", "alone"):
        again = dataclasses.replace(CONFIG, dense_twin=str(tmp_path / without))
        with pytest.raises(ValueError, match="has no dense network of its own"):
            train(again, tmp_path / "new", progress=False, data=tiny_data())
    assert alone.lhc_accuracy == result.lhc_accuracy
    assert not (tmp_path / "alone" / "dense.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"seed": 1}, "another run \\(seed 0, now 1\\)"), ({"fine_epochs": 3}, "another run \\(fine_epochs")],
)
def test_a_dense_network_of_another_recipe_is_no_twin(whole, tmp_path, changes, reason):
    config = dataclasses.replace(CONFIG, dense_twin=str(whole[0]), **changes)
    with pytest.raises(ValueError, match=reason):
        train(config, tmp_path, progress=False, data=tiny_data())


def test_a_dense_network_that_is_not_trained_to_the_end_is_no_twin(tmp_path):
    def stop(row: EpochMetrics) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tmp_path / "begun", progress=False, data=tiny_data(), on_epoch=stop)
    config = dataclasses.replace(CONFIG, dense_twin=str(tmp_path / "begun"))
    with pytest.raises(ValueError, match="not trained to the end"):
        train(config, tmp_path / "new", progress=False, data=tiny_data())
    config = dataclasses.replace(CONFIG, dense_twin=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        train(config, tmp_path / "new", progress=False, data=tiny_data())


def test_a_twin_keeps_its_own_notes_and_needs_the_same_precision(whole, tmp_path):
    taken = dataclasses.replace(CONFIG, density=0.5, dense_twin=str(whole[0]))
    train(taken, tmp_path / "taken", progress=False, data=tiny_data())
    notes, own = (load_network(f / "dense.safetensors").training for f in (tmp_path / "taken", whole[0]))
    assert notes == own
    assert notes["config"]["density"] == CONFIG.density
    other = dataclasses.replace(taken, precision="bf16")
    with pytest.raises(ValueError, match="trained in fp32, this run is to be in bf16; set precision=fp32"):
        train(other, tmp_path / "other", progress=False, data=tiny_data())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"topology": "hetconv", "parts": 3, "density": None}, "3"),
        ({"block_rule": "width", "in_block": 256}, "256"),
    ],
)
def test_a_topology_that_does_not_suit_is_refused_before_anything_is_trained(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        train(dataclasses.replace(CONFIG, **changes), tmp_path / "run", progress=False, data=tiny_data())
    assert not (tmp_path / "run").exists()


def test_a_topology_can_be_replaced_between_the_stages(tmp_path):
    calls = []

    def keep_the_centre(model):
        calls.append(model.training)
        for layer in lhc_layers(model).values():
            centre = torch.zeros(layer.topology.shape)
            centre[:, :, 1, 1] = 1
            layer.set_topology(centre)

    def stop(row: EpochMetrics) -> None:
        if (row.stage, row.epoch) == ("fine", 0):
            raise KeyboardInterrupt

    config = dataclasses.replace(CONFIG, dense_twin="none")
    arguments = {"progress": False, "data": tiny_data(), "between_stages": keep_the_centre}
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, on_epoch=stop, **arguments)
    with pytest.raises(ValueError, match=r"another run \(between stages .*keep_the_centre"):
        train(config, tmp_path, progress=False, data=tiny_data())
    result = train(config, tmp_path, **arguments)
    assert len(calls) == 1
    assert result.density == pytest.approx(1 / 9)
    network = load_network(tmp_path / "lhc.safetensors").model
    assert all(
        layer.block_mask().sum() == layer.block_mask()[..., 1, 1].sum() > 0
        for layer in lhc_layers(network).values()
    )


@pytest.mark.parametrize("settings", [{}, {"topology": "pruned", "dense_twin": "train"}], ids=str)
def test_filters_share_patterns_in_the_fine_stage(tmp_path, settings):
    config = dataclasses.replace(CONFIG, **{"dense_twin": "none", "share": 16, **settings})
    rows: list[EpochMetrics] = []

    def stop(row: EpochMetrics) -> None:
        rows.append(row)
        if (row.stage, row.epoch) == ("fine", 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=False, data=tiny_data(), on_epoch=stop)
    result = train(config, tmp_path, progress=False, data=tiny_data())
    assert result.density <= config.density * 1.05
    layers = lhc_layers(load_network(tmp_path / "lhc.safetensors").model).values()
    assert {layer.out_channels for layer in layers} == {16}
    for layer in layers:
        assert layer.config.out_block == 8
        assert len(layer.topology.flatten(1).unique(dim=0)) == 1
    assert result.settings["share"] == 16


def test_a_topology_made_by_hand_is_trained_by_the_same_recipe(whole, tmp_path):
    rows: list[EpochMetrics] = []
    config = dataclasses.replace(CONFIG, topology="stripe", dense_twin="none", density=None)
    result = train(config, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert [row.lr for row in rows] == [row.lr for row in whole[2] if row.stage != "dense"]
    assert {(row.density, row.penalty, row.mask_correlation) for row in rows} == {(result.density, 0.0, 1.0)}
    assert not any(row.warming_up for row in rows)
    assert result.density < 1
    assert result.density_reached


@pytest.mark.filterwarnings("ignore:the effects of:UserWarning")  # nothing moves at a learning rate of 0
def test_a_stage_ends_where_the_accuracy_has_stalled(tmp_path):
    rows: list[EpochMetrics] = []
    config = dataclasses.replace(CONFIG, early_stop=1, fine_epochs=20, lr=0.0)  # no gain but by chance
    result = train(config, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    dense = [row.val_accuracy for row in rows if row.stage == "dense"]
    assert len(dense) == result.epochs["dense"] < 23
    assert all(later > earlier for earlier, later in pairwise(dense[:-1]))
    assert dense[-1] <= max(dense[:-1])
    assert train(config, tmp_path, progress=False, data=tiny_data()) == result


def test_effects_that_are_given_no_rate_get_the_schedules(tmp_path):
    open_, given = (dataclasses.replace(CONFIG, effect_lr=rate, dense_twin="none") for rate in (None, 1.0))
    model = build_network(given, FORMAT)
    apply_topology(model, given)
    schedule = TopologySchedule(model, torch.zeros(1, 1, 28, 28), given.warmup, given.warmup)
    rate = schedule.effect_rate(5, math.log(10), given.momentum)  # 100 images to train on, 20 a step
    assert not 0.9 < rate / given.lr < 1.1
    given = dataclasses.replace(given, effect_lr=rate / given.lr)
    for name, config in (
        ("open", open_),
        ("given", given),
        ("usual", dataclasses.replace(given, effect_lr=1.0)),
    ):
        train(config, tmp_path / name, progress=False, data=tiny_data())
    assert lines_of(tmp_path / "open") == lines_of(tmp_path / "given") != lines_of(tmp_path / "usual")


def test_costs_steer_their_own_share_to_the_target(tmp_path):
    rows: list[EpochMetrics] = []
    config = dataclasses.replace(CONFIG, penalty="macs", dense_twin="none")
    result = train(config, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert all(row.steered_density == pytest.approx(row.mac_density) for row in rows)
    assert any(row.steered_density != pytest.approx(row.density, rel=1e-3) for row in rows)
    assert result.steered_density == pytest.approx(result.mac_density)


def test_the_test_images_decide_nothing_and_are_what_is_reported(whole, tmp_path):
    folder, _, _ = whole
    data = tiny_data()
    turned = ImageSet(data.test.images, data.test.labels.roll(7), data.format)
    result = train(CONFIG, tmp_path, progress=False, data=replace(data, test=turned))
    assert lines_of(tmp_path) == lines_of(folder)
    for name, found in (("dense", result.dense_accuracy), ("lhc", result.lhc_accuracy)):
        model = load_network(tmp_path / f"{name}.safetensors").model.eval()
        with torch.no_grad():
            guesses = model(data.format.normalise(turned.images)).argmax(1)
        assert found == float((guesses == turned.labels).double().mean())


def test_the_fine_stage_starts_from_the_best_coarse_epoch_not_from_the_last(tmp_path, monkeypatch):
    told = iter([0.5] * 5 + [0.1, 0.9, 0.2] + [0.3, 0.4])
    monkeypatch.setattr(epochs, "accuracy", lambda *_: next(told))
    config = replace(CONFIG, density=None, fine_lr=0.0)
    result = train(config, tmp_path, progress=False, data=tiny_data())
    assert (result.coarse_epoch, result.fine_epoch) == (1, 1)
    coarse, fine = (load_file(tmp_path / f"{stage}_best-1.safetensors") for stage in ("coarse", "fine"))
    names = [name for name in fine if name.startswith("model/") and name.endswith("weight")]
    assert len(names) > 3
    assert all(torch.equal(fine[name], coarse[name]) for name in names)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give a folder"):
        train(CONFIG, tmp_path / "file", progress=False, data=tiny_data())
    with pytest.raises(OSError, match="file"):
        train(CONFIG, tmp_path / "file" / "below", progress=False, data=tiny_data())


def test_wrong_data_leave_no_checkpoint(tmp_path):
    config = dataclasses.replace(CONFIG, data_folder=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="which has 14"):
        train(dataclasses.replace(CONFIG, validation_images=150), tmp_path, progress=False, data=tiny_data())
    with pytest.raises(ValueError, match="no batch"):
        train(dataclasses.replace(CONFIG, batch_size=101), tmp_path, progress=False, data=tiny_data())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match=device):
        train(dataclasses.replace(CONFIG, device=device), tmp_path, progress=False, data=tiny_data())


def test_a_loss_that_is_not_finite_stops_the_run():
    model = small_vgg((4, 4))
    torch.nn.init.constant_(model.classifier.weight, float("inf"))
    trainee = Trainee(model, make_optimiser(model, CONFIG))
    with joined("cpu") as world, pytest.raises(ValueError, match=r"lower lr 0\.1"):
        train_epoch(
            trainee, tiny_data().train, CONFIG, EpochPlan("dense", 0, "fp32"), world, lambda loss: None
        )


def test_an_aim_that_no_epoch_reaches_takes_the_nearest_density_and_says_so(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, density=0.01)
    result = train(config, tmp_path, data=tiny_data())
    assert not result.density_reached
    said = capsys.readouterr().err
    assert "no epoch came within 0.01 of the density 0.01; took the nearest" in said
    assert "warming up" in said
    assert "fine     2/2" in said


def test_without_a_target_there_is_no_penalty(tmp_path):
    rows: list[EpochMetrics] = []
    config = dataclasses.replace(CONFIG, density=None, shapes="rigid", augmentation="none", precision="bf16")
    result = train(config, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert {(row.penalty, row.ramp) for row in rows} == {(0.0, 0.0)}
    assert result.density_reached
    assert result.precision == "bf16"
