"""Building the native kernel: once, by one process at a time, whole or not at all, with clear complaints."""

import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lhc_kernels.cpu import building
from lhc_kernels.cpu.building import BuildError, build

# Stands in for a compiler: notes each library it links, takes its time over it, and writes what -o names.
COMPILER = """#!/bin/sh
for last; do [ "$previous" = -o ] && output=$last; previous=$last; done
if [ -z "$output" ]; then echo "#define __VERSION__ $VERSION"; exit; fi
case "$output" in *.o) exit;; esac
echo start >> {log}
echo half > "$output"; sleep {seconds}
echo whole >> "$output"
"""

FAILING = """#!/bin/sh
[ "$1" = -std=c++20 ] || exit 0
echo noise >&2
echo "x.h:1: error: odd" >&2
exit 1
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Call it to install a stand-in compiler that takes so many seconds; its log counts the compilations."""
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LHC_TRITON_NATIVE_FLAGS", raising=False)

    def install(seconds=0.0, text=COMPILER):
        path = tmp_path / "compiler"
        path.write_text(text.format(log=install.log, seconds=seconds))
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    install.log = tmp_path / "log"
    return install


def compilations(compiler) -> int:
    return len(compiler.log.read_text().splitlines()) if compiler.log.exists() else 0


def test_a_machine_builds_once(compiler):
    compiler()
    library = build()
    assert library.read_text() == "half\nwhole\n"
    assert build() == library
    assert compilations(compiler) == 1


def test_another_compiler_or_cpu_gets_its_own_library(compiler, monkeypatch):
    compiler()
    first = build()
    monkeypatch.setenv("VERSION", "13")
    second = build()
    monkeypatch.setenv("LHC_TRITON_NATIVE_FLAGS", "-mavx2 -mfma")
    assert len({first, second, build()}) == 3


def test_another_source_gets_its_own_library(compiler, monkeypatch, tmp_path):
    compiler()
    first = build()
    for path in building.SOURCES.glob("*.[ch]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(building, "SOURCES", tmp_path)
    assert build() == first
    with open(tmp_path / "conv.cpp", "a") as file:
        file.write("\n")
    assert build() != first


def test_builders_at_once_compile_once_and_see_the_whole_library(compiler):
    compiler(seconds=0.3)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(build().read_text())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["half\nwhole\n"] * 4
    assert compilations(compiler) == 1


def test_a_killed_build_blocks_nobody_and_is_cleared_away(compiler):
    compiler(seconds=60)
    command = [sys.executable, "-c", "from lhc_kernels.cpu import build; build()"]
    environment = {**os.environ, "PYTHONPATH": str(building.SOURCES.parent.parent)}
    other = subprocess.Popen(command, env=environment, start_new_session=True)
    while not compilations(compiler):
        assert other.poll() is None
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.3)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    (folder,) = (Path(os.environ["LHC_TRITON_CACHE"]) / "native").iterdir()
    assert list(folder.glob("*.tmp"))
    assert not (folder / building.LIBRARY).exists()

    # The same compiler, to the digest, that is quick this time.
    compiler(seconds=0)
    assert build().read_text() == "half\nwhole\n"
    assert not list(folder.glob("*.tmp"))


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler .* is on the PATH; install one, or set CXX$"):
        build()
    monkeypatch.setenv("CXX", "nosuch++ -O2")
    with pytest.raises(BuildError, match=r"^CXX names the compiler 'nosuch\+\+', which is not on the PATH"):
        build()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(compiler):
    compiler(text=FAILING)
    with pytest.raises(BuildError, match=r"cannot build the native kernel: x\.h:1: error: odd$") as caught:
        build()
    assert "\n" not in str(caught.value)
    (folder,) = (Path(os.environ["LHC_TRITON_CACHE"]) / "native").iterdir()
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_cache_folder_that_cannot_be_written_is_named(compiler, tmp_path, monkeypatch):
    compiler()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"file/native.* cannot be used .*; set LHC_TRITON_CACHE"):
        build()


