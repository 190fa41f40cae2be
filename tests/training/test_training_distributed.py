"""Two processes under torchrun: the numbers of one, the same bits after a kill, and one clear error."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_runs import CONFIG, SOURCE, assert_same_run, lines_of, one_thread, tiny_data

from lhc_triton.training import train
from lhc_triton.training.distributed import fresh_store

HEAD = """
import dataclasses, os, signal, sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
out, what, *paths = sys.argv[1:]
sys.path[:0] = paths
from tiny_runs import CONFIG, tiny_data
from lhc_triton.training import train
from lhc_triton.training.distributed import exchanging, joined
"""

RUN = """
rank, first = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
def on_epoch(row):
    if rank == "1" and first and (row.stage, row.epoch) == ("coarse", 1):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the second process has had enough")
try:
    train(CONFIG, out, progress=False, data=tiny_data(), on_epoch=on_epoch)
except (OSError, ValueError) as error:
    sys.exit(f"error of rank {rank}: {error}")
"""

# All that needs no process to end, in processes that the program itself has joined.
CHECKS = """
torch.distributed.init_process_group("gloo")

def network():
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 3)).to(memory_format=torch.channels_last)

def refused(reason, action, *arguments, **options):
    try:
        action(*arguments, **options)
    except ValueError as error:
        assert reason in str(error), error
    else:
        raise AssertionError("passed in spite of: " + reason)

torch.manual_seed(0)
images, labels = torch.randn(11, 2, 8, 8) + 3, torch.randint(3, (11,))
loss = nn.functional.cross_entropy
alone = network()
loss(alone(images), labels).backward()
with joined("cpu") as world:
    assert world.is_main == (world.rank == 0) and world.size == 2
    shared = network()
    world.synchronise_batch_norm(shared)
    parallel = world.parallel(shared)
    mine = world.share(torch.arange(11))
    assert len(mine) == (6, 5)[world.rank]
    with exchanging(parallel, last=True):
        (loss(parallel(images[mine]), labels[mine]) * len(mine) * world.size / 11).backward()
    for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    for one, other in zip(alone.buffers(), shared.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert list(alone.state_dict()) == list(shared.state_dict())
    torch.testing.assert_close(shared.eval()(images), alone.eval()(images))
    assert world.sum(torch.tensor([1, world.rank])).tolist() == [2, 1]
    assert world.mean(torch.tensor(float(world.rank))) == 0.5
    # A thread that still held a sum would abort a program that ends now.
    assert all(world.sum(torch.ones(100))._use_count() == 1 for _ in range(200))
    world.check_same("greeting", "hello")
    refused("rank 1 has another name than rank 0", world.check_same, "name", str(world.rank))
    world.check_shared(Path(out))
    elsewhere = Path(out, f"machine {world.rank}")
    elsewhere.mkdir()
    refused("rank 1 does not see", world.check_shared, elsewhere)
    assert not list(elsewhere.iterdir())
    other = network()
    with torch.no_grad():
        other[1].running_mean += world.rank
    world.average_batch_norm(other)
    assert other[1].running_mean.tolist() == [0.5] * 4

def run(name, **changes):
    train(dataclasses.replace(CONFIG, **changes), out + "/" + name, progress=False, data=tiny_data())

run("whole")
run("rich", accumulate=2, ema=0.9, dense_twin="none")
run("unsynchronised", sync_batchnorm=False)
refused("rank 1 has another run than rank 0", run, "seeds", seed=world.rank)
refused("no image for some of 2 processes", run, "parts", accumulate=20)
torch.distributed.destroy_process_group()
"""


def torchrun(script: str, folder: Path, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess:
    file = folder / "script.py"
    file.write_text(HEAD + script)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(SOURCE), str(Path(__file__).parent)]
    return subprocess.run(
        [sys.executable, *launch, f"--max-restarts={restarts}", str(file), *arguments, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(CONFIG, folder, progress=False, data=tiny_data())
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of the runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(CHECKS, folder, str(folder), "")
    assert done.returncode == 0, done.stderr
    return folder


def largest_difference(folder: Path, other: Path) -> float:
    """Of the losses and penalties in two runs, relative."""
    tables = [[line.split(",")[2:4] for line in lines_of(f)[1:]] for f in (folder, other)]
    ours, theirs = (torch.tensor([[float(x) for x in row] for row in table]) for table in tables)
    return float(((ours - theirs).abs() / ours.clamp_min(1)).max())


def test_two_processes_train_as_one_does_at_the_same_global_batch(alone, together):
    """Gradients, statistics, sums and refusals were compared by the processes themselves."""
    assert largest_difference(alone, together / "whole") < 1e-3
    # Density, MACs, patterns, correlation: the topology is the same.
    assert (alone / "layers.csv").read_text() == (together / "whole" / "layers.csv").read_text()
    assert not list((together / "seeds").glob("*.safetensors"))


def test_parts_and_averages_are_those_of_one_process_too(together, tmp_path):
    config = dataclasses.replace(CONFIG, accumulate=2, ema=0.9, dense_twin="none")
    train(config, tmp_path, progress=False, data=tiny_data())
    assert largest_difference(tmp_path, together / "rich") < 1e-3
    assert (tmp_path / "layers.csv").read_text() == (together / "rich" / "layers.csv").read_text()


def test_without_synchronised_statistics_two_processes_train_differently(alone, together):
    assert largest_difference(alone, together / "unsynchronised") > 1e-2


def test_a_killed_process_ends_all_and_the_restarted_ones_go_on_bit_for_bit(together, tmp_path):
    done = torchrun(RUN, tmp_path, str(tmp_path / "run"), "kill", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr
    assert_same_run(tmp_path / "run", together / "whole")


def test_processes_meet_in_a_store_that_earlier_ones_have_left_their_marks_in():
    store = dist.HashStore()
    for attempt in range(3):
        with ThreadPoolExecutor(3) as pool:
            if attempt == 2:  # one that began and was lost
                store.set("lhc/asks/1", "0123456789abcdef")
            parts = list(pool.map(lambda rank: fresh_store(store, rank, 3), [2, 1, 0]))
        assert not parts[0].check(["address"])
        parts[0].set("address", f"of attempt {attempt}")
        assert {part.get("address") for part in parts} == {f"of attempt {attempt}".encode()}


def test_an_error_of_one_process_ends_all_and_one_process_can_go_on(alone, tmp_path):
    done = torchrun(RUN, tmp_path, str(tmp_path / "run"), "fail")
    assert done.returncode == 1
    assert done.stderr.count("error of rank 1: the second process has had enough") == 1
    assert "error of rank 0" not in done.stderr or "rank 0 of 2 lost another process" in done.stderr
    assert len(lines_of(tmp_path / "run")) >= 1 + 7
    train(CONFIG, tmp_path / "run", progress=False, data=tiny_data())
    assert largest_difference(alone, tmp_path / "run") < 1e-3


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_a_damaged_environment_is_named(monkeypatch, tmp_path, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is '{value}'"):
        train(CONFIG, tmp_path, progress=False, data=tiny_data())


def test_one_named_device_cannot_serve_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one device for several processes; give cuda"):
        train(dataclasses.replace(CONFIG, device="cuda:0"), tmp_path, progress=False, data=tiny_data())
