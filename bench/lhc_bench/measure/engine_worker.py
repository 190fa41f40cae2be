"""One engine in an interpreter of its own: answers JSON lines on stdin with JSON lines on stdout.

`remote_engine.RemoteEngine` starts this file by its path, in a Python that need have neither this package nor
torch, and any numpy. Requests: {"do": "hello"}, {"do": "load", "model": ONNX file, "input": .npy file,
"threads": int}, {"do": "output", "path": .npy file to write}, {"do": "time"} for one call in microseconds.
What fails is answered by {"error": one line}; the end of stdin ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

Run = Callable[[], Any]


class DeepSparse:
    """DeepSparse's engine for one network and one input."""

    def __init__(self) -> None:
        import deepsparse

        self.package = deepsparse
        self.version = str(deepsparse.__version__)

    def load(self, model: str, x: np.ndarray, threads: int) -> Run:
        """Compile an ONNX file for the batch of an input, and return what runs it."""
        engine = self.package.Engine(model, batch_size=len(x), num_cores=threads)
        return lambda: engine.run([x])[0]


class Worker:
    """Holds the network that was loaded last."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.run: Run | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        what = request["do"]
        if what == "hello":
            return {"version": self.engine.version}
        if what == "load":
            self.run = None  # the one before it may need the memory
            x = np.ascontiguousarray(np.load(request["input"], allow_pickle=False))
            self.run = self.engine.load(request["model"], x, request["threads"])
            return {}
        if self.run is None:
            raise RuntimeError(f"{what!r} came before a network was loaded")
        if what == "output":
            np.save(request["path"], np.asarray(self.run()), allow_pickle=False)
            return {}
        if what == "time":
            start = time.perf_counter()
            self.run()
            return {"us": (time.perf_counter() - start) * 1e6}
        raise RuntimeError(f"request {what!r} is not known")


def serve(make: Callable[[], Any], requests: TextIO, answers: TextIO) -> None:
    """Answer each line until the requests end."""
    worker: Worker | None = None
    for line in requests:
        try:
            worker = worker or Worker(make())
            answer = worker.answer(json.loads(line))
        except Exception as error:  # whatever an engine raises is the other side's to tell
            first = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # Engines print to stdout as they like: the answers keep it for themselves, the rest goes to stderr.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(DeepSparse, sys.stdin, own)
