"""Building the native kernel with the machine's own C++ compiler, once for each source, compiler and CPU.

The library lies in a folder named after a digest of all that it depends on. Builders of one folder wait for
each other under a lock that the system drops with the process that holds it; a library appears under its name
only when it is whole and on the disk, its digest beside it, and is compared with that before it is loaded. A
build that is killed leaves nothing but a folder that the next one removes; a damaged library is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from .folders import cache_folder

SOURCES = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
TARGET_FLAGS = ("-march=native",)
# Never -ffast-math: linking with it makes the whole process flush denormals.
# NDEBUG as in torch's own build: without it, some structures of its headers have another layout.
FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "-fno-math-errno", "-ffp-contract=fast", "-fPIC")
LIBRARY = "lhc_native.so"
DIGEST = "lhc_native.sha256"
TIMEOUT_S = 900


class BuildError(RuntimeError):
    """The native kernel cannot be built here; the message is one line that says why and what to do."""


class CacheError(BuildError):
    """The native kernel cannot be kept where it should be."""


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: there is none, or CXX is no command.
    """
    chosen = _words("CXX") or []
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX names the compiler {chosen[0]!r}, which is not on the PATH; correct CXX")
        return chosen
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) is on the PATH; install one, or set CXX")


def target_flags() -> list[str]:
    """Return the flags that name the CPU: $LHC_TRITON_NATIVE_FLAGS, else those for this machine.

    Raises:
        BuildError: the variable cannot be split into flags.
    """
    given = _words("LHC_TRITON_NATIVE_FLAGS")
    return list(TARGET_FLAGS) if given is None else given


def native_folder() -> Path:
    """Return where built libraries are kept; CacheError where the user has no place for them."""
    try:
        return cache_folder() / "native"
    except RuntimeError as error:
        raise CacheError("this user has no home for the native kernel; set LHC_TRITON_CACHE") from error


def digest(compiler: list[str], target: list[str]) -> str:
    """Return a name for what the library depends on: sources, compiler, CPU, flags and torch.

    Raises:
        BuildError: the compiler does not run, or not with these flags.
    """
    # The predefined macros hold the compiler's version and every instruction set that the flags turn on.
    macros = _run([*compiler, *target, "-dM", "-E", "-x", "c++", os.devnull])
    name = hashlib.sha256("\0".join([*compiler, *target, *FLAGS, macros, torch.__version__]).encode())
    for path in _sources():
        name.update(b"\0" + path.name.encode() + path.read_bytes())
    return name.hexdigest()[:24]


def build(folder: Path | None = None) -> Path:
    """Return the path of the native library, after building it if this machine has not yet.

    Args:
        folder: where built libraries are kept; default ``native_folder()``.

    Warns:
        RuntimeWarning: the library in the cache was damaged, and is built again.

    Raises:
        BuildError: there is no compiler, or it fails.
        CacheError: the folder cannot be written.
    """
    compiler, target = find_compiler(), target_flags()
    folder = (native_folder() if folder is None else folder) / digest(compiler, target)
    library = folder / LIBRARY
    try:
        if _is_intact(library):
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not _is_intact(library):
                if library.exists():
                    message = f"the native kernel {library} is damaged; it is built again"
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
                _compile(compiler, target, library)
    except OSError as error:
        raise CacheError(
            f"the folder {folder} for the native kernel cannot be used ({error.strerror}); "
            "set LHC_TRITON_CACHE to one that can be written"
        ) from error
    return library


def _is_intact(library: Path) -> bool:
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == library.with_name(DIGEST).read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _compile(compiler: list[str], target: list[str], library: Path) -> None:
    """Compile beside the library and rename; the caller holds the lock."""
    for leftover in library.parent.glob("*.tmp"):  # of a build that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=library.parent) as work:
        sources = _sources(".cpp")
        objects = [f"{work}/{source.stem}.o" for source in sources]

        def compile_one(source: Path, output: str) -> str:
            return _run([*compiler, *FLAGS, *target, *torch_flags(), "-c", str(source), "-o", output])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        made, digest_file = Path(work) / LIBRARY, Path(work) / DIGEST
        _run([*compiler, *target, "-shared", *objects, *_torch_libraries(), "-o", str(made)])
        digest_file.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        # Whole on the disk before they have their names; the digest first, so that no whole library lacks it.
        for path, mode, name in ((digest_file, 0o644, DIGEST), (made, 0o755, LIBRARY)):
            path.chmod(mode)
            _sync(path)
            os.replace(path, library.parent / name)
        _sync(library.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def torch_flags() -> list[str]:
    """Return the flags that find torch's headers, and build as torch was."""
    include = Path(torch.__file__).parent / "include"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [abi, "-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]


def _torch_libraries() -> list[str]:
    return ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu", "-lc10"]


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (suffixes or (".cpp", ".h")))


def _words(variable: str) -> list[str] | None:
    """Return a variable of the environment, split as a shell would; None if it is not set."""
    value = os.environ.get(variable)
    try:
        return None if value is None else shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{variable}={value!r} cannot be split into words: {error}; correct it") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
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
