"""The steps of an epoch: parts of a step, smoothed labels, dropout, averaged weights, TensorBoard."""

import csv
import dataclasses
import json
import sys

import pytest
import torch
from tiny_runs import CONFIG, one_thread, tiny_data
from torch import nn

from lhc_triton.conversion import convert
from lhc_triton.models import small_vgg
from lhc_triton.topology import LHCConfig
from lhc_triton.training import ImageSet, train
from lhc_triton.training.averaging import WeightAverage
from lhc_triton.training.distributed import World, joined
from lhc_triton.training.recipe import make_optimiser
from lhc_triton.training.stage import EpochPlan, Trainee, accuracy, batch_shares, train_epoch


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def plain_network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * 7 * 7, 10)
    )


def trained(model: nn.Module, **changes) -> float:
    """Train for an epoch and return its mean loss."""
    config = dataclasses.replace(CONFIG, **changes)
    trainee = Trainee(model, make_optimiser(model, config))
    with joined("cpu") as world:
        plan = EpochPlan("dense", 1, "fp32")
        return train_epoch(trainee, tiny_data().train, config, plan, world, lambda loss: None).task_loss


def test_a_step_in_parts_is_the_whole_step_where_no_statistics_are_taken():
    whole, parts = plain_network(), plain_network()
    losses = trained(whole), trained(parts, accumulate=4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    other = plain_network()
    trained(other, batch_size=10)
    assert not torch.allclose(other[0].weight, whole[0].weight, rtol=1e-4, atol=1e-5)


def test_effects_alone_move_by_their_own_multiple_of_the_rate():
    def moves(factor: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        model = convert(small_vgg((4, 8, 8)), LHCConfig(in_block=4, out_block=4))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trained(model, batch_size=140, effect_lr=factor)  # all images: a single step
        return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}

    usual, faster = moves(1.0), moves(3.0)
    assert sum(name.endswith("effects") for name in usual) == 2
    for name, move in usual.items():
        factor = 3 if name.endswith("effects") else 1
        torch.testing.assert_close(faster[name], factor * move, rtol=1e-4, atol=1e-6)
        assert move.abs().max() > 1e-5


@pytest.mark.parametrize("averaged", [True, False])
def test_batch_norm_is_averaged_once_a_network_and_in_the_same_order_on_all_processes(monkeypatch, averaged):
    seen: list[nn.Module] = []
    monkeypatch.setattr(World, "average_batch_norm", lambda self, model: seen.append(model))
    config = dataclasses.replace(CONFIG, sync_batchnorm=False, batch_size=70)
    for _ in range(8):  # an order by address would be right once in 256 times
        seen.clear()
        model = plain_network()
        average = WeightAverage(model, 0.9) if averaged else None
        trainee = Trainee(model, make_optimiser(model, config), average=average)
        with joined("cpu") as world:
            plan = EpochPlan("dense", 1, "fp32")
            train_epoch(trainee, tiny_data().train, config, plan, world, lambda loss: None)
        assert len(seen) == 1 + averaged
        assert seen[0] is model
        assert seen[-1] is trainee.judged


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_smoothed_labels(smoothing):
    model, data = plain_network(), tiny_data().train
    loss = trained(
        model, lr=0.0, weight_decay=0.0, batch_size=140, augmentation="none", label_smoothing=smoothing
    )
    pixels, labels = next(data.batches([torch.arange(140)]))
    logs = model(pixels).detach().double().log_softmax(1)
    targets = torch.full_like(logs, smoothing / 10)
    targets[torch.arange(140), labels] += 1 - smoothing
    assert loss == pytest.approx(float(-(logs * targets).sum(1).mean()), rel=1e-5)


def test_dropout_depends_on_the_epoch_and_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    losses = []
    for seed in (11, 12):
        model = plain_network(0.5)
        torch.manual_seed(seed)
        losses.append(trained(model))
        assert torch.equal(torch.rand(3), expected) == (seed == 11)
    assert losses[0] == losses[1] != trained(plain_network())


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_shares_of_a_step_cover_its_images_whatever_the_number_of_processes(size, accumulate):
    config = dataclasses.replace(CONFIG, batch_size=12, accumulate=accumulate)
    order = torch.randperm(50)
    shares = [batch_shares(order, config, World(r, size, torch.device("cpu"))) for r in range(size)]
    assert {len(share) for share in shares} == {4 * accumulate}
    parts = [torch.cat(part) for part in zip(*shares, strict=True)]
    assert torch.equal(torch.cat(parts), order[:48])
    assert {len(part) for part in parts} == {12 // accumulate}


def test_the_average_follows_the_weights_by_its_formula_and_has_the_topology_of_the_network():
    torch.manual_seed(0)
    model = convert(small_vgg((8, 16, 16)), LHCConfig(in_block=8, out_block=8))
    average = WeightAverage(model, 0.5)
    names = dict(model.named_parameters())
    expected = {n: p.detach().double().clone() for n, p in names.items()}
    for step in range(8):
        with torch.no_grad():
            for parameter in names.values():
                parameter.copy_(torch.randn_like(parameter))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {n: decay * e + (1 - decay) * names[n].detach().double() for n, e in expected.items()}
    for name, parameter in average.model.named_parameters():
        wanted = names[name].double() if name.endswith("effects") else expected[name]
        torch.testing.assert_close(parameter.double(), wanted, rtol=1e-5, atol=1e-6)
    layers = model.features[3], average.model.features[3]
    assert torch.equal(layers[0].block_mask(), layers[1].block_mask())


def test_accuracy_is_the_share_of_right_answers_in_any_batches():
    class Constant(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    with joined("cpu") as world:
        data = tiny_data(1200).train
        found = accuracy(Constant(), data, 28, "fp32", world)
    assert found == float((data.labels == 3).double().mean()) == 0.1


def test_every_image_is_loaded_by_the_workers_asked_for(tmp_path, monkeypatch):
    batches, seen = ImageSet.batches, []

    def counted(self, steps, **options):
        seen.append((len(self), options.get("workers", 0)))
        return batches(self, steps, **options)

    monkeypatch.setattr(ImageSet, "batches", counted)
    train(dataclasses.replace(CONFIG, dense_twin="none", workers=2), tmp_path, False, tiny_data(150))
    assert set(seen) == {(110, 2), (40, 2)}  # training; validation and test
    assert len(seen) == 11


def test_tensorboard_gets_epochs_and_layers_or_says_what_is_missing(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, tensorboard=True, dense_twin="none", in_block=1, out_block=1)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ValueError, match="needs the package tensorboard"):
            train(config, tmp_path / "without", progress=False, data=tiny_data())
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config, tmp_path, progress=False, data=tiny_data())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"coarse/density", "fine/val_accuracy", "coarse layers/features.3/correlation"} <= set(tags)
    assert [event.step for event in events.Scalars("coarse/penalty")] == [0, 1, 2]
    with (tmp_path / "layers.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["stage"] == "coarse"]
    wanted = [json.loads(line["shapes"]) for line in lines if line["layer"] == "features.3"]
    tables = events.Tensors("coarse layers/features.3/shapes/text_summary")
    for shapes, event in zip(wanted, tables, strict=True):
        _, _, *rows = event.tensor_proto.string_val[0].decode().splitlines()
        table = {shape: int(count) for shape, count in (row.strip("| ").split(" | ") for row in rows)}
        others = table.pop("others")
        assert len(table) == 16
        assert table.items() <= shapes.items()
        assert sum(table.values()) + others == sum(shapes.values()) == 8 * 16


def test_a_damaged_log_of_layers_is_named(tmp_path):
    config = dataclasses.replace(CONFIG, dense_twin="none")
    (tmp_path / "layers.csv").write_text("stage,epoch\ncoarse\n")
    with pytest.raises(ValueError, match=r"layers\.csv: a damaged log"):
        train(config, tmp_path, progress=False, data=tiny_data())
