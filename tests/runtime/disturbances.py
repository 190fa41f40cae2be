"""Processes that are crowded, forked and killed while they build, tune, save, train and call.

Each case is drawn from its seed and runs in a process of its own, with a time limit. What survives has to be
whole: the old file or the new one, a cache that works, a run that goes on to the same bits, an answer.
"""

from __future__ import annotations

import copy
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from runtime_networks import image, vgg

import lhc_triton as lhc
from lhc_kernels.cpu.building import DIGEST, LIBRARY, build
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.op.dense import DenseConv2d
from lhc_triton.training import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from tiny_runs import CONFIG, assert_same_run, tiny_data  # isort: skip

Case = Callable[[random.Random, Path], None]

# A compiler that takes its time: what -o names is half there for a while.
COMPILER = """#!/bin/sh
for last; do [ "$previous" = -o ] && output=$last; previous=$last; done
if [ -z "$output" ]; then echo "#define __VERSION__ 1"; exit; fi
echo half > "$output"; sleep 0.0{tenths}
echo whole >> "$output"
"""


def start(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; it ends with 0, or with 1 and a traceback."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def code_of(child: int) -> int:
    """Wait for a child's end, and return its exit code, or the number of what killed it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def disturb(draw: random.Random, children: list[int], within: float) -> None:
    """Kill some of the children at moments within so many seconds; the others have to end well."""
    doomed = [child for child in children if draw.random() < 0.6]
    started = time.monotonic()
    for moment, child in sorted((draw.uniform(0, within), child) for child in doomed):
        time.sleep(max(0.0, started + moment - time.monotonic()))
        os.kill(child, signal.SIGKILL)  # it waits to be reaped if it has ended
    for child in children:
        code = code_of(child)
        assert code == 0 or (code == -signal.SIGKILL and child in doomed), f"a child ended with {code}"


def building(draw: random.Random, folder: Path) -> None:
    """Builders of one library are killed, their compilers live on, libraries are cut short."""
    compiler = folder / "compiler"
    compiler.write_text(COMPILER.format(tenths=draw.randrange(1, 9)))
    compiler.chmod(0o755)
    os.environ.update(CXX=str(compiler), LHC_TRITON_CACHE=str(folder / "cache"))

    def work() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is damaged; it is built again", RuntimeWarning)
            assert build().read_text() == "half\nwhole\n"

    for _ in range(draw.randrange(2, 6)):
        disturb(draw, [start(work) for _ in range(draw.randrange(1, 4))], within=0.4)
        for name in (LIBRARY, DIGEST):
            if draw.random() < 0.3:
                for path in folder.glob(f"cache/native/*/{name}"):
                    os.truncate(path, draw.randrange(8))
    work()
    assert not list(folder.glob("cache/native/*/*.tmp"))


def tuning(draw: random.Random, folder: Path) -> None:
    """Writers of one timing store are killed: what one of them has put stays."""
    path = folder / "timings.json"

    def work(writer: str, log: Path) -> None:
        store = TimingStore(path)
        with log.open("a") as done:
            for number in range(20):
                store.put(writer, {f"backend {number}": 1.0 + number})
                done.write(f"{number}\n")
                done.flush()

    logs = {}
    for turn in range(draw.randrange(1, 4)):
        children = []
        for number in range(draw.randrange(2, 5)):
            writer = f"{turn}.{number}"
            logs[writer] = folder / writer
            children.append(start(lambda writer=writer: work(writer, logs[writer])))  # type: ignore[misc]
        disturb(draw, children, within=0.5)
    store = TimingStore(path)
    store.put("last", {"backend": 1.0})
    found = store.read_checked()
    for writer, log in logs.items():
        for number in log.read_text().split() if log.exists() else []:
            assert found[writer][f"backend {number}"] == 1.0 + int(number), writer
    assert not list(folder.glob(".*.tmp"))


def saving(draw: random.Random, folder: Path) -> None:
    """Savers of two networks under one name are killed, while another process loads all the time."""
    path, x = folder / "net.safetensors", image(size=16)
    networks = [lhc.accelerate(vgg(), x, backend=backend, tune="off") for backend in ("dense", "torch")]
    outputs = [network(x) for network in networks]

    def work(network: lhc.runtime.network.accelerated.AcceleratedModel) -> None:
        for _ in range(5):
            lhc.save(network, path)

    def read(times: int = 8) -> None:
        for _ in range(times):
            found = lhc.load(path)(x)
            assert any(torch.equal(found, output) for output in outputs)

    lhc.save(networks[0], path)
    for _ in range(draw.randrange(1, 4)):
        children = [start(lambda: work(draw.choice(networks))) for _ in range(draw.randrange(1, 4))]
        reader = start(read)
        disturb(draw, children, within=0.6)
        assert code_of(reader) == 0
    read(1)
    lhc.save(networks[1], path)
    assert [file.name for file in folder.iterdir()] == [path.name]


def training(draw: random.Random, folder: Path) -> None:
    """A run is killed at a few moments, and goes on to the bits of one that was not."""

    def work(name: str) -> None:
        torch.set_num_threads(1)
        train(CONFIG, folder / name, progress=False, data=tiny_data())

    began = time.monotonic()
    assert code_of(start(lambda: work("whole"))) == 0
    seconds = time.monotonic() - began
    for _ in range(draw.randrange(1, 4)):
        child = start(lambda: work("killed"))
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        assert code_of(child) in (0, -signal.SIGKILL)
    assert code_of(start(lambda: work("killed"))) == 0
    assert_same_run(folder / "whole", folder / "killed")


def calling(draw: random.Random, folder: Path) -> None:
    """Threads call, copy and save one network and write its weights; forked children answer meanwhile."""
    backend = draw.choice(("auto", "dense", "torch"))
    fast = lhc.accelerate(vgg(), image(size=16), backend=backend, tune="off")
    inputs = [image(size=size, batch=batch) for size, batch in ((16, 1), (16, 2), (24, 1))]
    expected = [fast(x) for x in inputs]
    dense = [layer for layer in fast.modules() if isinstance(layer, DenseConv2d)]
    end = time.monotonic() + draw.uniform(0.5, 1.5)

    def answer() -> None:
        for x, output in zip(inputs, expected, strict=True):
            assert torch.equal(fast(x), output)

    def work(seed: int) -> None:
        mine = random.Random(seed)
        while time.monotonic() < end:
            match mine.randrange(12):
                case 0:
                    copy.deepcopy(fast)(inputs[0])
                case 1:
                    lhc.save(fast, folder / f"{mine.randrange(2)}.safetensors")
                case 2 if dense:
                    mine.choice(dense).weight.mul_(1)
                case _:
                    answer()

    with ThreadPoolExecutor(3) as pool:
        threads = [pool.submit(work, draw.randrange(2**32)) for _ in range(3)]
        while time.monotonic() < end:
            time.sleep(draw.uniform(0, 0.1))
            assert code_of(start(answer)) == 0
        for thread in threads:
            thread.result()
    answer()


CASES: dict[str, tuple[Case, float]] = {
    "build": (building, 60.0),
    "tune": (tuning, 60.0),
    "save": (saving, 60.0),
    "train": (training, 120.0),
    "call": (calling, 60.0),
}
"""What is disturbed: the case, and the seconds after which it counts as hung."""


def try_case(kind: str, seed: int) -> str:
    """Run one case in a process of its own; return what went wrong, "" for nothing."""
    case, limit = CASES[kind]
    folder = Path(tempfile.mkdtemp())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()  # so that a case that hangs ends with all that it started
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)  # whatever it was: a test's own, for example
        os.environ["LHC_TRITON_CACHE"] = os.environ.get("LHC_TRITON_CACHE", str(folder / "cache"))
        warnings.simplefilter("error")
        (folder / "case").mkdir()
        try:
            case(random.Random(seed), folder / "case")
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    os.close(writer)
    try:
        return _outcome(child, reader, time.monotonic() + limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _outcome(child: int, reader: int, deadline: float) -> str:
    """Read what a case says until it has ended, or the deadline has come."""
    said = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while ready := select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = pipe.read(2**16)
            said += part
            if not part:
                break
    if not ready:
        os.killpg(child, signal.SIGKILL)
    code = code_of(child)
    text = said.decode(errors="replace").strip()
    if not ready:
        return f"it hung\n{text}"
    return "" if code == 0 and "Traceback" not in text else text or f"it ended with {code}"
