"""The coarse stage's schedule, by its formulas."""

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn

from lhc_triton.conversion import convert, freeze, lhc_layers
from lhc_triton.pruning import to_dense
from lhc_triton.schedule import TopologySchedule
from lhc_triton.topology import LHCConfig

EXAMPLE = torch.zeros(2, 3, 8, 8)


def network(density=0.1, shapes="free", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 40, 3, padding=1),
        nn.Dropout(0.5),
        nn.Conv2d(40, 50, 3, stride=2, padding=1),
        nn.Conv2d(50, 30, 1),
    )
    return convert(model, LHCConfig(density, in_block=8, out_block=4, shapes=shapes))


def counts_by_hand(model):
    """Sums over the LHC layers: live weights, weights, live MACs, MACs (for a batch of 2)."""
    pixels = {"2": 2 * 64, "4": 2 * 16, "5": 2 * 16}
    totals = [0, 0, 0, 0]
    for name, layer in lhc_layers(model).items():
        live = int(layer.mask().detach().sum())
        for index, value in enumerate((live, layer.weight.numel())):
            totals[index] += value
            totals[index + 2] += value * pixels[name]
    return totals


def started(model, epoch, first_loss=2.0, **arguments):
    schedule = TopologySchedule(model, EXAMPLE, **arguments)
    schedule.start_epoch(0)
    schedule.end_epoch(task_loss=first_loss)
    schedule.start_epoch(epoch)
    return schedule


def mixtures(model):
    return [layer.masked_filters.clone() for layer in lhc_layers(model).values()]


