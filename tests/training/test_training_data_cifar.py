"""CIFAR from its original archives: both versions alike, and pickles that are only ever data."""

import contextlib
import gzip
import os
import pickle
import pickletools
import tarfile

import numpy as np
import pytest
import torch
from dataset_files import cifar_arrays, cifar_files, python2_pickle, write_cifar
from hypothesis import given, settings
from hypothesis import strategies as st

from lhc_triton.training.data import cifar, open_data
from lhc_triton.training.data.cifar import LAYOUTS
from lhc_triton.training.data.inert import read_inert

NAMES = ("cifar10", "cifar100")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_version_gives_the_same_images(tmp_path, name, binary, packed):
    place = write_cifar(tmp_path, name, binary, packed)
    arrays = cifar_arrays(name)
    layout = LAYOUTS[name][0]
    pixels = np.concatenate([arrays[file][0] for file in layout.train]).reshape(-1, 3, 32, 32)
    for folder in (place, tmp_path):
        data = open_data(name, folder)
        assert np.array_equal(data.train.images, pixels)
        assert np.array_equal(data.test.labels, arrays[layout.test][1])
        assert np.array_equal(data.train.labels, np.concatenate([arrays[f][1] for f in layout.train]))
        assert data.format.classes[3] == "class_3"
        assert data.validation is None


def test_the_test_files_are_what_python_itself_reads():
    content = cifar_files("cifar100", False, cifar_arrays("cifar100"))["train"]
    ours, theirs = read_inert(content), pickle.loads(content, encoding="latin1")
    array = theirs.pop("data")
    assert np.array_equal(array, cifar_arrays("cifar100")["train"][0])
    ours.pop("data")
    assert ours == theirs


def test_pixels_in_column_order_are_put_right(tmp_path):
    folder = write_cifar(tmp_path, "cifar100", False, False)
    arrays = cifar_arrays("cifar100")
    turned = {file: (np.asfortranarray(pixels), labels) for file, (pixels, labels) in arrays.items()}
    for file, content in cifar_files("cifar100", False, turned).items():
        (folder / file).write_bytes(content)
    found = open_data("cifar100", folder).train.images
    assert np.array_equal(found.reshape(20, -1), arrays["train"][0])


