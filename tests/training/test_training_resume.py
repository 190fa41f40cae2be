"""A run that was stopped or killed goes on bit for bit, and a damaged or foreign checkpoint is refused."""

import dataclasses
import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIG, SOURCE, assert_same_run, lines_of, one_thread, tiny_data

from lhc_triton.files import write_beside
from lhc_triton.models import weights
from lhc_triton.training import Data, EpochMetrics, ImageSet, epochs, finishing, train
from lhc_triton.training.checkpoints import CHECKPOINT_KIND, CHECKPOINT_VERSION, Checkpoint

# Everything that has a state of its own.
RICH = dataclasses.replace(
    CONFIG,
    accumulate=2,
    ema=0.9,
    label_smoothing=0.1,
    lr_schedule="plateau",
    plateau_patience=1,
    early_stop=2,
    penalty="macs",
    pattern_weight=0.1,
    mac_share=0.2,
    mac_budget=0.3,
    gradual=True,
    trim=True,
    shapes="rigid",
    dense_twin="none",
)


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped: (folder, result, metrics of its epochs)."""
    folder = tmp_path_factory.mktemp("whole")
    rows: list[EpochMetrics] = []
    result = train(CONFIG, folder, progress=False, data=tiny_data(), on_epoch=rows.append)
    return folder, result, rows


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """The same with all options."""
    folder = tmp_path_factory.mktemp("rich")
    train(RICH, folder, progress=False, data=tiny_data())
    return folder


class StopError(Exception):
    """Stands for a kill: nothing of the run goes on after it."""


def stop_after(epochs):
    seen: list[EpochMetrics] = []

    def stop(row: EpochMetrics) -> None:
        seen.append(row)
        if len(seen) == epochs:
            raise StopError

    return stop


# After the first and the last epoch of each stage, and within one.
@pytest.mark.parametrize("epochs", [1, 5, 6, 7, 8, 9, 10])
def test_a_run_stopped_after_any_epoch_goes_on_bit_for_bit(whole, tmp_path, epochs):
    with pytest.raises(StopError):
        train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=stop_after(epochs))
    torch.manual_seed(epochs)  # the global generator must not matter
    rows: list[EpochMetrics] = []
    train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert [(row.stage, row.epoch) for row in rows] == [(row.stage, row.epoch) for row in whole[2]][epochs:]
    assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize("epochs", [2, 7])
def test_a_resumed_run_lets_go_of_what_it_read_before_it_trains(tmp_path, epochs):
    with pytest.raises(StopError):
        train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=stop_after(epochs))
    held = []

    def count(row: EpochMetrics) -> None:
        held.append(sum(type(thing) is Checkpoint for thing in gc.get_objects()))

    train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=count)
    assert held
    assert set(held) == {0}


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_averages_accumulation_plateaus_and_costs_go_on_bit_for_bit_too(rich, tmp_path, epochs):
    with pytest.raises(StopError):
        train(RICH, tmp_path, progress=False, data=tiny_data(), on_epoch=stop_after(epochs))
    train(RICH, tmp_path, progress=False, data=tiny_data())
    assert_same_run(tmp_path, rich)


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


@pytest.mark.parametrize(("stage", "epoch"), [("coarse", 2), ("fine", 1)])
def test_an_epoch_done_again_after_a_kill_may_come_out_otherwise(tmp_path, monkeypatch, stage, epoch):
    """Killed between the best network's file and the last state, as on a device that does not repeat bits."""
    told = {("coarse", 1): 0.5, ("fine", 0): 0.5, (stage, epoch): 0.9}

    where: list[object] = []
    save, train_epoch = epochs.save_checkpoint, epochs.train_epoch

    def note(trainee, images, config, plan, *rest):
        where[:] = [plan.stage, plan.epoch]
        return train_epoch(trainee, images, config, plan, *rest)

    def stop(path, *rest, **named):
        if Path(path).name == epochs.LAST and where == [stage, epoch]:
            raise StopError
        save(path, *rest, **named)

    config = dataclasses.replace(CONFIG, dense_twin="none", density=None)
    monkeypatch.setattr(epochs, "train_epoch", note)
    monkeypatch.setattr(epochs, "accuracy", lambda *_: told.get(tuple(where), 0.1))
    monkeypatch.setattr(epochs, "save_checkpoint", stop)
    with pytest.raises(StopError):
        train(config, tmp_path, progress=False, data=tiny_data())
    assert (tmp_path / f"{stage}_best-{epoch}.safetensors").exists()
    monkeypatch.setattr(epochs, "save_checkpoint", save)
    told[stage, epoch] = 0.2
    result = train(config, tmp_path, progress=False, data=tiny_data())
    assert (result.coarse_epoch, result.fine_epoch, result.lhc_val_accuracy) == (1, 0, 0.5)
    left = sorted(path.name for path in tmp_path.glob("*_best*"))
    assert left == ["coarse_best-1.safetensors", "fine_best-0.safetensors"]


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[3:]
from tiny_runs import CONFIG, tiny_data
from lhc_triton.models import weights
from lhc_triton.training import train
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def between_epochs(row):
    if sys.argv[2] == "between" and (row.stage, row.epoch) == ("coarse", 1):
        kill()
steps, files = [], []
step, replace = torch.optim.SGD.step, os.replace
def in_an_epoch(self, *arguments):
    steps.append(step(self, *arguments))
    if sys.argv[2] == "within" and len(steps) == 33:  # the third of five steps of coarse epoch 1
        kill()
def in_a_write(source, target):
    files.append(str(target))
    if sys.argv[2] == "writing" and sum(name.endswith("last.safetensors") for name in files) == 7:
        kill()
    if sys.argv[2] == "logging" and sum(name.endswith("metrics.csv") for name in files) == 10:
        kill()
    replace(source, target)