@pytest.mark.parametrize("shapes", ["free", "rigid"])
@pytest.mark.parametrize("target", [0.05, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("epoch", [1, 7, 20, 33])
def test_penalty_is_scale_times_ramp_times_the_regulariser(shapes, target, epoch):
    model = network(target, shapes)
    schedule = started(model, epoch, first_loss=2.3)
    live, weights, live_macs, macs = counts_by_hand(model)
    regulariser = 0.01 * (live_macs / macs) + 0.99 * abs(target - live / weights)
    scale = 2.3 / (0.01 + 0.99 * max(target, 1 - target))
    ramp = 4 * epoch / 20 if epoch < 20 else 4
    assert schedule.scale == pytest.approx(scale, rel=1e-15)
    assert schedule.ramp == pytest.approx(ramp, rel=1e-15)
    assert schedule.penalty().item() == pytest.approx(scale * ramp * regulariser, rel=1e-6)
    assert schedule.density == live / weights
    assert schedule.mac_density == pytest.approx(live_macs / macs, rel=1e-14)


def test_penalty_counts_the_learned_masks_of_all_filters_not_the_mixture():
    model = network()
    schedule = started(model, 3)
    penalty, density = schedule.penalty().item(), schedule.density
    for layer in lhc_layers(model).values():
        layer.masked_filters.fill_(False)
    assert schedule.penalty().item() == penalty
    assert schedule.density == density


@pytest.mark.parametrize("target", [0.1, 0.9])
def test_penaltys_gradient_drives_the_density_to_the_target(target):
    model = network(target)
    schedule = started(model, 5)
    schedule.penalty().backward()
    live, weights, _, macs = counts_by_hand(model)
    sign = 1 if live / weights > target else -1
    factor = schedule.scale * schedule.ramp
    for name, pixels in (("2", 128), ("4", 32)):
        layer = model.get_submodule(name)
        block = 8 * 4  # a full block's weights per tap
        share = factor * block * (0.01 * pixels / macs + sign * 0.99 / weights)
        near = layer.effects.detach().abs() < 1
        full = slice(0, layer.in_channels // 8)
        expected = torch.where(near, share, 0.1 * share)[:, full]
        torch.testing.assert_close(layer.effects.grad[: layer.out_channels // 4, full], expected[: 50 // 4])


def test_penalty_is_zero_in_epoch_0_and_follows_the_ramp():
    schedule = TopologySchedule(network(), EXAMPLE, penalty_epochs=4)
    schedule.start_epoch(0)
    assert schedule.penalty().item() == 0.0
    assert schedule.penalty().shape == ()
    schedule.end_epoch(task_loss=torch.tensor(1.5))
    ramps = []
    for epoch in range(7):
        schedule.start_epoch(epoch)
        ramps.append(schedule.ramp)
    assert ramps == [0, 1, 2, 3, 4, 4, 4]


def test_penalty_without_a_target_is_zero_and_needs_no_loss():
    schedule = TopologySchedule(network(density=None), EXAMPLE)
    schedule.start_epoch(0)
    schedule.end_epoch()
    schedule.start_epoch(30)
    assert schedule.penalty().item() == 0.0
    assert schedule.scale is None


def test_penalty_of_a_frozen_network_is_zero():
    model = network()
    schedule = started(model, 9)
    freeze(model)
    assert schedule.penalty().item() == 0.0
    assert schedule.density == counts_by_hand(model)[0] / counts_by_hand(model)[1]


def test_penalty_is_float32_and_exact_for_bfloat16_layers_too():
    model = network()
    schedule = started(model, 2)
    exact = schedule.penalty().item()
    for layer in lhc_layers(model).values():
        layer.bfloat16()
    assert schedule.penalty().dtype == torch.float32
    assert schedule.penalty().item() == exact
    schedule.penalty().backward()


def test_training_on_the_penalty_alone_reaches_the_target_density():
    model = network(0.2)
    schedule = started(model, 20)
    effects = [layer.effects for layer in lhc_layers(model).values()]
    optimiser = torch.optim.SGD(effects, lr=0.3)
    reached = []
    for _ in range(120):
        optimiser.zero_grad()
        schedule.penalty().backward()
        optimiser.step()
        reached.append(schedule.density)
    assert min(abs(density - 0.2) for density in reached) < 0.01
    assert abs(reached[-1] - 0.2) < 0.03


def test_mixture_goes_from_all_dense_to_all_masked():
    model = network()
    schedule = TopologySchedule(model, EXAMPLE, warmup_epochs=10)
    schedule.start_epoch(0)
    assert not any(m.any() for m in mixtures(model))
    for epoch in (10, 11, 50):
        schedule.start_epoch(epoch)
        assert all(m.all() for m in mixtures(model))


def test_mixture_masks_each_filter_with_probability_epoch_over_warmup():
    model = network()
    for epoch in (2, 5, 8):
        drawn = []
        for seed in range(60):
            TopologySchedule(model, EXAMPLE, warmup_epochs=10, seed=seed).start_epoch(epoch)
            drawn += mixtures(model)
        used = torch.cat(drawn).double()
        assert used.mean().item() == pytest.approx(epoch / 10, abs=5 * math.sqrt(0.25 / len(used)))


def test_mixture_is_redrawn_each_epoch_and_differs_between_layers_and_seeds():
    model = network()
    schedule = TopologySchedule(model, EXAMPLE)
    schedule.start_epoch(10)
    first = mixtures(model)
    schedule.start_epoch(11)
    assert not all(map(torch.equal, first, mixtures(model)))
    assert not torch.equal(first[0][:30], first[2][:30])
    TopologySchedule(model, EXAMPLE, seed=1).start_epoch(10)
    assert not all(map(torch.equal, first, mixtures(model)))


def test_mixture_depends_on_seed_epoch_and_layer_only():
    model, other = network(), network(shapes="rigid", seed=5)
    schedule = TopologySchedule(model, EXAMPLE, seed=3)
    for epoch in range(8):
        schedule.start_epoch(epoch)
    torch.manual_seed(99)
    TopologySchedule(other, EXAMPLE, seed=3).start_epoch(7)
    assert all(map(torch.equal, mixtures(model), mixtures(other)))


def test_drawing_the_mixture_leaves_torchs_random_state_alone():
    model = network()
    state = torch.get_rng_state()
    TopologySchedule(model, EXAMPLE).start_epoch(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_warmup_masks_all_filters_from_the_start():
    model = network()
    schedule = TopologySchedule(model, EXAMPLE, warmup_epochs=0, penalty_epochs=1)
    schedule.start_epoch(0)
    assert all(m.all() for m in mixtures(model))


def test_frozen_layers_take_no_part_in_the_mixture():
    model = network()
    lhc_layers(model)["4"].freeze()
    TopologySchedule(model, EXAMPLE).start_epoch(1)
    assert lhc_layers(model)["4"].masked_filters.all()
    assert not lhc_layers(model)["2"].masked_filters.all()


@pytest.mark.parametrize(
    ("density", "warmup", "ramp", "first_free_epoch"),
    [(0.1, 3, 5, 5), (0.1, 5, 3, 5), (None, 3, 5, 3), (None, 0, 1, 0), (0.1, 0, 1, 1)],
)
def test_warming_up_lasts_until_both_warm_ups_are_over(density, warmup, ramp, first_free_epoch):
    schedule = TopologySchedule(network(density), EXAMPLE, warmup, ramp)
    assert schedule.warming_up
    for epoch in range(8):
        schedule.start_epoch(epoch)
        assert schedule.warming_up is (epoch < first_free_epoch)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped():
    def train(model, schedule, optimiser, epochs):
        for epoch in epochs:
            schedule.start_epoch(epoch)
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(epoch))
            task_loss = model.eval()(x).square().mean()
            optimiser.zero_grad()
            (task_loss + schedule.penalty()).backward()
            optimiser.step()
            schedule.end_epoch(task_loss=task_loss.item())

    def setup(seed):
        model = network(seed=seed)
        schedule = TopologySchedule(model, EXAMPLE, warmup_epochs=6, penalty_epochs=6, seed=4)
        return model, schedule, torch.optim.SGD(model.parameters(), lr=0.01)

    straight = setup(0)
    train(*straight, range(5))
    first = setup(0)
    train(*first, range(3))
    weights, state = copy.deepcopy(first[0].state_dict()), json.loads(json.dumps(first[1].state_dict()))
    second = setup(1)
    second[0].load_state_dict(weights)
    second[1].load_state_dict(state)
    train(*second, range(3, 5))
    for name, value in straight[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], value), name
    assert second[1].state_dict() == straight[1].state_dict()


GOOD_STATE = {
    "warmup_epochs": 20,
    "penalty_epochs": 20,
    "seed": 0,
    "entry_costs": None,
    "mac_share": 0.01,
    "mac_budget": 0.0,
    "gradual": False,
    "pattern_weight": 0.0,
    "epoch": 3,
    "first_loss": 2.0,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": 1}, ValueError, "state is of a schedule with seed=1, this one has 0"),
        ({"warmup_epochs": 2}, ValueError, "warmup_epochs=2"),
        ({"entry_costs": {"2": 1.0, "4": 1.0, "5": 1.0}}, ValueError, "schedule with entry_costs={'2': 1.0"),
        ({"mac_share": 0.5}, ValueError, "schedule with mac_share=0.5, this one has 0.01"),
        ({"mac_budget": 0.2}, ValueError, "schedule with mac_budget=0.2, this one has 0.0"),
        ({"gradual": True}, ValueError, "schedule with gradual=True, this one has False"),
        ({"pattern_weight": 0.5}, ValueError, "schedule with pattern_weight=0.5, this one has 0.0"),
        ({"penalty_epochs": "20"}, ValueError, "penalty_epochs='20'"),
        ({"epoch": -1}, ValueError, "epoch=-1"),
        ({"epoch": 1.5}, TypeError, "epoch=1.5"),
        ({"first_loss": math.nan}, ValueError, "task_loss=nan"),
        ({"first_loss": "2"}, TypeError, "first_loss='2' is not a number"),
        ({"other": 1}, ValueError, "the schedule's state has the keys"),
    ],
)
def test_load_state_dict_refuses_and_changes_nothing(change, error, message):
    schedule = TopologySchedule(network(), EXAMPLE)
    schedule.load_state_dict(GOOD_STATE)
    with pytest.raises(error, match=message):
        schedule.load_state_dict(GOOD_STATE | change)
    assert schedule.state_dict() == GOOD_STATE


def test_a_state_from_before_budgets_is_one_without():
    older = {name: value for name, value in GOOD_STATE.items() if name not in ("mac_budget", "gradual")}
    schedule = TopologySchedule(network(), EXAMPLE)
    schedule.load_state_dict(older)
    assert schedule.state_dict() == GOOD_STATE
    with pytest.raises(ValueError, match=r"schedule with mac_budget=0\.0, this one has 0\.2"):
        TopologySchedule(network(), EXAMPLE, mac_budget=0.2).load_state_dict(older)


def test_load_state_dict_refuses_a_missing_key():
    with pytest.raises(ValueError, match="expected"):
        TopologySchedule(network(), EXAMPLE).load_state_dict({"epoch": 1})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs=-1 is not supported: give 0 or more"),
        ({"penalty_epochs": 0}, ValueError, "penalty_epochs=0 is not supported: give 1 or more"),
        ({"warmup_epochs": 2.5}, TypeError, "warmup_epochs=2.5 is not an int"),
        ({"seed": -3}, ValueError, "seed=-3"),
        ({"seed": None}, TypeError, "seed=None"),
        ({"model": nn.Conv2d(3, 3, 3)}, ValueError, "Conv2d has no LHCConv2d: call convert"),
        (
            {"example_input": torch.zeros(2, 4, 8, 8)},
            ValueError,
            "Sequential does not run on an input of shape",
        ),
        ({"example_input": "image"}, TypeError, "example_input is a str"),
    ],
)
def test_schedule_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        TopologySchedule(**({"model": network(), "example_input": EXAMPLE} | arguments))


def test_schedule_refuses_layers_with_different_targets():
    model = nn.Sequential(network(0.1), nn.Conv2d(30, 8, 1))
    convert(model, LHCConfig(0.2))
    with pytest.raises(ValueError, match=r"different density targets \[0.1, 0.2\]"):
        TopologySchedule(model, EXAMPLE)


def test_schedule_refuses_an_example_that_reaches_no_layer():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="example_input reaches no LHCConv2d"):
        TopologySchedule(Unused(), EXAMPLE)


