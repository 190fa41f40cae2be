"""The script of the first minutes on a GPU, dry: tiny shapes, on the CPU, in Triton's interpreter."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from lhc_bench.measure import gpu_counters, setting, suites
from lhc_bench.measure.cases import LayerCase
from lhc_bench.measure.networks import NetworkCase
from lhc_bench.measure.rows import read_results
from lhc_bench.reports import gpu_first
from lhc_kernels import INTERPRETED
from lhc_triton.runtime.choosing.timing_store import TimingStore

ROOT = Path(__file__).resolve().parents[3]

interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="runs Triton's kernels on the CPU, for TRITON_INTERPRET=1"),
]
DETAILS = """==PROF== Connected to process 7
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","grouped_conv2d_fwd_kernel","GPU Speed Of Light Throughput","L2 Cache Throughput","%","81.20"
"0","grouped_conv2d_fwd_kernel","GPU Speed Of Light Throughput","Duration","us","93.41"
"0","grouped_conv2d_fwd_kernel","Occupancy","","",""
"""


@pytest.fixture(autouse=True)
def left_as_it_is(monkeypatch):
    """The script sets the folder of records and the working directory for its own process."""
    monkeypatch.setenv("LHC_TRITON_CACHE", os.environ["LHC_TRITON_CACHE"])
    monkeypatch.chdir(ROOT)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(setting.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(setting.COPY_BYTES, "cpu", 1 << 16)
    case = LayerCase("tiny-imagenet", "conv", 32, 32, 4, 4)
    changes = {"device": "cpu", "backends": ("triton shared", "triton"), "densities": (0.5,)}
    layers = {"cases": lambda: (case,), "blocks": ((32, 16), (32, 32)), **changes}
    networks = {
        "cases": lambda: (NetworkCase("vgg16", "cifar", 1),),
        "densities": (0.1,),
        "blocks": ((32, 16),),
    }
    networks |= {"device": "cpu", "backends": ("torch", "auto"), "dtype": torch.float32}
    for name, change in ((gpu_first.LAYERS, layers), (gpu_first.NETWORKS, networks)):
        monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(suites.SUITES[name], **change))


def run(out, *parts, code=0):
    assert gpu_first.main([*parts, "--dry-run", "--out", str(out)]) == code
    return {part: (out / f"{part}.txt").read_text() for part in parts}


class TestLayers:
    pytestmark = interpreted

    def test_layers_are_measured_tuned_and_measured_again(self, tiny, tmp_path):
        said = run(tmp_path, "layers")["layers"]
        folder = tmp_path / "layers"
        for name in ("default", "tuned"):
            rows = read_results(folder / name / "results.json").rows
            assert {(row.backend, row.out_block) for row in rows} == {
                (backend, block) for backend in ("triton shared", "triton") for block in (16, 32)
            }
            assert all(row.dtype == "float16" and row.rel_err <= 2e-3 for row in rows)
            assert (folder / name / "layers.png").exists()
        records = TimingStore(folder / "timings.json").read()
        report = json.loads((folder / "tuning-tuned.json").read_text())
        assert {row["key"] for row in report["rows"]} == set(records)
        assert report["jobs_left"] == 0
        assert json.loads((folder / "environment.json").read_text())["doctor"]
        assert "tiny-imagenet/conv" in said
        assert "no picture" not in said


def test_networks_are_measured_whole(tiny, tmp_path):
    said = run(tmp_path, "networks")["networks"]
    assert {row.backend for row in read_results(tmp_path / "networks" / "results.json").rows} == {
        "torch",
        "auto",
    }
    assert "vgg16-cifar/all" in said


def test_the_tests_of_a_gpu_are_run_by_a_process_of_their_own(tmp_path):
    said = run(tmp_path, "tests")["tests"]
    assert "pytest: exit code 0" in said
    assert (tmp_path / "tests" / "tests.xml").exists()


def fake_ncu(folder, body):
    path = folder / "ncu"
    path.write_text(f"#!{sys.executable}\nimport subprocess, sys\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class TestCounters:
    pytestmark = interpreted

    def test_counters_are_read_of_a_program_that_launches_the_kernel(self, tmp_path, monkeypatch):
        body = (
            "at = sys.argv.index('--log-file') + 1\n"
            "program = sys.argv[sys.argv.index(sys.executable):]\n"
            "subprocess.run(program, check=True)\n"
            f"open(sys.argv[at], 'w').write({DETAILS!r})\n"
        )
        fake_ncu(tmp_path, body)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        said = run(tmp_path, "counters")["counters"]
        found = json.loads((tmp_path / "counters" / "counters.json").read_text())
        assert found == {"tiles of 16": {"L2 Cache Throughput": "81.20 %", "Duration": "93.41 us"}}
        assert "tiles of 16: Duration 93.41 us" in said


def test_without_ncu_there_are_no_counters(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ncu is not on the PATH" in run(tmp_path, "counters")["counters"]


def test_an_ncu_that_fails_is_quoted(tmp_path, monkeypatch):
    fake_ncu(tmp_path, "sys.exit('==ERROR== ERR_NVGPUCTRPERM')\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "ERR_NVGPUCTRPERM" in run(tmp_path, "counters")["counters"]
    assert gpu_counters.counters("==ERROR== nothing") == {}


def test_a_part_that_fails_leaves_the_others_and_its_files(tmp_path, monkeypatch):
    def fails(out, dry):
        (out / "half.json").write_text("{}")
        raise RuntimeError("the GPU is lost")

    monkeypatch.setitem(gpu_first.PARTS, "layers", fails)
    monkeypatch.setitem(gpu_first.PARTS, "networks", lambda out, dry: ["fine"])
    arguments = ["layers", "networks", "--dry-run", "--archive", "--out", str(tmp_path)]
    assert gpu_first.main(arguments) == 1
    assert "FAILED: RuntimeError: the GPU is lost" in (tmp_path / "layers.txt").read_text()
    with tarfile.open(tmp_path / "layers.tar.gz") as packed:
        assert {"layers/half.json", "layers/environment.json"} <= set(packed.getnames())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "records") == [
        "layers.tar.gz", "layers.txt", "networks.tar.gz", "networks.txt",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "torch sees no CUDA GPU"), (("layer", "--dry-run"), "part 'layer' is not known")],
)
def test_the_script_itself_starts_from_a_bare_checkout(arguments, said):
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["PYTHON"] = sys.executable
    done = subprocess.run(
        [ROOT / "bench" / "gpu_first.sh", *arguments], capture_output=True, text=True, env=environ, cwd="/"
    )
    assert done.returncode == 2
    assert said in done.stderr
