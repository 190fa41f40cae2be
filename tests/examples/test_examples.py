"""The example scripts run as they stand, on fewer images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lhc_triton as lhc

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FEW = ("--images", "512", "--test-images", "256", "--epochs", "1")


@pytest.mark.parametrize(
    ("script", "arguments", "artefact", "said"),
    [
        ("pruned_elsewhere.py", (), "pruned.safetensors", "largest difference from the pruned model"),
        ("pretrained.py", FEW, "pretrained.safetensors", "kept 0.2"),
        ("from_scratch.py", FEW, "from_scratch.safetensors", "of the test images"),
    ],
)
def test_an_example_runs_and_leaves_an_artefact(tmp_path, script, arguments, artefact, said):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert lhc.load(tmp_path / artefact).report()["totals"]["rel_err"] < 1e-4


def test_every_example_is_tried():
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"images.py"}
    assert scripts == {"pruned_elsewhere.py", "pretrained.py", "from_scratch.py"}
