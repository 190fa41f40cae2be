"""One's own network with the zeros that it has: every dense form of it against ours."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lhc_bench.files import check_writable
from lhc_bench.measure.networks import ERROR_FACTOR
from lhc_bench.measure.peers import compiled_or_reason, layouts, norm_error, reset_compiler
from lhc_bench.measure.replayed import reason_of
from lhc_bench.measure.rows import Results, environment, summarise, write_results
from lhc_bench.measure.setting import (
    LIMITS,
    Call,
    Contender,
    Setting,
    Sparse,
    Timer,
    measure,
    measure_machine,
)
from lhc_bench.measure.suites import Progress
from lhc_triton.planning.extract import read_model
from lhc_triton.runtime.choosing.timing import time_paired
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.sources import Network

SUITE = "mine"
BACKENDS = {"cpu": ("torch", "native", "auto"), "cuda": ("triton", "auto")}


@dataclass(frozen=True)
class OwnSubject:
    """A network as it is, with its dense peers; see `setting.Subject`."""

    network: nn.Module
    model: str
    x: Tensor
    out_channels: int
    peers: Mapping[str, Call]
    skipped: Mapping[str, str]
    density: float
    parts: tuple[tuple[int, int], ...]
    layer: str = field(default="all", init=False)
    kernel: int = field(default=0, init=False)
    stride: int = field(default=0, init=False)

    @property
    def limit(self) -> float:
        """Norm error above which a result is wrong."""
        return ERROR_FACTOR * LIMITS[self.x.dtype]

    def under(self, block: tuple[int, int], density: float, setting: Setting) -> Sparse:
        """Accelerate the network for each backend; its own zeros take the place of a mask."""
        with torch.inference_mode():
            expected = copy.deepcopy(self.network).double()(self.x.double())
        contenders: dict[str, Contender] = {}
        left_out: dict[str, str] = {}
        for backend in setting.backends:
            reason = None if backend == "auto" else unavailable(backend, setting.dtype, setting.device)
            if reason is None:
                try:
                    fast = accelerate(
                        self.network,
                        self.x,
                        tune=setting.tune,
                        backend=backend,  # type: ignore[arg-type]
                        graphs=setting.device != "cuda",
                    )
                except Exception as error:  # a forced backend may not serve every layer, or not compile
                    reason = reason_of(error)
            if reason is not None:
                left_out[backend] = reason
                continue
            with torch.inference_mode():
                found = norm_error(fast(self.x), expected)
            macs = sum(macs for macs, _ in self.parts)
            contenders[backend] = Contender({"network": partial(fast, self.x)}, found, macs)
        return Sparse(contenders, self.density, self.parts, left_out)


def run_own(
    network: Network,
    out_dir: str | Path,
    progress: Progress = lambda done, total, label: None,
    rounds: int = 20,
    compiled: bool = True,
    timer: Timer = time_paired,
    seed: int = 0,
) -> dict[str, Any]:
    """Time a network's dense forms and its accelerated ones, interleaved; write results.json and results.csv.

    Args:
        network: with one input [N, C, H, W] and one output tensor.
        out_dir: folder for the results.
        progress: called with (steps done, all, what begins).
        rounds: interleaved rounds.
        compiled: also compare with torch.compile.
        timer: as in `run_suite`.
        seed: told in the rows.

    Returns:
        What results.json holds.

    Raises:
        ValueError: the network takes or gives something else.
        OSError: the folder cannot be written.
    """
    if network.accelerated is not None:
        raise ValueError(f"{network.name} is an artefact; give the network that it was made from")
    x = network.inputs[0]
    if len(network.inputs) != 1 or x.ndim != 4:
        raise ValueError(
            f"{network.name} takes {[tuple(i.shape) for i in network.inputs]}; one [N, C, H, W] is needed"
        )
    with torch.inference_mode():
        output = network.model(x)
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise ValueError(f"{network.name} gives a {type(output).__name__}; a tensor [N, ...] is needed")
    out = Path(out_dir)
    check_writable(out)
    device = x.device.type
    with tempfile.TemporaryDirectory() as cache:
        store = TimingStore(None if device == "cuda" else Path(cache) / "timings.json")
        setting = Setting(device, x.dtype, BACKENDS[device], rounds, seed, compiled, timer, store)
        progress(0, 3, "dense forms")
        subject, block = _prepare(network, x, output, setting)
        progress(1, 3, "the machine")
        machine = measure_machine(setting)
        progress(2, 3, "accelerated forms")
        found = measure(subject, block, subject.density, setting, machine)
        progress(3, 3, "done")
    env = environment(
        device,
        suite=SUITE,
        rounds=rounds,
        rounds_made=[rounds, rounds],
        seed=seed,
        densities=[subject.density],
        skipped_peers=dict(subject.skipped),
        notes=[f"{place}: {reason}" for place, reason in found.notes],
        **asdict(machine),
    )
    results = Results(env, found.rows, summarise(found.rows, [subject.density]))
    write_results(out, results)
    return results.to_dict()


def _prepare(
    network: Network, x: Tensor, output: Tensor, setting: Setting
) -> tuple[OwnSubject, tuple[int, int]]:
    """Build the dense forms; also the blocks of the layer with most weights."""
    peers: dict[str, Call] = {
        "folded eager": partial(
            accelerate(network.model, x, tune="off", backend="dense", graphs=setting.device != "cuda"), x
        )
    }
    skipped: dict[str, str] = {}
    if setting.compiled:
        reset_compiler()
    for name, layout in layouts(setting.device).items():
        laid = x.contiguous(memory_format=layout)
        model = copy.deepcopy(network.model).to(memory_format=layout)  # type: ignore[call-overload]
        peers[f"eager {name}"] = partial(model, laid)
        if setting.compiled:
            made, reason = compiled_or_reason(model, laid)
            if made is None:
                skipped[f"compiled {name}"] = reason or ""
            else:
                peers[f"compiled {name}"] = partial(made, laid)
    reading = read_model(network.model, x)
    layers = (*reading.topologies, *reading.dense)
    largest = max(layers, key=lambda layer: layer.geometry.weights, default=None)
    weights = sum(layer.geometry.weights for layer in layers)
    live = sum(layer.live_weights for layer in layers)
    parts = tuple(
        (
            layer.live_macs,
            (layer.geometry.in_values + layer.geometry.out_values + layer.live_weights) * x.element_size(),
        )
        for layer in layers
    )
    name = network.name.replace("/", "_")
    subject = OwnSubject(
        network.model, name, x, output.shape[1], peers, skipped, max(live, 1) / max(weights, 1), parts
    )
    block = (1, 1) if largest is None else (largest.in_block, largest.out_block)
    return subject, block
