"""CIFAR-10 and an ImageNet tree, from small files in their formats on disk to the tested networks."""

import dataclasses
import json

import pytest
from dataset_files import write_cifar, write_tree
from tiny_runs import lines_of, one_thread

from lhc_triton.conversion import lhc_layers
from lhc_triton.models import load_network
from lhc_triton.training import EpochMetrics, TrainConfig, train

CONFIG = TrainConfig(
    validation_images=20,
    width=1 / 16,
    density=0.3,
    in_block=4,
    out_block=4,
    coarse_epochs=2,
    fine_epochs=1,
    batch_size=20,
    precision="fp32",
    augmentation="standard",
)


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def test_vgg16_trains_on_cifar10_alike_from_its_archive_and_its_binary_files(tmp_path):
    config = dataclasses.replace(CONFIG, data="cifar10", network="vgg16")
    for binary in (False, True):
        root = tmp_path / f"files{binary}"
        write_cifar(root, "cifar10", binary, packed=not binary)
        result = train(
            dataclasses.replace(config, data_folder=str(root)), tmp_path / f"run{binary}", progress=False
        )
        assert result.network == "VGG16 x 0.0625"
        assert str(tmp_path) not in result.command
    assert lines_of(tmp_path / "runFalse") == lines_of(tmp_path / "runTrue")
    saved = load_network(result.files["lhc"])
    assert saved.architecture.image_size == 32
    assert len(lhc_layers(saved.model)) == 12  # all but the first


class StopError(Exception):
    """Stands for a kill."""


def test_resnet50_trains_on_an_imagenet_tree_and_goes_on_with_other_workers(tmp_path, capsys):
    counts = {
        part: dict.fromkeys(("n01440764", "n01443537", "n01484850"), n)
        for part, n in (("train", 12), ("val", 5))
    }
    root = write_tree(tmp_path / "tree", counts)
    (root / "train" / "n01440764" / "n01440764_3.JPEG").write_bytes(b"no picture")
    config = dataclasses.replace(
        CONFIG,
        data="imagenet",
        data_folder=str(root),
        image_size=64,
        network="resnet50",
        pointwise_layers=False,
        on_bad_file="skip",
        validation_images=10,
        batch_size=8,
        workers=2,
    )
    result = train(config, tmp_path / "whole")
    said = capsys.readouterr().err
    assert "left out 1 file" in said
    assert "n01440764_3.JPEG" in said
    (bad,) = json.loads((tmp_path / "whole" / "result.json").read_text())["bad_files"]
    assert bad["path"].endswith("n01440764_3.JPEG")
    assert "not an image" in bad["reason"]
    assert result.network == "ResNet50 x 0.0625"

    def stop(row: EpochMetrics) -> None:
        if row.stage == "coarse":
            raise StopError

    with pytest.raises(StopError):
        train(config, tmp_path / "stopped", progress=False, on_epoch=stop)
    train(dataclasses.replace(config, workers=0), tmp_path / "stopped", progress=False)
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
    with pytest.raises(OSError, match=r"n01440764_3\.JPEG"):
        train(dataclasses.replace(config, on_bad_file="fail"), tmp_path / "failing", progress=False)
    assert not list((tmp_path / "failing").glob("*.safetensors"))
    names = lhc_layers(load_network(result.files["lhc"]).model)
    assert names
    assert all("conv2" in name for name in names)  # the 3x3 ones
