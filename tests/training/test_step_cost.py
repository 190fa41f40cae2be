"""The script that times a step of learning against the dense twin's."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "ablations" / "step_cost.py"


def test_steps_of_all_three_networks_are_timed_and_kept(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "cost.json"), "--width=0.0625", "--batch=4",
         "--rounds=2", "--precision=bf16"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found = json.loads((tmp_path / "cost.json").read_text())
    assert (found["env"]["precision"], found["env"]["batch"], found["env"]["rounds"]) == ("bf16", 4, 2)
    assert [row["network"] for row in found["rows"]] == ["dense", "learning", "frozen"]
    for row in found["rows"]:
        assert len(row["samples_ms"]) == 2
        assert min(row["samples_ms"]) <= row["step_ms"] <= max(row["samples_ms"])
        assert row["of_dense"] == row["step_ms"] / found["rows"][0]["step_ms"]
