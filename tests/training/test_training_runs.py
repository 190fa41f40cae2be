"""Whole runs on tiny data: what they leave behind, and that a killed one goes on bit for bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lhc_triton.conversion import lhc_layers
from lhc_triton.models import load_network, small_vgg, weights
from lhc_triton.training import EpochMetrics, FashionMNIST, ImageSet, TrainConfig, train
from lhc_triton.training.data.fashion import FORMAT
from lhc_triton.training.recipe import make_optimiser
from lhc_triton.training.stage import train_epoch

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
STATE = ("last", "dense_best", "coarse_best", "fine_best", "dense", "lhc")
SOURCE = Path(__file__).resolve().parents[2]


def tiny_data(count: int = 140) -> FashionMNIST:
    """Classes that differ by the period and direction of stripes; 40 test images beside ``count`` others."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 60, (count + 40, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count + 40) % 10
    for image, label in zip(pixels, labels.tolist(), strict=True):
        stripes = image[0] if label < 5 else image[0].t()
        stripes[:: label % 5 + 2] += 150
    images = ImageSet(pixels, labels, FORMAT)
    return FashionMNIST(images.subset(torch.arange(count)), images.subset(torch.arange(count, count + 40)))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped: (folder, result, metrics of its epochs)."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[EpochMetrics] = []
    result = train(CONFIG, folder, progress=False, data=tiny_data(), on_epoch=rows.append)
    torch.set_num_threads(threads)
    return folder, result, rows


def assert_same_run(folder: Path, other: Path) -> None:
    for name in STATE:
        ours, theirs = load_file(folder / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"
    metrics = [(f / "metrics.csv").read_text().splitlines() for f in (folder, other)]
    # The last column is the wall time.
    assert [line.rsplit(",", 1)[0] for line in metrics[0]] == [line.rsplit(",", 1)[0] for line in metrics[1]]
    results = [json.loads((f / "result.json").read_text()) for f in (folder, other)]
    for result in results:
        del result["seconds"], result["files"]
    assert results[0] == results[1]


class StopError(Exception):
    """Stands for a kill: nothing of the run goes on after it."""


@pytest.mark.parametrize("epochs", range(1, 11))
def test_a_run_stopped_after_any_epoch_goes_on_bit_for_bit(whole, tmp_path, epochs):
    seen = 0

    def stop(row: EpochMetrics) -> None:
        nonlocal seen
        seen += 1
        if seen == epochs:
            raise StopError

    with pytest.raises(StopError):
        train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=stop)
    torch.manual_seed(epochs)  # the global generator must not matter
    rows: list[EpochMetrics] = []
    train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert [(row.stage, row.epoch) for row in rows] == [(row.stage, row.epoch) for row in whole[2]][epochs:]
    assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize("write", [1, 2, 8, 13])
def test_a_run_stopped_while_a_checkpoint_is_written_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, write):
    """The write-and-rename is cut before the rename, once in a while of each kind."""
    seen = 0
    replace = os.replace

    def stop(source: str, target: str) -> None:
        nonlocal seen
        seen += str(target).endswith(".safetensors")
        if seen == write:
            raise StopError
        replace(source, target)

    monkeypatch.setattr(weights.os, "replace", stop)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path, progress=False, data=tiny_data())
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    train(CONFIG, tmp_path, progress=False, data=tiny_data())
    assert_same_run(tmp_path, whole[0])


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2:]
from test_training_runs import CONFIG, tiny_data
from lhc_triton.training import train
def kill(row):
    if (row.stage, row.epoch) == ("coarse", 1):
        os.kill(os.getpid(), signal.SIGKILL)
