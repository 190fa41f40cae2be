"""The whole promise on one network: load, plan, run, compare with the dense twin, and draw it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lhc_triton as lhc
from lhc_bench.files import made_folder, write_beside
from lhc_bench.measure.peers import network_peers
from lhc_bench.pictures.demo_bars import draw_speedup
from lhc_bench.pictures.topology_map import draw_topology, topology_statistics
from lhc_triton.models.pretrained import load_pretrained
from lhc_triton.runtime.choosing.doctor import cpu_name
from lhc_triton.runtime.choosing.timing import time_paired
from lhc_triton.runtime.network.accelerated import AcceleratedModel
from lhc_triton.training.data import open_data

Progress = Callable[[str], None]
TARGET_DENSITY = 0.1
SAME_OUTPUT = 1e-5  # norm error in float32; the layers' order of summation may differ


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of images that the model puts into their class.

    Args:
        model: maps [N, 1, 28, 28] to scores [N, classes].
        images: normalised, float [N, 1, 28, 28].
        labels: int64 [N].
        batch: images per call.
    """
    with torch.inference_mode():
        parts = [model(images[i : i + batch]).argmax(1) for i in range(0, len(images), batch)]
    return float((torch.cat(parts) == labels).double().mean())


def run_demo(
    out_dir: str | Path, batch: int = 64, rounds: int = 20, progress: Progress = lambda stage: None
) -> dict[str, Any]:
    """Run the shipped network against its dense twin and write what came out.

    Written: report.json, speedup.png, topology.png and net.safetensors, the accelerated network.

    Args:
        out_dir: folder for the results; made where it does not exist.
        batch: images per timed call.
        rounds: interleaved rounds of each timing.
        progress: called with the name of each stage as it begins.

    Returns:
        What report.json holds: accuracies on the 10,000 test images; weights and MACs of the converted
        convolutions and their reductions; median times of the whole networks in microseconds; a row
        per layer.

    Raises:
        ValueError: for a batch or a number of rounds below 1, or a batch above the 10,000 test images.
        OSError: if the folder cannot be written.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    test = open_data("fashion-mnist").test
    if batch > len(test):
        raise ValueError(f"batch is {batch}; there are {len(test)} test images")
    out = made_folder(out_dir)

    progress("load the shipped networks")
    sparse, dense = load_pretrained("lhc"), load_pretrained("dense")
    ((images, labels),) = test.batches([torch.arange(len(test))])
    example = images[:batch]

    progress("plan and pack the learned topology, measuring each layer's backends")
    fast = lhc.accelerate(sparse, example, tune="full")
    counts = lhc.summary(sparse, tuple(example.shape)).converted
    topologies = [layer.topology for layer in fast.plan.layers if layer.topology.density < 1]

    progress("prepare the dense twin: batch norm folded, eager and compiled")
    peers, skipped = network_peers(dense, example)

    progress("classify 10,000 test images with both")
    lhc_accuracy = accuracy(fast, images, labels)
    dense_accuracy = accuracy(next(iter(peers.values())), images, labels)

    progress(f"time both networks, {rounds} interleaved rounds")
    calls = {name: _call(peer, example) for name, peer in peers.items()}
    times = time_paired({**calls, "lhc": _call(fast, example)}, rounds=rounds)
    best = min(calls, key=lambda name: times[name].median_us)

    progress("save the accelerated network and load it again")
    artifact = out / "net.safetensors"
    lhc.save(fast, artifact)
    with torch.inference_mode():
        expected = fast(example)
        reload_error = float((lhc.load(artifact)(example) - expected).norm() / expected.norm())
    if not reload_error <= SAME_OUTPUT:
        raise RuntimeError(
            f"{artifact} gives outputs that differ by {reload_error:.1e} from those it was saved with; "
            "please report this"
        )

    progress("time each converted layer against its dense form")
    layers = _layer_rows(fast, lhc.accelerate(sparse, example, backend="dense", tune="off"), example, rounds)

    report: dict[str, Any] = {
        "dense_accuracy": dense_accuracy,
        "lhc_accuracy": lhc_accuracy,
        "weights": counts.weights,
        "live_weights": counts.live_weights,
        "weight_reduction": counts.weights / counts.live_weights,
        "macs": counts.macs,
        "live_macs": counts.live_macs,
        "mac_reduction": counts.macs / counts.live_macs,
        "density": counts.density,
        "batch": batch,
        "rounds": rounds,
        "dense_us": times[best].median_us,
        "lhc_us": times["lhc"].median_us,
        "speedup": times[best].median_us / times["lhc"].median_us,
        "baseline": best,
        "times_us": {
            name: {"p20": t.p20_us, "median": t.median_us, "p80": t.p80_us} for name, t in times.items()
        },
        "skipped_peers": skipped,
        "reload_error": reload_error,
        "artifact_bytes": artifact.stat().st_size,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lhc_triton": lhc.__version__,
        },
        "layers": layers,
        "topology": topology_statistics(topologies),
    }
    progress("draw the pictures")
    title = f"What the network learned: {counts.weights / counts.live_weights:.1f}x fewer weights, "
    title += f"{counts.macs / counts.live_macs:.1f}x fewer MACs"
    draw_topology(topologies, out / "topology.png", title, target=TARGET_DENSITY)
    draw_speedup(report, out / "speedup.png")
    write_beside(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _layer_rows(
    fast: AcceleratedModel, dense: AcceleratedModel, example: Tensor, rounds: int
) -> list[dict[str, Any]]:
    """Return the rows of the planned layers, with measured times of each layer and its dense form."""
    planned = {layer.name for layer in fast.plan.layers if layer.topology.density < 1}
    inputs: dict[str, tuple[Any, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _module, args, name=name: inputs.__setitem__(name, args))
        for name, module in fast.fused_layers().items()
    ]
    with torch.inference_mode():
        fast(example)
    for handle in handles:
        handle.remove()
    twins = dense.fused_layers()
    rows = []
    for row in fast.report()["layers"]:
        name = row["layer"]
        if name not in planned or name not in inputs or name not in twins:
            continue
        layer = fast.fused_layers()[name]
        calls = {"dense": _call(twins[name], *inputs[name]), "lhc": _call(layer, *inputs[name])}
        times = time_paired(calls, rounds=rounds)
        rows.append({**row, "dense_us": times["dense"].median_us, "lhc_us": times["lhc"].median_us})
    return rows


def _call(model: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    return lambda: model(*inputs)