def test_schedule_leaves_flags_and_random_state_as_they_were():
    model = network()
    model[1].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    TopologySchedule(model, (EXAMPLE,))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_calls_out_of_order_are_refused():
    schedule = TopologySchedule(network(), EXAMPLE)
    with pytest.raises(RuntimeError, match=r"penalty\(\) was called before start_epoch\(\)"):
        schedule.penalty()
    with pytest.raises(RuntimeError, match=r"end_epoch\(\) was called before start_epoch\(\)"):
        schedule.end_epoch(task_loss=1.0)
    schedule.start_epoch(0)
    schedule.end_epoch()
    schedule.start_epoch(1)
    with pytest.raises(RuntimeError, match=r"penalty\(\) in epoch 1 needs the mean task loss of epoch 0"):
        schedule.penalty()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0, torch.tensor(math.nan)])
def test_end_of_epoch_0_refuses_a_loss_that_cannot_scale(loss):
    schedule = TopologySchedule(network(), EXAMPLE)
    schedule.start_epoch(0)
    with pytest.raises(ValueError, match="is not supported: give the finite mean task loss"):
        schedule.end_epoch(task_loss=loss)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_start_epoch_refuses(epoch, error):
    with pytest.raises(error, match="epoch="):
        TopologySchedule(network(), EXAMPLE).start_epoch(epoch)


