"""Planning reads weights that are computed from others as the next call in eval mode uses them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lhc_triton import LHCConfig, LHCConv2d, plan
from lhc_triton.planning.extract import read_model


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))


def image():
    return torch.randn(1, 3, 8, 8)


def block_mask(seed, density=0.2):
    """A mask of blocks of 8 channels by 4 filters, [32, 32, 3, 3], no filter group empty."""
    live = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) < density
    live[:, 0, 1, 1] = True
    return live.repeat_interleave(4, 0).repeat_interleave(8, 1)


def topology(model):
    """What planning reads of the second convolution."""
    (found,) = read_model(model, image()).topologies
    assert found.name == "2"
    return found


def plain(mask):
    """The network with the mask in its weight: what the others are to be read as."""
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(mask)
    return model


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def test_a_prune_mask_is_a_topology():
    model, mask = network(), block_mask(1)
    prune.custom_from_mask(model[2], "weight", mask)
    assert topology(model) == topology(plain(mask)) != topology(plain(block_mask(2)))


def test_a_prune_mask_that_changed_after_the_last_forward_is_the_one_that_is_read():
    model, mask = network(), block_mask(2)
    prune.custom_from_mask(model[2], "weight", block_mask(1))
    model(image())
    model[2].weight_mask.copy_(mask)
    assert topology(model) == topology(plain(mask))


def test_a_parametrised_weight_is_read_as_it_is_computed():
    model, mask = network(), block_mask(3)
    parametrize.register_parametrization(model[2], "weight", Masked(mask))
    assert topology(model) == topology(plain(mask))


def test_reading_a_spectral_norm_leaves_its_state_and_the_training_flags_alone():
    model = network().train()
    prune.custom_from_mask(model[2], "weight", block_mask(4))
    prune.remove(model[2], "weight")
    nn.utils.parametrizations.spectral_norm(model[2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert topology(model) == topology(plain(block_mask(4)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


class Named(nn.Conv2d):
    """A subclass that computes what nn.Conv2d computes."""

    def describe(self):
        return f"{self.in_channels} to {self.out_channels}"


class Standardised(nn.Conv2d):
    """A subclass that does not."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class Doubled(LHCConv2d):
    def masked_weight(self):
        return 2 * super().masked_weight()


def test_a_subclass_that_leaves_the_computation_alone_is_planned():
    model = network()
    model[2] = Named(32, 32, 3, padding=1)
    with torch.no_grad():
        model[2].weight.mul_(block_mask(5))
    assert topology(model) == topology(plain(block_mask(5)))


def test_a_forward_replaced_on_the_instance_is_not_planned():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(block_mask(5))
    plain = model[2].forward
    model[2].forward = lambda x: plain(x).exp()
    assert dict(plan(model, image()).skipped)["2"] == "is a Conv2d, with behaviour of its own"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Standardised(32, 32, 3, padding=1), "is a Standardised, with behaviour of its own"),
        (
            Doubled(32, 32, 3, padding=1, config=LHCConfig(in_block=8, out_block=4)),
            "is a Doubled, with behaviour of its own",
        ),
    ],
)
def test_a_subclass_that_computes_something_else_is_not_planned(layer, reason):
    model = network()
    model[2] = layer
    assert dict(plan(model, image()).skipped)["2"] == reason


def test_nan_behind_a_prune_mask_is_refused_with_the_layers_name():
    model = network()
    prune.custom_from_mask(model[2], "weight", block_mask(6))
    with torch.no_grad():
        model[2].weight_orig[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '2' has NaN in its weight"):
        plan(model, image())
