"""Other inference engines on the same network: exported to ONNX, loaded, and called like ours."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lhc_bench.measure.remote_engine import DEEPSPARSE, EngineError, RemoteEngine
from lhc_bench.measure.replayed import reason_of
from lhc_bench.measure.rows import Row
from lhc_triton.conversion import lhc_layers

Run = Callable[[], Any]
Loader = Callable[[Path, np.ndarray, int], Run]

SUITE = "cpu-engines"
OURS = "auto"  # as `accelerate` comes, nothing forced
COMPILERS = ("openvino", "onnxruntime")  # those that take no advantage of zeros
OPSET = 13  # old enough for DeepSparse 1.8
INSTALL = "pip install 'lhc-triton[peers]'"


def load_openvino(model: Path, x: np.ndarray, threads: int) -> Run:
    """Compile an ONNX file by OpenVINO for latency, in float32, and return what runs it on an input."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(str(model), "CPU", settings).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


def load_onnxruntime(model: Path, x: np.ndarray, threads: int) -> Run:
    """Load an ONNX file by ONNX Runtime, and return what runs it on an input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that spin on after a call would slow down whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


LOADERS: Mapping[str, Loader] = MappingProxyType({"openvino": load_openvino, "onnxruntime": load_onnxruntime})
"""Engines of this process: what loads a file for an input and a number of threads."""

ENGINES = (*LOADERS, DEEPSPARSE)


def plain(model: nn.Module) -> nn.Module:
    """Return a copy in which every LHCConv2d is an nn.Conv2d with the masked weight."""
    work = copy.deepcopy(model).eval()
    for name, layer in lhc_layers(work).items():
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=layer.bias is not None,
            device="meta",
        )
        conv.weight, conv.bias = nn.Parameter(layer.masked_weight().detach()), layer.bias
        work.set_submodule(name, conv.eval())
    return work


def export_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write a network in eval mode as ONNX, for inputs of this shape; batch norm is folded.

    Raises:
        ModuleNotFoundError: the package onnx is missing, which torch needs for it.
    """
    if importlib.util.find_spec("onnx") is None:  # torch would say so after half a minute
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch prefers its new exporter, which writes no opset this old
        torch.onnx.export(
            plain(model),
            (x,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["x"],
            output_names=["y"],
        )


@dataclass(frozen=True)
class Engines:
    """Which engines a suite may use; open it with ``with`` to get them.

    Attributes:
        deepsparse_python: interpreter that has DeepSparse, which needs an older numpy; None: without it.
        loaders: the engines of this process; others are not looked for.
        export: writes a network and an input of it as an ONNX file.
    """

    deepsparse_python: Path | None = None
    loaders: Mapping[str, Loader] = field(default_factory=lambda: LOADERS)
    export: Callable[[nn.Module, Tensor, Path], None] = export_onnx

    def open(self) -> OpenEngines:
        """Return the engines that are there, ready to load networks.

        Raises:
            ValueError: ``deepsparse_python`` was given and does not serve.
        """
        return OpenEngines(self)


class OpenEngines:
    """Engines at work, until the end of a ``with`` block.

    Attributes:
        unavailable: by engine, why it is not there.
        versions: of those that are.
    """

    def __init__(self, choice: Engines) -> None:
        self.choice = choice
        self.unavailable: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.remote: RemoteEngine | None = None
        self._exit = ExitStack()
        self._folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory()))
        if choice.deepsparse_python is None:
            self.unavailable[DEEPSPARSE] = (
                "not asked for: give --deepsparse-python, an interpreter with deepsparse==1.8.0 and numpy<2"
            )
            return
        try:
            self.remote = RemoteEngine(choice.deepsparse_python)
        except EngineError as error:
            self._exit.close()
            raise ValueError(
                f"--deepsparse-python {choice.deepsparse_python} does not serve: {error}; give a Python with"
                " deepsparse==1.8.0 and numpy<2"
            ) from None
        self._exit.callback(self.remote.close)
        self.versions[DEEPSPARSE] = self.remote.version

    def __enter__(self) -> OpenEngines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def clock(self) -> float:
        """Return seconds, those that requests to another process take not counted."""
        return time.perf_counter() - (0.0 if self.remote is None else self.remote.waited_s)

    def load(self, model: nn.Module, x: Tensor, names: Sequence[str], threads: int) -> Loaded:
        """Give a network to engines, for one input.

        Args:
            model: in eval mode; left as it is.
            x: [N, C, H, W], float32 on the CPU.
            names: of the engines.
            threads: how many each may use.

        Returns:
            Those that took it; the others with the reason.
        """
        left_out = {name: self.unavailable[name] for name in names if name in self.unavailable}
        wanted = [
            name
            for name in names
            if name not in left_out and (name == DEEPSPARSE or name in self.choice.loaders)
        ]
        if not wanted:
            return Loaded({}, {}, left_out)
        path = self._folder / "network.onnx"
        try:
            self.choice.export(model, x, path)
        except Exception as error:  # exporters raise whatever they like
            reason = _why(error, "the network cannot be written as ONNX: ")
            if isinstance(error, ModuleNotFoundError):
                self.unavailable |= dict.fromkeys(wanted, reason)
            return Loaded({}, {}, {**left_out, **dict.fromkeys(wanted, reason)})
        runs: dict[str, Run] = {}
        outputs: dict[str, Tensor] = {}
        for name in wanted:
            try:
                runs[name], outputs[name] = self._load_one(name, path, x.contiguous().numpy(), threads)
            except Exception as error:  # and so do engines
                left_out[name] = _why(error)
                if isinstance(error, ModuleNotFoundError):
                    self.unavailable[name] = left_out[name]
        path.unlink(missing_ok=True)
        return Loaded(runs, outputs, left_out)

    def _load_one(self, name: str, path: Path, x: np.ndarray, threads: int) -> tuple[Run, Tensor]:
        if name == DEEPSPARSE:
            assert self.remote is not None
            self.remote.load(path, x, self._folder, threads)
            return self.remote.run, torch.from_numpy(self.remote.output())
        run = self.choice.loaders[name](path, x, threads)
        output = torch.from_numpy(np.array(run()))
        if name not in self.versions:
            try:
                self.versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                self.versions[name] = "unknown"
        return run, output