class Evil:
    """Makes a folder when a pickle of it is loaded."""

    def __reduce__(self):
        return os.mkdir, (self.path,)

    def __init__(self, path):
        self.path = str(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_call_something_is_refused_and_calls_nothing(tmp_path, protocol):
    made = tmp_path / "made"
    folder = write_cifar(tmp_path, "cifar10", False, False)
    (folder / "data_batch_2").write_bytes(pickle.dumps(Evil(made), protocol=protocol))
    with pytest.raises(
        ValueError, match=r"data_batch_2: not a pickle as CIFAR has them \(it (has the opcode|names)"
    ):
        open_data("cifar10", folder)
    assert not made.exists()
    pickle.loads(pickle.dumps(Evil(made), protocol=protocol))
    assert made.exists()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_pickle_gives_a_value_error_or_data(data):
    content = bytearray(python2_pickle({"data": np.zeros((2, 3), np.uint8), "labels": [1, 700, -1, None]}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(ValueError):
        read_inert(bytes(content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.", "a key that is no text"),
        (b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "a key that is no text"),
        (b"\x80\x02}" + 2 * (b")" + b"\x85" * 5000 + b"Ns") + b".", "a key that is no text"),
        (b"\x80\x02" + b"}" * (2 << 20) + b".", "more than 1048576 opcodes"),
    ],
    ids=["doubling key", "deep key", "equal deep keys", "many objects"],
)
def test_a_pickle_made_to_take_for_ever_is_refused_at_once(content, said):
    with pytest.raises(ValueError, match=said):
        read_inert(content)


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_MAX_ARCHIVE_BYTES", 1 << 20)
    archive = tmp_path / LAYOUTS["cifar10"][0].archive
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 64 << 20
    with gzip.open(archive, "wb") as file:
        file.write(header.tobuf() + bytes(header.size))
    with pytest.raises(ValueError, match="unpacks to more than the 1048576 bytes that are supported") as told:
        open_data("cifar10", tmp_path)
    assert str(archive) in str(told.value)


def test_the_test_files_use_the_opcodes_of_python_2():
    content = cifar_files("cifar10", False, cifar_arrays("cifar10"))["test_batch"]
    assert {"BINSTRING", "GLOBAL", "BUILD"} <= {op.name for op, _, _ in pickletools.genops(content)}


def batch(**changes):
    values = {"labels": [0] * 4, "data": np.zeros((4, 3072), np.uint8)}
    return python2_pickle({**values, **changes})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (batch(labels=[0] * 3), "3 labels for 4 images"),
        (batch(labels=[0, 1, 2, 10]), "labels run from 0 to 10"),
        (batch(labels=[0, 1, 2, -1]), "labels run from -1 to 2"),
        (batch(labels=["a"] * 4), "no list of numbers 'labels'"),
        (batch(data=np.zeros((4, 3071), np.uint8)), "no array 'data'"),
        (batch(data=[1, 2]), "no array 'data'"),
        (batch().replace(b"\x86cnumpy\ndtype", b"\x85cnumpy\ndtype"), "no array 'data'"),
        (batch().replace(b"u1", b"f4"), "no array 'data'"),
        (python2_pickle([1]), "holds a list"),
        (batch()[:-1], "pickle"),
        (batch()[:500], "expected 12288 bytes"),
        (b"", "pickle"),
        (b"garbage", "not a pickle"),
    ],
)
def test_a_damaged_python_file_is_named(tmp_path, content, said):
    folder = write_cifar(tmp_path, "cifar10", False, False)
    (folder / "data_batch_4").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        open_data("cifar10", folder)
    assert str(folder / "data_batch_4") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cifar10", b"", "no whole number of records of 3073"),
        ("cifar10", bytes(3074), "no whole number of records of 3073"),
        ("cifar10", b"\x0a" + bytes(3072), "labels run from 10"),
        ("cifar100", bytes(3073), "no whole number of records of 3074"),
        ("cifar100", b"\x00\x64" + bytes(3072), "labels run from 100"),
    ],
)
def test_a_damaged_binary_file_is_named(tmp_path, name, content, said):
    folder = write_cifar(tmp_path, name, True, False)
    file = LAYOUTS[name][1].test
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        open_data(name, folder)
    assert file in str(caught.value)


@pytest.mark.parametrize("binary", [False, True])
def test_wrong_class_names_are_named(tmp_path, binary):
    folder = write_cifar(tmp_path, "cifar10", binary, False)
    names = LAYOUTS["cifar10"][binary].names
    (folder / names).write_bytes(b"one two" if binary else python2_pickle({"label_names": ["one", "two"]}))
    with pytest.raises(ValueError, match=f"{names}: holds 2 class names; 10"):
        open_data("cifar10", folder)


def test_a_damaged_archive_is_named(tmp_path):
    archive = write_cifar(tmp_path, "cifar10", True, True)
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    checksum = whole[:-8] + bytes(8)
    for content in (b"", b"no archive", whole[: len(whole) // 2], bytes(flipped), checksum):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz: not an intact"):
            open_data("cifar10", tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python.tar.gz or cifar-10-batches-py"):
        open_data("cifar10", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cifar10 needs a folder"):
        open_data("cifar10")
    folder = write_cifar(tmp_path, "cifar10", False, False)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        open_data("cifar10", tmp_path)
    with pytest.raises(ValueError, match="image_size 40"):
        open_data("cifar10", tmp_path, image_size=40)


def test_an_archive_without_one_of_its_files_is_refused(tmp_path):
    write_cifar(tmp_path, "cifar100", True, True)
    # The right folder under the wrong name: the members do not match.
    (tmp_path / "cifar-100-binary.tar.gz").rename(tmp_path / "cifar-100-python.tar.gz")
    with pytest.raises(FileNotFoundError, match="no file cifar-100-python/train in"):
        open_data("cifar100", tmp_path)


def test_batches_of_it_are_normalised_colour_images(tmp_path):
    write_cifar(tmp_path, "cifar10", True, True)
    data = open_data("cifar10", tmp_path)
    ((x, y),) = data.train.batches([torch.arange(100)], augmentation="standard", epoch_seed=1)
    assert x.shape == (100, 3, 32, 32)
    assert torch.equal(y, data.train.labels)
    white = [(1 - mean) / std for mean, std in ((0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616))]
    assert x.amax((0, 2, 3)).tolist() == pytest.approx(white, rel=1e-5)
