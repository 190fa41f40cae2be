"""Which images judge a network, which epoch a stage goes on from, and what a step adds up."""

import dataclasses

import pytest
import torch
from tiny_runs import CONFIG, lines_of, one_thread, tiny_data
from torch import nn

from lhc_triton.conversion import convert, lhc_layers
from lhc_triton.models import load_network
from lhc_triton.schedule import TopologySchedule
from lhc_triton.topology import LHCConfig
from lhc_triton.training import epochs, train
from lhc_triton.training.averaging import WeightAverage
from lhc_triton.training.distributed import joined
from lhc_triton.training.recipe import make_optimiser
from lhc_triton.training.stage import EpochPlan, Trainee, train_epoch

ALONE = dataclasses.replace(CONFIG, dense_twin="none")


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def test_test_images_are_for_the_test_alone(tmp_path):
    data = tiny_data()
    every = next(iter(data.test.batches([torch.arange(40)], epoch_seed=0, device=torch.device("cpu"))))
    other = dataclasses.replace(data.test, labels=(data.test.labels + 1) % 10)
    result = train(ALONE, tmp_path / "one", progress=False, data=data)
    moved = train(ALONE, tmp_path / "other", progress=False, data=dataclasses.replace(data, test=other))
    assert lines_of(tmp_path / "one") == lines_of(tmp_path / "other")
    with torch.no_grad():
        found = load_network(result.files["lhc"]).model.eval()(every[0]).argmax(1)
    assert result.lhc_accuracy == int((found == data.test.labels).sum()) / 40
    assert moved.lhc_accuracy == int((found == other.labels).sum()) / 40
    assert moved.lhc_accuracy != result.lhc_accuracy


def test_each_stage_hands_on_its_best_epoch_not_its_last(tmp_path, monkeypatch):
    accuracies = iter([0.1, 0.9, 0.2, 0.8, 0.3])
    states = []

    def remember(trainee, *arguments):
        before = {name: tensor.clone() for name, tensor in trainee.model.state_dict().items()}
        losses = train_epoch(trainee, *arguments)
        after = {name: tensor.clone() for name, tensor in trainee.model.state_dict().items()}
        states.append((before, after))
        return losses

    monkeypatch.setattr(epochs, "train_epoch", remember)
    monkeypatch.setattr(epochs, "accuracy", lambda *_, **__: next(accuracies))
    config = dataclasses.replace(ALONE, density=None)
    result = train(config, tmp_path, progress=False, data=tiny_data())
    assert (result.coarse_epoch, result.fine_epoch) == (1, 0)
    start, name = states[3][0], "features.0.weight"
    assert torch.equal(start[name], states[1][1][name])
    assert not torch.equal(start[name], states[2][1][name])
    written = load_network(result.files["lhc"]).model.state_dict()[name]
    assert torch.equal(written.half(), states[3][1][name].half())
    assert not torch.equal(written.half(), states[4][1][name].half())


def step_with_a_penalty(accumulate: int) -> tuple[nn.Module, float]:
    torch.manual_seed(4)
    plain = nn.Sequential(nn.Conv2d(1, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    model = convert(nn.Sequential(*plain, nn.Linear(8 * 25, 10)), LHCConfig(0.1, in_block=4, out_block=4))
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    schedule = TopologySchedule(model, torch.zeros(1, 1, 28, 28), 1, 1, 0)
    schedule.start_epoch(0)
    schedule.end_epoch(task_loss=2.0)
    schedule.start_epoch(1)
    trainee = Trainee(model, make_optimiser(model, config), schedule)
    plan = EpochPlan("coarse", 1, "fp32")
    with joined("cpu") as world:
        losses = train_epoch(trainee, tiny_data(20).train, config, plan, world, lambda loss: None)
    return model, losses.penalty


def test_a_step_in_parts_has_the_penalty_once():
    (whole, penalty), (parts, same) = step_with_a_penalty(1), step_with_a_penalty(2)
    assert penalty == same > 0
    for one, other in zip(lhc_layers(whole).values(), lhc_layers(parts).values(), strict=True):
        assert float(one.effects.grad.abs().max()) > 0
        torch.testing.assert_close(one.effects.grad, other.effects.grad, rtol=1e-4, atol=1e-6)


def test_the_average_is_judged_takes_statistics_too_and_counts_steps_over_epochs(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=9), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 10))
    average = WeightAverage(model, 0.9)
    trainee = Trainee(model, make_optimiser(model, CONFIG), average=average)
    assert trainee.judged is average.model
    expected, steps = model[1].running_mean.double(), []
    update = average.update

    def follow(step):
        nonlocal expected
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[1].running_mean.double()
        steps.append(step)
        update(step)

    monkeypatch.setattr(average, "update", follow)
    with joined("cpu") as world:
        for epoch in range(2):
            plan = EpochPlan("dense", epoch, "fp32")
            train_epoch(trainee, tiny_data(60).train, CONFIG, plan, world, lambda loss: None)
    assert steps == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(average.model[1].running_mean.double(), expected, rtol=1e-4, atol=1e-6)
    assert average.model[1].num_batches_tracked == 6
