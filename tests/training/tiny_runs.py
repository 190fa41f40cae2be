"""A run that takes a second, its images, and the comparison of two run folders; for several test files."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from lhc_triton.training import Data, ImageSet, TrainConfig
from lhc_triton.training.data.fashion import FORMAT

CONFIG = TrainConfig(
    validation_images=40,
    widths=(8, 16, "M", 16),
    density=0.3,
    in_block=8,
    out_block=8,
    coarse_epochs=3,
    fine_epochs=2,
    batch_size=20,
    precision="fp32",
)
SOURCE = Path(__file__).resolve().parents[2]


def tiny_data(count: int = 140) -> Data:
    """Classes that differ by the period and direction of stripes; 40 test images beside ``count`` others."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 60, (count + 40, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count + 40) % 10
    for image, label in zip(pixels, labels.tolist(), strict=True):
        stripes = image[0] if label < 5 else image[0].t()
        stripes[:: label % 5 + 2] += 150
    images = ImageSet(pixels, labels, FORMAT)
    train, test = images.subset(torch.arange(count)), images.subset(torch.arange(count, count + 40))
    return Data("fashion-mnist", FORMAT, train, None, test)


@contextmanager
def one_thread():
    """Sums are cut by the number of threads: one of them in every process gives the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines_of(folder: Path) -> list[str]:
    """The lines of metrics.csv without their last column, the wall time."""
    return [line.rsplit(",", 1)[0] for line in (folder / "metrics.csv").read_text().splitlines()]


def assert_same_run(folder: Path, other: Path) -> None:
    names = [sorted(path.name for path in f.glob("*.safetensors")) for f in (folder, other)]
    assert names[0] == names[1]
    assert len(names[0]) >= 4  # the last state, the best of two stages, and a network
    for name in names[0]:
        ours, theirs = load_file(folder / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"
    assert lines_of(folder) == lines_of(other)
    assert (folder / "layers.csv").read_text() == (other / "layers.csv").read_text()
    results = [json.loads((f / "result.json").read_text()) for f in (folder, other)]
    for result in results:
        del result["seconds"], result["files"]
    assert results[0] == results[1]
    assert not [path for f in (folder, other) for path in f.iterdir() if path.suffix == ".tmp"]