train(CONFIG, sys.argv[1], progress=False, data=tiny_data(), on_epoch=kill)
"""


def test_a_killed_process_goes_on_bit_for_bit(whole, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(SOURCE), str(Path(__file__).parent)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(CONFIG, tmp_path, progress=False, data=tiny_data())
    assert_same_run(tmp_path, whole[0])


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    folder, result, _ = whole
    rows: list[EpochMetrics] = []
    again = train(CONFIG, folder, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert rows == []
    assert again == result


def test_the_result_tells_what_the_files_hold(whole):
    folder, result, rows = whole
    assert json.loads((folder / "result.json").read_text()) == result.to_dict()
    assert TrainConfig.from_dict(json.loads((folder / "config.json").read_text())) == CONFIG
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + len(rows) == 11
    saved = load_network(result.files["lhc"])
    model, notes = saved.model, saved.training
    layers = lhc_layers(model)
    live = sum(int(layer.masked_weight().count_nonzero()) for layer in layers.values())
    assert live / sum(layer.weight.numel() for layer in layers.values()) == pytest.approx(result.density)
    assert result.weight_reduction == pytest.approx(1 / result.density)
    assert result.mac_reduction == pytest.approx(1 / result.mac_density)
    assert notes["test_accuracy"] == result.lhc_accuracy
    assert TrainConfig.from_dict(notes["config"]) == CONFIG
    assert not lhc_layers(load_network(result.files["dense"]).model)


def test_stages_follow_the_method(whole):
    _, result, rows = whole
    by_stage = {name: [row for row in rows if row.stage == name] for name in ("dense", "coarse", "fine")}
    assert {name: len(found) for name, found in by_stage.items()} == {"dense": 5, "coarse": 3, "fine": 2}
    assert [row.warming_up for row in by_stage["coarse"]] == [True, False, False]
    assert [row.ramp for row in by_stage["coarse"]] == [0.0, 4.0, 4.0]
    assert by_stage["coarse"][0].penalty == 0
    assert by_stage["coarse"][2].density < by_stage["coarse"][0].density
    # The twins start from the same weights, on the same batches; the first epoch of the warm-up is dense.
    assert by_stage["coarse"][0].task_loss == pytest.approx(by_stage["dense"][0].task_loss, rel=0.05)
    chosen = by_stage["coarse"][result.coarse_epoch]
    assert not chosen.warming_up
    assert {row.density for row in by_stage["fine"]} == {chosen.density}
    assert result.lhc_val_accuracy == max(row.val_accuracy for row in by_stage["fine"])


def test_training_learns_to_tell_the_classes_apart(tmp_path):
    data = tiny_data(440)
    config = dataclasses.replace(CONFIG, augmentation="none", coarse_epochs=6, fine_epochs=3)
    result = train(config, tmp_path, progress=False, data=data)
    assert result.dense_accuracy > 0.9
    assert result.lhc_accuracy > 0.7
    assert abs(result.density - 0.3) < 0.05


@pytest.fixture
def copy(whole, tmp_path):
    """A folder with the run's last checkpoint."""
    (tmp_path / "last.safetensors").write_bytes((whole[0] / "last.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_gives_one_line_that_names_it(copy, keep):
    last = copy / "last.safetensors"
    content = last.read_bytes()
    last.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"last\.safetensors") as caught:
        train(CONFIG, copy, progress=False, data=tiny_data())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"lr": 0.05}, {"density": 0.2}, {"coarse_epochs": 4}])
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(copy, changes):
    before = (copy / "last.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"another run \\({next(iter(changes))} "):
        train(dataclasses.replace(CONFIG, **changes), copy, progress=False, data=tiny_data())
    assert (copy / "last.safetensors").read_bytes() == before


def test_a_checkpoint_of_other_images_is_refused(copy):
    data = tiny_data()
    other = ImageSet(data.train.images.flip(3), data.train.labels, FORMAT)
    with pytest.raises(ValueError, match=r"another run \(data "):
        train(CONFIG, copy, progress=False, data=FashionMNIST(other, data.test))


def test_results_are_no_checkpoint(whole, tmp_path):
    (tmp_path / "last.safetensors").write_bytes((whole[0] / "lhc.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds network weights, not training checkpoint"):
        train(CONFIG, tmp_path, progress=False, data=tiny_data())


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give a folder"):
        train(CONFIG, tmp_path / "file", progress=False, data=tiny_data())
    with pytest.raises(OSError, match="file"):
        train(CONFIG, tmp_path / "file" / "below", progress=False, data=tiny_data())


def test_wrong_data_leave_no_checkpoint(tmp_path):
    config = dataclasses.replace(CONFIG, data_folder=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="which has 14"):
        train(dataclasses.replace(CONFIG, validation_images=150), tmp_path, progress=False, data=tiny_data())
    with pytest.raises(ValueError, match="no batch"):
        train(dataclasses.replace(CONFIG, batch_size=101), tmp_path, progress=False, data=tiny_data())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match=device):
        train(dataclasses.replace(CONFIG, device=device), tmp_path, progress=False, data=tiny_data())


def test_a_loss_that_is_not_finite_stops_the_run():
    model = small_vgg((4, 4))
    torch.nn.init.constant_(model.classifier.weight, float("inf"))
    images = tiny_data().train
    with pytest.raises(RuntimeError, match=r"lower lr 0\.1"):
        train_epoch(
            model, make_optimiser(model, CONFIG), None, images, CONFIG, "dense", 0, "fp32", lambda loss: None
        )


def test_an_aim_that_no_epoch_reaches_takes_the_nearest_density_and_says_so(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, density=0.01)
    result = train(config, tmp_path, data=tiny_data())
    assert not result.density_reached
    said = capsys.readouterr().err
    assert "no epoch came within 0.01 of the density 0.01; took the nearest" in said
    assert "warming up" in said
    assert "fine     2/2" in said


def test_without_a_target_there_is_no_penalty(tmp_path):
    rows: list[EpochMetrics] = []
    config = dataclasses.replace(CONFIG, density=None, shapes="rigid", augmentation="none", precision="bf16")
    result = train(config, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert {row.penalty for row in rows} == {0.0}
    assert result.density_reached
    assert result.precision == "bf16"
