"""Splitting, normalising and augmenting images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lhc_triton.training.data import (
    MEAN,
    STD,
    ImageSet,
    augment,
    balanced_indices,
    normalise,
    validation_split,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=generator(seed), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 10)


def rows(subset: ImageSet) -> set[bytes]:
    return {row.numpy().tobytes() for row in subset.images}


@pytest.mark.parametrize("train_images", [None, 50])
def test_the_validation_split_is_balanced_and_disjoint(train_images):
    whole = images(200)
    training, validation = validation_split(whole, 40, seed=3, train_images=train_images)
    assert torch.bincount(validation.labels).tolist() == [4] * 10
    assert torch.bincount(training.labels).tolist() == [16 if train_images is None else 5] * 10
    assert not rows(training) & rows(validation)
    assert rows(training) | rows(validation) <= rows(whole)


def test_the_validation_split_follows_its_seed():
    whole = images(200)
    first, again, other = (validation_split(whole, 40, seed=seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_a_split_that_the_images_do_not_suffice_for_is_refused():
    with pytest.raises(ValueError, match="which has 20"):
        validation_split(images(200), 210, seed=0)
    with pytest.raises(ValueError, match="which has 16"):
        validation_split(images(200), 40, seed=0, train_images=170)
    with pytest.raises(ValueError, match="at least 10"):
        balanced_indices(images(200).labels, 9)


def test_balanced_indices_without_a_generator_are_the_first_of_each_class():
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    assert balanced_indices(labels, 3).tolist() == [0, 1, 2]
    assert balanced_indices(labels, 4).tolist() == [0, 1, 2, 3]


def test_normalised_pixels_have_the_training_images_mean_and_deviation():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert normalise(pixels).flatten().tolist() == pytest.approx([-MEAN / STD, (1 - MEAN) / STD])


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), shift=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_augmented_images_are_flipped_and_shifted_ones(height, width, shift, seed):
    pixels = torch.randint(1, 256, (4, 2, height, width), generator=generator(seed), dtype=torch.uint8)
    up, left = int(shift * height), int(shift * width)
    for before, after in zip(pixels, augment(pixels, generator(seed), shift), strict=True):
        padded = torch.nn.functional.pad(torch.stack([before, before.flip(2)]), (left, left, up, up))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        same = (windows == after[None, :, None, None]).flatten(4).all(4).all(1)
        assert bool(same.any())


def test_augmentation_draws_every_shift_both_ways_and_follows_its_generator():
    pixels = torch.zeros(2000, 1, 28, 28, dtype=torch.uint8)
    pixels[:, :, 14, 10] = 1
    moved = augment(pixels, generator(0))
    assert torch.equal(moved, augment(pixels, generator(0)))
    places = {(int(row), int(column)) for _, _, row, column in moved.nonzero()}
    columns = {*range(7, 14), *range(27 - 13, 27 - 6)}
    assert places == {(row, column) for row in range(11, 18) for column in columns}


@pytest.mark.parametrize("shift", [-0.1, 1.0])
def test_a_shift_outside_its_range_is_refused(shift):
    with pytest.raises(ValueError, match="shift"):
        augment(torch.zeros(1, 1, 4, 4), generator(0), shift)


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        (torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), "int64"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.tensor([10]), "0 to 9"),
        (torch.zeros(0, 1, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "at least one"),
    ],
)
def test_image_sets_that_do_not_hold_together_are_refused(pixels, labels, said):
    with pytest.raises(ValueError, match=said):
        ImageSet(pixels, labels)
