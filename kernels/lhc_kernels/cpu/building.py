"""Building the native kernel with the machine's own C++ compiler, once for each source, compiler and CPU.

The library lies in a folder named after a digest of all that it depends on, so nothing is ever rebuilt or
overwritten. Builders of one folder wait for each other under a lock that the system drops with the process
that holds it; a library appears under its name only when it is whole. A build that is killed therefore leaves
nothing but a file that the next one removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
TARGET_FLAGS = ("-march=native",)
# Never -ffast-math: linking with it makes the whole process flush denormals.
# NDEBUG as in torch's own build: without it, some structures of its headers have another layout.
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
LIBRARY = "lhc_native.so"
TIMEOUT_S = 300


class BuildError(RuntimeError):
    """The native kernel cannot be built here; the message is one line that says why and what to do."""


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX names the compiler {chosen[0]!r}, which is not on the PATH; correct CXX")
        return chosen
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) is on the PATH; install one, or set CXX")


def target_flags() -> list[str]:
    """Return the flags that name the CPU: $LHC_TRITON_NATIVE_FLAGS, else those for this machine."""
    given = os.environ.get("LHC_TRITON_NATIVE_FLAGS")
    return list(TARGET_FLAGS) if given is None else shlex.split(given)


def cache_folder() -> Path:
    """Return where built libraries are kept: $LHC_TRITON_CACHE/native, else under the user's cache folder."""
    folder = os.environ.get("LHC_TRITON_CACHE")
    if folder:
        return Path(folder) / "native"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "lhc_triton" / "native"


def digest(compiler: list[str], target: list[str]) -> str:
    """Return a name for what the library depends on: sources, compiler, CPU, flags and torch.

    Raises:
        BuildError: the compiler does not run, or not with these flags.
    """
    # The predefined macros hold the compiler's version and every instruction set that the flags turn on.
    macros = _run([*compiler, *target, "-dM", "-E", "-x", "c++", os.devnull])
    parts = [" ".join([*compiler, *target, *FLAGS]), macros, torch.__version__]
    parts += [path.name + path.read_text() for path in _sources()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def build() -> Path:
    """Return the path of the native library, after building it if this machine has not yet.

    Raises:
        BuildError: there is no compiler, it fails, or the cache folder cannot be written.
    """
    compiler, target = find_compiler(), target_flags()
    folder = cache_folder() / digest(compiler, target)
    library = folder / LIBRARY
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not library.is_file():
                _compile(compiler, target, library)
    except OSError as error:
        raise BuildError(
            f"the folder {folder} for the native kernel cannot be used ({error.strerror}); "
            "set LHC_TRITON_CACHE to one that can be written"
        ) from error
    return library


def _compile(compiler: list[str], target: list[str], library: Path) -> None:
    """Compile beside the library and rename; the caller holds the lock."""
    for leftover in library.parent.glob("*.tmp"):  # of a build that was killed
        leftover.unlink()
    descriptor, name = tempfile.mkstemp(".tmp", dir=library.parent)
    os.close(descriptor)
    try:
        _run(
            [
                *compiler,
                *FLAGS,
                *target,
                *_torch_flags(),
                *map(str, _sources(".cpp")),
                "-o",
                name,
                *_torch_libraries(),
            ]
        )
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [abi, "-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]


def _torch_libraries() -> list[str]:
    return ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu", "-lc10"]


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (suffixes or (".cpp", ".h")))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {command[0]!r} does not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"the C++ compiler {command[0]!r} cannot build the native kernel: {first.strip()}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
