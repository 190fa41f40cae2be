import sys
from dataclasses import dataclass

import pytest


@pytest.fixture(scope="session", autouse=True)
def native_kernel(request):
    """Build the native kernel where it is kept for good, before a test has a cache folder of its own."""
    if request.config.getoption("markexpr") == "gpu":
        return None  # none of them needs it, and a GPU's minutes may be few
    from lhc_kernels.cpu import problem

    return problem()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, native_kernel):
    """Keep the user's measured times out of the tests, and the tests' out of the user's."""
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line as its entry point would, in an empty folder."""
    from lhc_triton.cli import main

    def call(*arguments: object) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["lhc-triton", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return Done(stopped.value.code or 0, out.out, out.err)

    return call
