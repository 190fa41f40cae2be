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
from lhc_bench.files import made_folder, write_text
from lhc_bench.measure.peers import network_peers
from lhc_bench.pictures.demo_bars import draw_speedup
from lhc_bench.pictures.topology_map import draw_topology, topology_statistics
from lhc_triton.models.pretrained import load_pretrained
from lhc_triton.runtime.choosing.doctor import cpu_name
from lhc_triton.runtime.choosing.timing import time_paired
from lhc_triton.runtime.network.accelerated import AcceleratedModel
from lhc_triton.training.data import DataName, open_data

Progress = Callable[[str], None]
TARGET_DENSITY = 0.1
SAME_OUTPUT = 1e-5  # norm error in float32; the layers' order of summation may differ


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of images that the model puts into their class.

    Args:
        model: maps [N, C, H, W] to scores [N, classes].
        images: normalised, float [N, C, H, W].
        labels: int64 [N].
        batch: images per call.
    """
    with torch.inference_mode():
        parts = [model(images[i : i + batch]).argmax(1) for i in range(0, len(images), batch)]
    return float((torch.cat(parts) == labels).double().mean())


def run_demo(
    out_dir: str | Path,
    batch: int = 64,
    rounds: int = 20,
    progress: Progress = lambda stage: None,
    cifar10: str | Path | None = None,
) -> dict[str, Any]:
    """Run a shipped network against its dense twin and write what came out.

    It is the small VGG on the packaged images of Fashion-MNIST, or, where there is a folder with CIFAR-10,
    VGG16 with half of its filters on that (trained on JPEG copies; see `load_pretrained`).

    Written: report.json, speedup.png, topology.png and net.safetensors, the accelerated network.

    Args:
        out_dir: folder for the results; made where it does not exist.
        batch: images per timed call.
        rounds: interleaved rounds of each timing.
        progress: called with the name of each stage as it begins.
        cifar10: folder or archive of CIFAR-10, as `open_cifar` takes it.

    Returns:
        What report.json holds: accuracies on the 10,000 test images; weights and MACs of the converted
        convolutions and their reductions; median times of the whole networks in microseconds; a row
        per layer.

    Raises:
        ValueError: for a batch or a number of rounds below 1, a batch above the number of test images, or
            damaged files of images.
        OSError: if there are no images, or the folder cannot be written.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    data: DataName = "fashion-mnist" if cifar10 is None else "cifar10"
    test = open_data(data, cifar10).test
    if batch > len(test):
        raise ValueError(f"batch is {batch}; there are {len(test)} test images")
    out = made_folder(out_dir)

    progress("load the shipped networks")
    if cifar10 is None:
        sparse, dense = load_pretrained("lhc"), load_pretrained("dense")
    else:
        sparse, dense = load_pretrained("cifar10-lhc"), load_pretrained("cifar10-dense")
    ((images, labels),) = test.batches([torch.arange(len(test))])
    example = images[:batch]

    progress("plan and pack the learned topology, measuring each layer's backends")
    fast = lhc.accelerate(sparse, example, tune="full")
    counts = lhc.summary(sparse, tuple(example.shape)).converted
    # Its layers are whole; the fast network has lost the channels that its topology leaves dead.
    whole = lhc.accelerate(sparse, example, backend="dense", tune="off")
    topologies = [layer.topology for layer in whole.plan.layers if layer.topology.density < 1]

    progress("prepare the dense twin: batch norm folded, eager and compiled")
    peers, skipped = network_peers(dense, example)

    progress(f"classify {len(test):,} test images with both")
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
    layers = _layer_rows(fast, whole, example, rounds)

    report: dict[str, Any] = {
        "data": data,
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
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _layer_rows(
    fast: AcceleratedModel, dense: AcceleratedModel, example: Tensor, rounds: int
) -> list[dict[str, Any]]:
    """Return the rows of the planned layers, with measured times of each layer and its dense form."""
    inputs, dense_inputs = _layer_inputs(fast, example), _layer_inputs(dense, example)
    layers, twins = fast.fused_layers(), dense.fused_layers()
    learned = {row["layer"]: row for row in dense.report()["layers"] if row["density"] < 1}
    rows = []
    for row in fast.report()["layers"]:
        name = row["layer"]
        if name not in learned or name not in inputs or name not in dense_inputs:
            continue
        calls = {
            "dense": _call(twins[name], *dense_inputs[name]),
            "lhc": _call(layers[name], *inputs[name]),
        }
        times = time_paired(calls, rounds=rounds)
        as_learned = {key: learned[name][key] for key in ("density", "patterns", "macs", "live_macs")}
        rows.append(
            {**row, **as_learned, "dense_us": times["dense"].median_us, "lhc_us": times["lhc"].median_us}
        )
    return rows


def _layer_inputs(model: AcceleratedModel, example: Tensor) -> dict[str, tuple[Any, ...]]:
    """What each fused layer is called with, by its name."""
    inputs: dict[str, tuple[Any, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _module, args, name=name: inputs.__setitem__(name, args))
        for name, module in model.fused_layers().items()
    ]
    with torch.inference_mode():
        model(example)
    for handle in handles:
        handle.remove()
    return inputs


def _call(model: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    return lambda: model(*inputs)
