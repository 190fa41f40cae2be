"""Images in memory: their checks, splits, augmentation and batches."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lhc_triton.training.data import ImageFormat, ImageSet, balanced_indices, open_data, validation_split
from lhc_triton.training.data.augmentation import draw_moves, largest_shift, move, uniforms

FORMAT = ImageFormat(3, 16, tuple("abcdefghij"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=generator(seed), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 10, FORMAT)


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


def test_batches_hold_the_images_of_their_step_normalised_and_channels_last():
    data = images(30)
    steps = [torch.tensor([3, 29, 0]), torch.tensor([7]), torch.arange(30)]
    mean, std = (np.array(values)[:, None, None] for values in (FORMAT.mean, FORMAT.std))
    for (x, y), step in itertools.zip_longest(data.batches(steps), steps):
        expected = (data.images[step].numpy() / 255 - mean) / std
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, data.labels[step])


def test_no_steps_give_no_batches():
    assert list(images(10).batches([])) == []


@pytest.mark.parametrize("augmentation", ["paper", "standard"])
def test_an_augmented_image_depends_on_seed_and_index_alone(augmentation):
    data = images(40)

    def seen(steps: list[torch.Tensor], seed: int) -> dict[int, torch.Tensor]:
        batches = data.batches(steps, augmentation=augmentation, epoch_seed=seed)
        pairs = zip(steps, batches, strict=True)
        return {int(i): image for step, (x, _) in pairs for i, image in zip(step, x, strict=True)}

    whole = seen([torch.arange(40)], 5)
    shuffled = seen(list(torch.randperm(40, generator=generator(1)).split(7)), 5)
    assert all(torch.equal(whole[i], shuffled[i]) for i in range(40))
    other = seen([torch.arange(40)], 6)
    assert sum(torch.equal(whole[i], other[i]) for i in range(40)) < 10


def test_fashion_mnist_grows_into_background():
    plain, large = open_data("fashion-mnist"), open_data("fashion-mnist", image_size=33)
    assert (large.format.size, large.format.mean) == (33, plain.format.mean)
    pixels = large.test.images
    assert torch.equal(pixels[:, :, 2:30, 2:30], plain.test.images)
    assert int(pixels.sum()) == int(plain.test.images.sum())
    with pytest.raises(ValueError, match="image_size 27"):
        open_data("fashion-mnist", image_size=27)


def test_random_numbers_are_uniform_and_uncorrelated():
    draws = uniforms(7, torch.arange(20_000), 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    # Five deviations of a mean of 20,000 numbers; the same for correlations, also from image to image.
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=5 / np.sqrt(12 * 20_000))
    neighbours = np.concatenate([draws[1:], draws[:-1], uniforms(8, torch.arange(19_999), 3)], axis=1)
    correlations = np.corrcoef(neighbours, rowvar=False) - np.eye(9)
    assert np.abs(correlations).max() < 5 / np.sqrt(20_000)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 20), width=st.integers(1, 20), largest=st.integers(0, 6), seed=st.integers(0, 99)
)
def test_moved_images_are_flipped_and_shifted_as_drawn(height, width, largest, seed):
    pixels = torch.randint(1, 256, (4, 2, height, width), generator=generator(seed), dtype=torch.uint8)
    moves = draw_moves(seed, torch.arange(4), largest)
    moved = move(pixels, moves, largest)
    for before, after, (flipped, top, left) in zip(pixels, moved, moves.tolist(), strict=True):
        expected = np.pad(before.numpy(), ((0, 0), (largest,) * 2, (largest,) * 2))
        expected = expected[:, top : top + height, left : left + width]
        assert np.array_equal(after.numpy(), expected[:, :, ::-1] if flipped else expected)


def test_every_move_is_drawn():
    moves = draw_moves(0, torch.arange(3000), 3)
    assert {tuple(m) for m in moves.tolist()} == set(itertools.product((0, 1), range(7), range(7)))


@pytest.mark.parametrize(
    ("augmentation", "size", "shift"),
    [("none", 32, 0), ("paper", 28, 3), ("paper", 32, 4), ("standard", 28, 4), ("standard", 32, 4)],
)
def test_shifts_are_an_eighth_or_four_pixels(augmentation, size, shift):
    assert largest_shift(augmentation, size) == shift


def test_an_unknown_augmentation_or_seed_is_refused():
    with pytest.raises(ValueError, match="'mild' is not one of none, paper, standard"):
        next(images(10).batches([torch.arange(2)], augmentation="mild"))
    with pytest.raises(ValueError, match="epoch_seed -1"):
        next(images(10).batches([torch.arange(2)], epoch_seed=-1))


def test_digests_tell_data_apart():
    first, again, other = images(10), images(10), images(10, seed=1)
    assert first.digest() == again.digest()
    assert len({first.digest(), other.digest(), first.subset(torch.arange(9)).digest()}) == 3


PIXELS = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        (PIXELS.float(), torch.zeros(2, dtype=torch.int64), "uint8"),
        (PIXELS[:, :1], torch.zeros(2, dtype=torch.int64), "uint8"),
        (PIXELS[:, :, 1:], torch.zeros(2, dtype=torch.int64), "uint8"),
        (PIXELS, torch.zeros(3, dtype=torch.int64), "int64"),
        (PIXELS, torch.zeros(2, dtype=torch.uint8), "int64"),
        (PIXELS, torch.tensor([0, 10]), "0 to 9"),
        (PIXELS[:0], torch.zeros(0, dtype=torch.int64), "at least one"),
    ],
)
def test_image_sets_that_do_not_hold_together_are_refused(pixels, labels, said):
    with pytest.raises(ValueError, match=said):
        ImageSet(pixels, labels, FORMAT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 2}, "2 channels"),
        ({"size": 0}, "0 pixels"),
        ({"classes": ("one",)}, "1 classes"),
        ({"mean": (0.5,)}, "one of each"),
        ({"std": (0.2, 0.3, 0.0)}, "above 0"),
    ],
)
def test_formats_that_do_not_hold_together_are_refused(changes, said):
    values = {"channels": 3, "size": 16, "classes": ("a", "b"), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    with pytest.raises(ValueError, match=said):
        ImageFormat(**{**values, **changes})