def train_epochs(model, schedule, parameters, epochs, steps=2):
    """Train on the penalty and a task of its own, with an optimiser of these parameters."""
    optimiser = torch.optim.SGD(parameters, lr=0.05)
    for epoch in epochs:
        schedule.start_epoch(epoch)
        for step in range(steps):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10 * epoch + step))
            loss = model(x).square().mean()
            model.zero_grad()
            (loss + schedule.penalty()).backward()
            optimiser.step()
        schedule.end_epoch(task_loss=loss.item())


def without_effects(model):
    return [parameter for name, parameter in model.named_parameters() if not name.endswith("effects")]


STILL = (
    r"the effects of '2', '4', '5' have not moved at all in 2 epochs with a penalty.*optimiser after convert"
)


@pytest.mark.parametrize("shapes", ["free", "rigid"])
def test_an_optimiser_without_the_effects_is_told_once_after_two_epochs_with_a_penalty(shapes):
    model = network(shapes=shapes)
    schedule = TopologySchedule(model, EXAMPLE, warmup_epochs=3, penalty_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_epochs(model, schedule, without_effects(model), range(2))
    with pytest.warns(UserWarning, match=STILL) as told:
        train_epochs(model, schedule, without_effects(model), range(2, 3))
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_epochs(model, schedule, without_effects(model), range(3, 8))


def test_layers_converted_after_the_optimiser_was_made_are_named():
    model = network()
    moving = [*without_effects(model), lhc_layers(model)["4"].effects]
    with pytest.warns(UserWarning, match=r"the effects of '2', '5' have not moved"):
        train_epochs(model, TopologySchedule(model, EXAMPLE), moving, range(4))


def test_an_epoch_that_is_not_ended_is_seen_at_the_start_of_the_next():
    model = network()
    schedule = started(model, 1)
    for epoch in (2, 3):
        schedule.penalty().backward()
        if epoch == 3:
            with pytest.warns(UserWarning, match="have not moved"):
                schedule.start_epoch(epoch)
        else:
            schedule.start_epoch(epoch)


@pytest.mark.parametrize("shapes", ["free", "rigid"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("target", [0.1, 0.5, 1.0])
def test_effects_that_learn_cause_no_warning(shapes, steps, target):
    model = network(target, shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_epochs(model, TopologySchedule(model, EXAMPLE, 2, 2), model.parameters(), range(5), steps)


@pytest.mark.parametrize("why", ["no target", "frozen", "never asked", "without gradients", "not trained"])
def test_effects_that_are_not_to_move_cause_no_warning(why):
    model = network(None if why == "no target" else 0.1)
    schedule = TopologySchedule(model, EXAMPLE)
    layers = lhc_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(5):
            schedule.start_epoch(epoch)
            if why == "frozen" and epoch == 2:
                for layer in layers.values():
                    layer.freeze()
            if why == "not trained":
                for layer in layers.values():
                    layer.effects.requires_grad_(False)
            if why != "never asked":
                with torch.set_grad_enabled(why != "without gradients"):
                    schedule.penalty()
            schedule.end_epoch(task_loss=1.0)


def test_a_resumed_run_is_watched_anew():
    model = network()
    schedule = TopologySchedule(model, EXAMPLE)
    train_epochs(model, schedule, model.parameters(), range(4))
    state = json.loads(json.dumps(schedule.state_dict()))
    other = TopologySchedule(model, EXAMPLE)
    train_epochs(model, other, without_effects(model), range(2))
    other.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_epochs(model, other, without_effects(model), range(4, 5))
    with pytest.warns(UserWarning, match=STILL):
        train_epochs(model, other, without_effects(model), range(5, 6))
    again = TopologySchedule(model, EXAMPLE)
    again.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_epochs(model, again, model.parameters(), range(4, 8))


def put(model, name, layer):
    model[int(name)] = layer


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: put(model, "4", network(seed=1)[4]), "'4'"),
        (lambda model: put(model, "2", nn.Identity()), "'2'"),
        (lambda model: model.append(network(seed=2)[2]), None),
        (to_dense, "'2'"),
    ],
    ids=["another", "removed", "added", "dense"],
)
def test_a_schedule_of_layers_that_the_model_no_longer_has_is_refused(change, named):
    model = network()
    schedule = started(model, 0)
    named = named or f"'{len(model)}'"
    change(model)
    with pytest.raises(RuntimeError, match=f"layer {named} is not the one that the schedule was made for"):
        schedule.start_epoch(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_effects_that_diverged_are_named_at_the_next_epoch(value):
    model = network()
    schedule = started(model, 1)
    with torch.no_grad():
        lhc_layers(model)["4"].effects.view(-1)[3] = value
    with pytest.raises(ValueError, match="layer '4' has NaN or infinity in its effects"):
        schedule.start_epoch(2)
