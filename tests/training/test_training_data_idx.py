"""Reading IDX files: right ones, and every way in which one can be wrong."""

import gzip
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lhc_triton.training.data import open_data
from lhc_triton.training.data.fashion import FILES, PACKAGED_FOLDER
from lhc_triton.training.data.idx import load_idx
from lhc_triton.training.subset import idx_bytes, make_subset


def array(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), packed=st.booleans(), seed=st.integers(0, 99)
)
def test_what_was_written_is_read_back(tmp_path_factory, shape, packed, seed):
    path = tmp_path_factory.mktemp("idx") / ("a-ubyte.gz" if packed else "a-ubyte")
    data = idx_bytes(array(tuple(shape), seed))
    path.write_bytes(gzip.compress(data) if packed else data)
    assert torch.equal(load_idx(path), array(tuple(shape), seed))


def header(zero: int = 0, element: int = 8, dimensions: int = 1, sizes: tuple[int, ...] = (4,)) -> bytes:
    return struct.pack(f">HBB{len(sizes)}I", zero, element, dimensions, *sizes)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "too few"),
        (b"\0\0\x08", "too few"),
        (header(zero=1) + b"abcd", "two zero bytes"),
        (header(element=0x0D) + b"abcd", "type 0x0d"),
        (header(dimensions=0, sizes=()), "0 dimensions"),
        (header(dimensions=5, sizes=(1,) * 5) + b"a", "5 dimensions"),
        (header(dimensions=2), "before its 2 sizes"),
        (header(sizes=(0,)), "promises 0 bytes"),
        (header(dimensions=2, sizes=(2**32 - 1, 2**32 - 1)), "are supported"),
        (header() + b"abc", "holds 3"),
        (header() + b"abcde", "holds more"),
    ],
)
def test_a_wrong_file_gives_one_line_that_names_it(tmp_path, packed, content, said):
    path = tmp_path / ("x-ubyte.gz" if packed else "x-ubyte")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=said) as caught:
        load_idx(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def damaged_gzips() -> dict[str, bytes]:
    intact = gzip.compress(idx_bytes(array((500,))))
    flipped = bytearray(intact)
    flipped[len(flipped) // 2] ^= 0xFF
    return {
        "not gzip": b"hello, this is no gzip file",
        "empty": b"",
        "cut": intact[: len(intact) // 2],
        "lacks its checksum": intact[:-8],
        "corrupt": bytes(flipped),
        "wrong checksum": intact[:-8] + b"\0" * 8,
        "followed by rubbish": intact + b"rubbish",
    }


@pytest.mark.parametrize("name", damaged_gzips())
def test_a_damaged_gzip_gives_one_line_that_names_it(tmp_path, name):
    path = tmp_path / "x-ubyte.gz"
    path.write_bytes(damaged_gzips()[name])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_idx(path)


def test_gzip_data_without_the_suffix_are_noticed(tmp_path):
    path = tmp_path / "x-ubyte"
    path.write_bytes(gzip.compress(idx_bytes(array((4,)))))
    with pytest.raises(ValueError, match="rename it"):
        load_idx(path)


def test_a_missing_file_keeps_its_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_idx(tmp_path / "absent.gz")


def write_folder(folder: Path, **changes: torch.Tensor) -> Path:
    labels = torch.arange(20, dtype=torch.uint8) % 10
    arrays = {"train_images": array((20, 28, 28)), "train_labels": labels}
    arrays |= {"test_images": array((20, 28, 28), 1), "test_labels": labels}
    folder.mkdir(exist_ok=True)
    for key, values in {**arrays, **changes}.items():
        (folder / FILES[key]).write_bytes(idx_bytes(values))
    return folder


def test_a_folder_of_raw_files_is_read(tmp_path):
    data = open_data("fashion-mnist", write_folder(tmp_path))
    assert data.train.images.shape == (20, 1, 28, 28)
    assert torch.equal(data.test.images.squeeze(1), array((20, 28, 28), 1))
    assert data.test.labels.tolist() == [*range(10), *range(10)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_images": array((20, 28, 27))}, "train_images"),
        ({"train_images": array((20 * 28, 28))}, "train_images"),
        ({"train_labels": array((19,))}, "train_labels"),
        ({"test_labels": array((20, 1))}, "test_labels"),
        ({"test_labels": torch.full((20,), 10, dtype=torch.uint8)}, "test_labels"),
    ],
)
def test_files_that_do_not_go_together_are_named(tmp_path, changes, named):
    with pytest.raises(ValueError, match=FILES[named]):
        open_data("fashion-mnist", write_folder(tmp_path, **changes))


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_data("fashion-mnist", tmp_path / "nowhere")
    (write_folder(tmp_path) / FILES["test_labels"]).unlink()
    with pytest.raises(FileNotFoundError, match=FILES["test_labels"]):
        open_data("fashion-mnist", tmp_path)


def test_the_packaged_images_are_what_the_maker_makes(tmp_path):
    """Made again from themselves: the first 1,200 of each class of 12,000 are all of them."""
    make_subset(PACKAGED_FOLDER, tmp_path)
    for name in FILES.values():
        made, kept = (load_idx(folder / f"{name}.gz") for folder in (tmp_path, PACKAGED_FOLDER))
        assert torch.equal(made, kept)


def test_the_packaged_images_are_balanced_and_licensed():
    data = open_data("fashion-mnist")
    assert (len(data.train), len(data.test)) == (12_000, 10_000)
    assert torch.bincount(data.train.labels).tolist() == [1200] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert "Zalando" in (PACKAGED_FOLDER / "LICENSE").read_text()
    mean = float(data.train.images.float().mean()) / 255
    assert mean == pytest.approx(0.286, abs=0.005)


def test_a_truncated_file_in_the_folder_is_named(tmp_path):
    for name in FILES.values():
        shutil.copy(PACKAGED_FOLDER / f"{name}.gz", tmp_path)
    cut = tmp_path / f"{FILES['test_images']}.gz"
    cut.write_bytes(cut.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=FILES["test_images"]):
        open_data("fashion-mnist", tmp_path)
