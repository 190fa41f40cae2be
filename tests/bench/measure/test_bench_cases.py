"""The benchmark's layers and the masks drawn for them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lhc_bench.measure import cases, masks

# Convolutions and their multiply-accumulates for one image, from the papers' tables.
PUBLISHED = {
    "vgg16-imagenet": (13, 15.35e9),
    "resnet34-imagenet": (36, 3.66e9),
    "vgg16-cifar": (13, 0.313e9),
    "resnet34-cifar": (36, 1.16e9),
    "resnet50-imagenet": (53, 4.09e9),
    "resnet50-cifar": (53, 1.30e9),
}


@pytest.mark.parametrize("model", cases.model_names())
def test_the_cases_are_the_whole_network(model):
    layers = cases.layer_cases(model)
    count, macs = PUBLISHED[model]
    assert sum(case.count for case in layers) == count
    assert sum(case.count * case.geometry(1).macs for case in layers) == pytest.approx(macs, rel=0.01)
    assert len({case.shape for case in layers}) == len({case.name for case in layers}) == len(layers)


def test_the_stem_and_the_pointwise_downsamples_are_named_ineligible():
    dense = {case.name: case.ineligible for case in cases.layer_cases("resnet34-imagenet") if case.ineligible}
    assert dense == {
        "resnet34-imagenet/conv1": "first convolution",
        "resnet34-imagenet/layer2.0.downsample": "1x1 downsample",
        "resnet34-imagenet/layer3.0.downsample": "1x1 downsample",
        "resnet34-imagenet/layer4.0.downsample": "1x1 downsample",
    }
    assert all(case.kernel == 3 for case in cases.eligible_cases())


def test_a_strided_layer_halves_the_image():
    case = next(c for c in cases.eligible_cases() if c.name == "resnet34-imagenet/layer3.0.conv1")
    geometry = case.geometry(batch=2)
    assert (case.in_channels, case.out_channels, case.height) == (128, 256, 28)
    assert (geometry.out_height, geometry.out_pixels) == (14, 2 * 14 * 14)


def test_the_quick_cases_are_eligible_and_mixed():
    quick = cases.quick_cases()
    assert set(quick) <= set(cases.eligible_cases())
    assert len({case.model for case in quick}) >= 3


def test_the_batch_follows_device_and_images():
    assert cases.batch_of("vgg16-imagenet", "cuda") == 64
    assert cases.batch_of("vgg16-cifar", "cpu") == 8


def test_no_shape_is_measured_twice_at_a_batch():
    for device, found in (("cpu", cases.cpu_cases()), ("cuda", cases.gpu_cases())):
        shapes = [(*case.shape, cases.batch_of(case.model, device)) for case in found]
        assert len(set(shapes)) == len(shapes)
        assert all(case.kernel == 3 and case.in_channels >= 64 for case in found)
    # Every layer's shape is there all the same, under the first network that has it.
    assert {case.shape for case in cases.eligible_cases(("resnet34-cifar",))} <= {
        case.shape for case in cases.cpu_cases()
    }


def test_the_gpus_wide_layers_come_first():
    widths = [case.in_channels for case in cases.gpu_cases()]
    assert widths == sorted(widths, key=lambda width: width < 128)
    assert any(case.model == "resnet50-imagenet" and case.stride == 2 for case in cases.gpu_cases())


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'alexnet'; known: vgg16-cifar"):
        cases.layer_cases("alexnet")


@settings(max_examples=50, deadline=None)
@given(
    out_channels=st.integers(1, 150),
    in_channels=st.integers(1, 150),
    side=st.integers(1, 5),
    density=st.floats(0.01, 1),
    share=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 1000),
)
def test_masks_have_exactly_the_live_entries_asked_for(out_channels, in_channels, side, density, share, seed):
    kernel = (side, 3)
    mask = masks.random_mask(out_channels, in_channels, kernel, density, share=share, seed=seed)
    groups, blocks = -(-out_channels // 16), -(-in_channels // 32)
    assert mask.shape == (groups, blocks, *kernel)
    assert mask.reshape(groups, -1).any(axis=1).all()
    first_of_each_share = mask[:: share // 16]
    assert np.array_equal(first_of_each_share.repeat(share // 16, axis=0)[:groups], mask)
    shared = len(first_of_each_share)
    wanted = round(density * shared * blocks * side * 3)
    assert first_of_each_share.sum() == max(wanted, shared)


def test_masks_repeat_with_the_seed_and_change_with_it():
    def draw(seed):
        return masks.random_mask(128, 128, (3, 3), 0.1, seed=seed)

    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_a_mask_too_thin_for_its_groups_keeps_one_entry_each():
    mask = masks.random_mask(64, 32, (3, 3), 0.01)
    assert mask.sum(axis=(1, 2, 3)).tolist() == [1, 1, 1, 1]


def test_a_mask_spreads_to_the_weight_and_is_cropped():
    mask = np.zeros((2, 2, 1, 1), dtype=bool)
    mask[1, 1] = True
    full = masks.expand(mask, out_channels=20, in_channels=40, in_block=32, out_block=16)
    assert full.shape == (20, 40, 1, 1)
    assert full[16:, 32:].all()
    assert full.sum() == 4 * 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0.0}, r"density=0.0: expected a share in \(0, 1\]"),
        ({"density": float("nan")}, "density=nan"),
        ({"share": 24}, "share=24: expected a multiple of out_block=16"),
        ({"in_block": 0}, "expected sizes of at least 1"),
    ],
)
def test_wrong_mask_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        masks.random_mask(
            **{"out_channels": 64, "in_channels": 64, "kernel": (3, 3), "density": 0.1, **wrong}
        )