UNWRITABLE = """
import os, sys, warnings
import torch
from lhc_kernels.cpu import problem
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print(problem())
print(*(warning.message for warning in said), sep="\\n", flush=True)  # or the child says it again
if os.fork() == 0:
    sys.exit()  # an end of which the parent's folder knows nothing
os.wait()
print(os.listdir(os.environ["TMPDIR"]))
"""


@pytest.mark.parametrize("cache", ["a file", "no home"])
def test_a_cache_that_cannot_be_written_has_a_temporary_folder_in_its_place(compiler, tmp_path, cache):
    compiler()  # its library is none that could be loaded
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(building.SOURCES.parent.parent),
        "TMPDIR": str(tmp_path / "temporary"),
        "LHC_TRITON_CACHE": str(tmp_path / "file") if cache == "a file" else "",
    }
    program = UNWRITABLE
    if cache == "no home":
        program = f"import os\nos.getuid = lambda: 2**31 - 7\n{UNWRITABLE}"
        for variable in ("HOME", "XDG_CACHE_HOME"):
            environment.pop(variable, None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    problem, said, inside = done.stdout.splitlines()
    assert f"{tmp_path}/temporary/lhc_triton-" in problem
    assert "lhc_native.so" in problem
    assert re.search(
        r"(file/native.* cannot be used|has no home).*set LHC_TRITON_CACHE.*; until this process ends, builds"
        r" of the native kernel are kept in .*/temporary/lhc_triton-",
        said,
    )
    assert inside.startswith("['lhc_triton-")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_library_never_flushes_denormals():
    assert not {flag for flag in building.FLAGS if "fast-math" in flag}


def test_the_library_is_for_everybody_to_load(compiler):
    compiler()
    assert build().stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("damage", [b"", b"half", None], ids=["empty", "garbage", "digest lost"])
def test_a_damaged_library_is_built_again_once(compiler, damage):
    compiler()
    library = build()
    whole = library.read_text()
    if damage is None:
        library.with_name(building.DIGEST).unlink()
    else:
        library.write_bytes(damage)
    with pytest.warns(RuntimeWarning, match=r"lhc_native\.so is damaged; it is built again"):
        assert build() == library
    assert library.read_text() == whole
    assert build() == library  # without another warning, which would be an error here
    assert compilations(compiler) == 2


def test_a_library_that_cannot_be_loaded_is_one_line_of_complaint(compiler):
    compiler()  # writes no library that a loader would take
    program = "import torch, lhc_kernels.cpu as cpu; print(cpu.problem())"
    environment = {**os.environ, "PYTHONPATH": str(building.SOURCES.parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lhc_native.so" in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("variable", ["CXX", "LHC_TRITON_NATIVE_FLAGS"])
def test_unbalanced_quotes_are_one_clear_error(compiler, monkeypatch, variable):
    compiler()
    monkeypatch.setenv(variable, "g++ '-O2")
    with pytest.raises(BuildError, match=f"^{variable}=.* cannot be split into words: .*; correct it$"):
        build()


def test_a_user_without_a_home_is_told_what_to_set(compiler, monkeypatch):
    compiler()
    for variable in ("LHC_TRITON_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # who is not in the list of users
    with pytest.raises(BuildError, match=r"^this user has no home .*; set LHC_TRITON_CACHE$"):
        build()


def test_a_compiler_may_complain_in_any_encoding(compiler):
    compiler(text=FAILING.replace('echo "x.h:1: error: odd', 'printf "x.h:1: error: \\351\\351'))
    with pytest.raises(BuildError, match=r"cannot build the native kernel: x\.h:1: error: "):
        build()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="warnings are read on x86")
@pytest.mark.parametrize("source", sorted(path.name for path in building.SOURCES.glob("*.cpp")))
def test_the_sources_compile_without_a_warning(source):
    command = [*building.find_compiler(), *building.FLAGS, *building.target_flags(), *building.torch_flags()]
    strict = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(building.SOURCES / source)]
    done = subprocess.run([*command, *strict], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-w" not in command