def _why(error: Exception, doing: str = "") -> str:
    """Return one line for what went wrong."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: {INSTALL}"
    return doing + (str(error) if isinstance(error, EngineError) else reason_of(error))


@dataclass(frozen=True)
class Loaded:
    """One network in several engines.

    Attributes:
        runs: by engine, what calls it once.
        outputs: by engine, its output.
        left_out: by engine, why it has none.
    """

    runs: Mapping[str, Run]
    outputs: Mapping[str, Tensor]
    left_out: Mapping[str, str]


def ours_over(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compare our time with every engine's, network by network.

    Args:
        rows: of a suite with engines.

    Returns:
        For each network {"case", "batch", "density", "ours_us", "dense", "engines", "compilers"}: our
        speed-ups over the best dense form, over each engine by name, and over the faster of OpenVINO and ONNX
        Runtime (None without either).
    """
    found = []
    for mine in (row for row in rows if row.backend == OURS):
        key = (mine.case, mine.batch, mine.density)
        others = [row for row in rows if (row.case, row.batch, row.density) == key and row.backend in ENGINES]
        engines = {row.backend: row.time_us / mine.time_us for row in others}
        compilers = [engines[name] for name in COMPILERS if name in engines]
        found.append(
            {
                **dict(zip(("case", "batch", "density"), key, strict=True)),
                "ours_us": mine.time_us,
                "dense": mine.speedup,
                "engines": engines,
                "compilers": min(compilers, default=None),
            }
        )
    return found


def engines_table(found: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return head and lines of a table of what `ours_over` gave, as texts."""
    names = [name for name in ENGINES if any(name in network["engines"] for network in found)]

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    lines = [
        (
            f"{network['case']}, batch {network['batch']}",
            f"{network['ours_us'] / 1e3:.3g} ms",
            times(network["dense"]),
            *(times(network["engines"].get(name)) for name in names),
            times(network["compilers"]),
        )
        for network in found
    ]
    head = ("network", "ours", "over dense", *(f"over {name}" for name in names), "over the faster compiler")
    return head, lines
