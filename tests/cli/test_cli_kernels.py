"""`doctor --kernels`: what it asks of the compiler, and what it prints; the compiles are tested elsewhere."""

import json

import pytest

import lhc_kernels.table

ROW = {
    "kernel": "some_fwd_kernel",
    "layer": "3x3 of 16-filter tiles",
    "dtype": "float16",
    "config": {
        "block_m": 128, "block_n": 16, "block_k": 32, "num_warps": 4, "num_stages": 4, "entries": 2,
        "precision": "ieee", "variant": "split", "splits": 4,
    },
    "target": "sm_90",
    "registers": 72,
    "stack_bytes": 0,
    "shared_bytes": 73728,
    "wgmma": True,
    "async_copy": False,
}  # fmt: skip


@pytest.fixture
def kernels(monkeypatch, run):
    """Run the command with a compiler that always gives one row; return what it did and its request."""
    asked = []

    def table(targets, limit, progress):
        asked.append((tuple(targets), limit))
        progress(1, 1)
        return [ROW]

    monkeypatch.setattr(lhc_kernels.table, "kernel_table", table)
    monkeypatch.setattr("lhc_kernels.launch.INTERPRETED", False)

    def call(*arguments):
        return run("doctor", "--kernels", *arguments), asked

    return call


def test_json_holds_the_rows_and_nothing_else(kernels):
    done, asked = kernels("--json", "--target", "sm_90", "--target", "sm_80", "--configs", "3")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"kernels": [ROW]}
    assert asked == [(("sm_90", "sm_80"), 3)]


def test_the_table_names_config_and_resources(kernels):
    done, asked = kernels()
    assert done.returncode == 0
    assert asked == [(("sm_80", "sm_89", "sm_90", "sm_100", "gfx942"), 1)]
    for part in ("some_fwd_kernel", "128x16x64", "split", "72", "73728", "sm_90"):
        assert part in done.stdout


def test_interpreted_kernels_and_senseless_counts_are_refused(kernels, monkeypatch):
    done, asked = kernels("--configs", "0")
    assert (done.returncode, asked) == (2, [])
    assert "configs is 0" in done.stderr
    monkeypatch.setattr("lhc_kernels.launch.INTERPRETED", True)
    done, asked = kernels()
    assert (done.returncode, asked) == (2, [])
    assert "TRITON_INTERPRET" in done.stderr
