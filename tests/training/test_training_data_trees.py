"""ImageNet and other trees of images: opened, checked, decoded ahead, trained on."""

import threading

import numpy as np
import pytest
import torch
from dataset_files import write_tree
from PIL import Image

from lhc_triton.training.data import open_data, validation_split
from lhc_triton.training.data.prefetch import ahead

CLASSES = {"n01440764": 6, "n01443537": 5, "n01484850": 4}


@pytest.fixture
def root(tmp_path):
    return write_tree(tmp_path, {"train": CLASSES, "val": dict.fromkeys(CLASSES, 2)})


def batch_of(source, **options):
    ((x, y),) = source.batches([torch.arange(len(source))], **options)
    return x, y


def test_classes_files_and_labels_are_those_of_the_tree(root):
    data = open_data("imagenet", root)
    assert data.format.classes == tuple(CLASSES)
    assert (data.format.size, data.format.channels) == (224, 3)
    assert torch.bincount(data.train.labels).tolist() == [6, 5, 4]
    assert [file.split("/")[1] for file in data.train.files] == [
        data.format.classes[label] for label in data.train.labels
    ]
    assert data.validation is None
    assert len(data.test) == 6
    assert data.bad_files == ()


def test_val_beside_test_is_for_choosing(root):
    write_tree(root, {"test": dict.fromkeys(CLASSES, 1)})
    data = open_data("folder", root)
    assert (len(data.validation), len(data.test)) == (6, 3)


def test_a_test_folder_alone_is_for_the_test(root):
    (root / "val").rename(root / "test")
    data = open_data("folder", root)
    assert (data.validation, len(data.test)) == (None, 6)


def test_batches_are_the_decoded_files_normalised(root):
    data = open_data("imagenet", root, image_size=35)
    x, y = batch_of(data.test)
    assert torch.equal(y, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert x.is_contiguous(memory_format=torch.channels_last)
    for image, file in zip(x, data.test.files, strict=True):
        # Of 40 x 50 pixels the middle 35 x 35, to be resized to just that.
        left, top = 7.5, 2.5
        picture = Image.open(root / file).resize(
            (35, 35), Image.Resampling.BILINEAR, box=(left, top, left + 35, top + 35)
        )
        expected = (np.asarray(picture) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("augmentation", ["none", "paper", "standard"])
def test_an_image_is_the_same_in_any_batch_and_with_any_workers(root, augmentation):
    train = open_data("imagenet", root, image_size=24).train

    def seen(steps, seed, workers):
        batches = train.batches(steps, augmentation=augmentation, epoch_seed=seed, workers=workers)
        pairs = zip(steps, batches, strict=True)
        return {int(i): image for step, (x, _) in pairs for i, image in zip(step, x, strict=True)}

    alone = seen([torch.arange(15)], 3, 0)
    shuffled = list(torch.randperm(15).split(4))
    for workers in (0, 1, 3):
        again = seen(shuffled, 3, workers)
        assert all(torch.equal(alone[i], again[i]) for i in range(15))
    other = seen([torch.arange(15)], 4, 0)
    same = sum(torch.equal(alone[i], other[i]) for i in range(15))
    assert same == 15 if augmentation == "none" else same < 5


def test_half_of_the_crops_are_flipped(tmp_path):
    """Dark left, bright right: in a flipped crop it is the other way round."""
    for part, count in (("train", 150), ("val", 1)):
        for name in ("a", "b"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (48, 64, 3))
                Image.fromarray(ramp.copy()).save(folder / f"{i}.png")
    x, _ = batch_of(open_data("folder", tmp_path, image_size=16).train, augmentation="standard", epoch_seed=1)
    flipped = (x[:, 0, :, 0] > x[:, 0, :, -1]).all(1)
    assert ((x[:, 0, :, 0] < x[:, 0, :, -1]).all(1) | flipped).all()
    assert 110 < int(flipped.sum()) < 190


def spoil(root):
    (root / "train/n01443537/n01443537_1.JPEG").write_bytes(b"no image")
    cut = root / "val/n01484850/n01484850_0.JPEG"
    cut.write_bytes(cut.read_bytes()[:300])


def test_bad_files_are_left_out_named_and_counted(root):
    sound = open_data("imagenet", root, on_bad_file="skip")
    spoil(root)
    data = open_data("imagenet", root, on_bad_file="skip")
    named = {file.path: file.reason for file in data.bad_files}
    assert named.keys() == {"train/n01443537/n01443537_1.JPEG", "val/n01484850/n01484850_0.JPEG"}
    assert "not an image" in named["train/n01443537/n01443537_1.JPEG"]
    assert "truncated" in named["val/n01484850/n01484850_0.JPEG"].lower()
    assert torch.bincount(data.train.labels).tolist() == [6, 4, 4]
    assert len(data.test) == 5
    assert batch_of(data.train)[0].isfinite().all()
    assert sound.train.digest() != data.train.digest()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_ends_the_run_where_it_is_to(root, workers):
    spoil(root)
    data = open_data("imagenet", root)
    assert data.bad_files == ()
    with pytest.raises(OSError, match=r"n01443537_1.JPEG: not an image.*on_bad_file 'skip'"):
        list(data.train.batches(list(torch.arange(15).split(3)), workers=workers))


def test_a_class_of_bad_files_is_named(root):
    for path in (root / "train/n01484850").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="n01484850: none of its 4 images can be read"):
        open_data("imagenet", root, on_bad_file="skip")


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda r: remove(r / "train/n01440764"), ValueError, "train/n01440764: no image of this class"),
        (lambda r: remove(r / "val/n01440764"), ValueError, "val/n01440764: no image of this class"),
        (
            lambda r: remove(r / "val/n01440764").rmdir(),
            ValueError,
            r"train has the class n01440764, val has not \(3 classes in train, 2 in val\)",
        ),
        (lambda r: (r / "val/n99999999").mkdir(), ValueError, "val has the class n99999999, train has not"),
        (lambda r: (r / "train").rename(r / "training"), FileNotFoundError, "no folder train in"),
        (lambda r: (r / "val").rename(r / "validate"), FileNotFoundError, "neither val nor test in"),
        (
            lambda r: (r / "val/n01440764/n01440764_0.JPEG").rename(r / "val/ILSVRC2012_val_00000001.JPEG"),
            ValueError,
            "ILSVRC2012_val_00000001.JPEG lies outside a class folder",
        ),
        (
            lambda r: [(r / part / "n01440764").rename(r / part / "tench") for part in ("train", "val")],
            ValueError,
            "tench: ImageNet's classes are named like n01440764",
        ),
        (
            lambda r: [remove(r / "train" / name).rmdir() for name in list(CLASSES)[1:]],
            ValueError,
            "train: 1 class folders; at least 2",
        ),
    ],
)
def test_a_tree_that_does_not_hold_together_is_refused(root, change, error, said):
    change(root)
    with pytest.raises(error, match=said) as caught:
        open_data("imagenet", root)
    assert str(root) in str(caught.value)