torch.optim.SGD.step = in_an_epoch
weights.os.replace = in_a_write
train(CONFIG, sys.argv[1], progress=False, data=tiny_data(), on_epoch=between_epochs)
"""


@pytest.mark.parametrize(("when", "epochs"), [("between", 7), ("within", 6), ("writing", 6), ("logging", 9)])
def test_a_killed_process_goes_on_bit_for_bit(whole, tmp_path, when, epochs):
    command = [sys.executable, "-c", KILLED, str(tmp_path), when, str(SOURCE), str(Path(__file__).parent)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert lines_of(tmp_path) == lines_of(whole[0])[: 1 + epochs]
    train(CONFIG, tmp_path, progress=False, data=tiny_data())
    assert_same_run(tmp_path, whole[0])


def test_a_full_disk_gives_one_line_and_leaves_the_last_checkpoint(whole, tmp_path):
    """The system's limit on a file's size stands for the disk: the write fails with a part of it done."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row: EpochMetrics) -> None:
        if (row.stage, row.epoch) == ("coarse", 0):
            size = (tmp_path / "last.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    try:
        with pytest.raises(OSError, match=r"cannot be written \(File too large\).*make room") as caught:
            train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    train(CONFIG, tmp_path, progress=False, data=tiny_data())
    assert_same_run(tmp_path, whole[0])


def test_a_disk_that_is_full_at_the_end_gives_the_same_line(whole, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copytree(whole[0], tmp_path / "run")
    written = (tmp_path / "run" / "lhc.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"run: cannot be written \(No space left on device\).*make room"):
        train(CONFIG, tmp_path / "run", progress=False, data=tiny_data())
    with pytest.raises(OSError, match="No space") as caught:
        write_beside(tmp_path / "file", b"1")
    assert caught.value.filename == str(tmp_path / "file")
    monkeypatch.undo()
    assert (tmp_path / "run" / "lhc.safetensors").read_bytes() == written
    assert_same_run(tmp_path / "run", whole[0])


def test_images_that_cannot_be_read_at_the_end_are_no_full_disk(whole, tmp_path, monkeypatch):
    def lost(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "val/cat/1.jpg")

    monkeypatch.setattr(finishing, "write_and_test", lost)
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"val/cat/1\.jpg"):
        train(CONFIG, tmp_path / "run", progress=False, data=tiny_data())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_a_step_that_does_not_fit_into_memory_gives_one_line(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(epochs, "train_epoch", fail)
    config = dataclasses.replace(CONFIG, accumulate=4)
    with pytest.raises(
        MemoryError, match="steps of 20 images in parts of 5; raise accumulate or lower batch"
    ):
        train(config, tmp_path, progress=False, data=tiny_data())
    error.args = ("shapes do not fit",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            train(config, tmp_path, progress=False, data=tiny_data())


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    folder, result, _ = whole
    rows: list[EpochMetrics] = []
    again = train(CONFIG, folder, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert rows == []
    assert again == result


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


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"lr": 0.05}, {"density": 0.2}, {"coarse_epochs": 4}, {"ema": 0.9}]
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(copy, changes):
    before = (copy / "last.safetensors").read_bytes()
    changed = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=f"another run \\({next(iter(changes))} "):
        train(changed, copy, progress=False, data=tiny_data())
    assert (copy / "last.safetensors").read_bytes() == before


def test_a_run_from_before_some_settings_goes_on_as_one_without_them(whole, tmp_path):
    with pytest.raises(StopError):
        train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=stop_after(9))
    for path in tmp_path.glob("*.safetensors"):
        tensors, document = weights.read_tensors(path, CHECKPOINT_KIND, CHECKPOINT_VERSION)
        for part in (document["run"], document["schedule"] or {}):
            for name in ("start", "mac_budget", "gradual", "trim", "share"):
                part.pop(name, None)
        weights.write_tensors(path, tensors, document)
    with pytest.raises(ValueError, match=r"another run \(gradual False, now True\)"):
        train(dataclasses.replace(CONFIG, gradual=True), tmp_path, progress=False, data=tiny_data())
    train(CONFIG, tmp_path, progress=False, data=tiny_data())
    assert lines_of(tmp_path) == lines_of(whole[0])


def test_a_run_goes_on_in_the_precision_it_began_in(whole, copy):
    with pytest.raises(ValueError, match="was trained in fp32, now precision is bf16; choose another folder"):
        train(dataclasses.replace(CONFIG, precision="bf16"), copy, progress=False, data=tiny_data())
    automatic = dataclasses.replace(CONFIG, precision="auto")
    assert train(automatic, whole[0], progress=False, data=tiny_data()).precision == "fp32"


def test_a_run_that_a_bad_file_stopped_goes_on_without_it(tmp_path):
    with pytest.raises(StopError):
        train(CONFIG, tmp_path, progress=False, data=tiny_data(), on_epoch=stop_after(9))
    rows: list[EpochMetrics] = []
    skipping = dataclasses.replace(CONFIG, on_bad_file="skip")
    train(skipping, tmp_path, progress=False, data=tiny_data(), on_epoch=rows.append)
    assert len(rows) == 1


def test_a_checkpoint_of_other_images_is_refused(copy):
    data = tiny_data()
    other = ImageSet(data.train.images.flip(3), data.train.labels, data.format)
    with pytest.raises(ValueError, match=r"another run \(training images "):
        train(CONFIG, copy, progress=False, data=Data(data.name, data.format, other, None, data.test))


def test_results_are_no_checkpoint(whole, tmp_path):
    (tmp_path / "last.safetensors").write_bytes((whole[0] / "lhc.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds network weights, not training checkpoint"):
        train(CONFIG, tmp_path, progress=False, data=tiny_data())
