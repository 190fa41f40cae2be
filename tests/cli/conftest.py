import sys
from dataclasses import dataclass

import pytest

from lhc_triton.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line as its entry point would, in an empty folder."""

    def call(*arguments: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["lhc-triton", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return Done(stopped.value.code or 0, out.out, out.err)

    return call