def test_other_names_and_files_are_fine_in_any_folder(root):
    for part in ("train", "val"):
        (root / part / "n01440764").rename(root / part / "tench")
    (root / "train/tench/notes.txt").write_text("no picture")
    (root / "train/tench/.hidden.jpg").write_text("no picture")
    (root / "train/.cache").mkdir()
    data = open_data("folder", root)
    assert data.format.classes == ("n01443537", "n01484850", "tench")
    assert len(data.train) == 15


def test_wrong_arguments_are_refused(root):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        open_data("imagenet", root / "nowhere")
    with pytest.raises(ValueError, match="imagenet needs a folder"):
        open_data("imagenet")
    with pytest.raises(ValueError, match="on_bad_file 'ignore'"):
        open_data("imagenet", root, on_bad_file="ignore")
    with pytest.raises(ValueError, match="image_size 7"):
        open_data("imagenet", root, image_size=7)
    with pytest.raises(ValueError, match="data 'mnist' is not one of fashion-mnist, cifar10"):
        open_data("mnist", root)


def test_a_network_learns_from_a_tree(tmp_path):
    """Stripes of three periods, from files to accuracy on held-out images."""
    root = write_tree(tmp_path, {"train": dict.fromkeys(CLASSES, 12), "val": dict.fromkeys(CLASSES, 2)})
    data = open_data("imagenet", root, image_size=32)
    training, validation = validation_split(data.train, 6, seed=0)
    assert torch.bincount(validation.labels).tolist() == [2, 2, 2]
    assert not set(training.files) & set(validation.files)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, padding=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    )
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for epoch in range(8):
        steps = list(torch.randperm(30).split(10))
        for x, y in training.batches(steps, augmentation="paper", epoch_seed=epoch, workers=1):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    model.eval()
    x, y = batch_of(data.test)
    assert int((model(x).argmax(1) == y).sum()) >= 5


def test_work_ahead_keeps_its_order_and_its_distance():
    done, lock = [], threading.Lock()

    def prepare(item: int) -> int:
        with lock:
            done.append(item)
        return item * item

    for position, result in enumerate(ahead(prepare, range(20), 3)):
        assert result == position**2
        with lock:
            assert max(done) <= position + 3
    assert sorted(done) == list(range(20))


def test_work_ahead_raises_in_its_turn_and_stops_when_it_is_left():
    done = []

    def prepare(item: int) -> int:
        if item == 4:
            raise OSError("four")
        done.append(item)
        return item

    results = ahead(prepare, range(100), 2)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="four"):
        next(results)
    done.clear()
    left = ahead(prepare, range(5, 100), 2)
    next(left)
    left.close()
    assert len(done) <= 3
    with pytest.raises(ValueError, match="workers -1"):
        next(ahead(prepare, [1], -1))
