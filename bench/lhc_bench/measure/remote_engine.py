"""An engine that needs an interpreter of its own, spoken to by JSON lines; see `engine_worker`."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DEEPSPARSE = "deepsparse"
WORKER = Path(__file__).with_name("engine_worker.py")
START_S, LOAD_S, CALL_S = 120.0, 600.0, 120.0
LONGEST_LINE = 1 << 16


class EngineError(RuntimeError):
    """A remote engine refused, broke or fell silent; the message is one line."""


class RemoteEngine:
    """A worker process that runs one network at a time.

    Args:
        python: interpreter with the engine in it.
        worker: the script that it runs.
        start_s, load_s, call_s: seconds after which a start, a load, or one call is given up.

    Raises:
        EngineError: the interpreter does not start, or does not have the engine.

    Attributes:
        version: of the engine.
        waited_s: seconds that calls of `run` took beyond the engine's own time: for the clock of whoever
            times them.
    """

    def __init__(
        self,
        python: str | Path,
        worker: Path = WORKER,
        start_s: float = START_S,
        load_s: float = LOAD_S,
        call_s: float = CALL_S,
    ) -> None:
        self.load_s, self.call_s = load_s, call_s
        self.waited_s = 0.0
        self._rest = b""
        self._errors: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        try:
            # -I: neither our PYTHONPATH nor the user's packages, which are of another numpy.
            self._process = subprocess.Popen(
                [str(python), "-I", str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError as error:
            self._errors.close()
            raise EngineError(f"{python} cannot be started: {error.strerror or error}") from None
        try:
            self.version = str(self._ask(start_s, do="hello")["version"])
        except BaseException:
            self.close()
            raise

    def load(self, model: Path, x: np.ndarray, folder: Path, threads: int) -> None:
        """Load an ONNX file and its input; what was loaded before is forgotten.

        Args:
            model: the file.
            x: input [N, C, H, W]; it goes over as a file in ``folder``.
            folder: for the files of input and output.
            threads: how many the engine uses.
        """
        self._folder = folder
        path = folder / "input.npy"
        np.save(path, x, allow_pickle=False)
        self._ask(self.load_s, do="load", model=str(model), input=str(path), threads=threads)

    def output(self) -> np.ndarray:
        """Run once and return the output."""
        path = self._folder / "output.npy"
        self._ask(self.call_s, do="output", path=str(path))
        try:
            found: np.ndarray = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise EngineError(f"the engine's output cannot be read: {error}") from None
        return found

    def run(self) -> None:
        """Run once; what the way there and back takes is added to `waited_s`."""
        start = time.perf_counter()
        answer = self._ask(self.call_s, do="time")
        own = answer.get("us")
        if isinstance(own, bool) or not isinstance(own, int | float) or not own >= 0:
            raise EngineError(f"the engine answered {answer}, expected a time in us")
        self.waited_s += max(0.0, time.perf_counter() - start - own / 1e6)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not sent stays unsent
                    continue
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _ask(self, limit_s: float, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise EngineError(self._ended()) from None
        line = self._line(time.monotonic() + limit_s, f"no answer within {limit_s:g} s")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"the engine answered {line[:80]!r}, expected a JSON object")
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        return answer

    def _line(self, deadline: float, late: str) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()  # a late answer would be taken for that of the next request
                    raise EngineError(late)
                got = os.read(self._process.stdout.fileno(), LONGEST_LINE)
                if not got:
                    raise EngineError(self._ended())
                self._rest += got
                if len(self._rest) > LONGEST_LINE:
                    raise EngineError(f"the engine's answer is longer than {LONGEST_LINE} bytes")
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self) -> str:
        """Say that the process has ended, with the last line of what it said."""
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none yet"
        self._errors.seek(0)
        said = self._errors.read()[-LONGEST_LINE:].decode(errors="replace").strip().splitlines()
        return f"the interpreter ended (exit code {code}){': ' + said[-1] if said else ''}"
