"""Many trainings from one file: the settings to vary, a run for each of them and for each seed, a report."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lhc_bench.reports.meaning import OF_BLOCKS, idle_settings
from lhc_triton.models.weights import read_tensors
from lhc_triton.training import PRESETS, TrainConfig, train
from lhc_triton.training.checkpoints import CHECKPOINT_KIND, CHECKPOINT_VERSION
from lhc_triton.training.config import NOTHING, OF_TARGET, read_config
from lhc_triton.training.data import ImageFormat, cifar, fashion, tree
from lhc_triton.training.identity import LAST, TOPOLOGY_ONLY, finished
from lhc_triton.training.metrics import EpochMetrics
from lhc_triton.training.networks import check_topology

MAX_RUNS = 1000
MAX_BYTES = 1 << 20
LONGEST_NAME = 120
BUILT_FROM = (
    *("data", "image_size", "factory", "network", "stem", "width", "widths"),
    *("topology", "parts", "pointwise_layers"),
    *OF_BLOCKS,
    "shapes",
)
"""Settings that say what network a run builds."""
PRUNED_TO = ("penalty", "density", "mac_budget")
"""Those that say how far a pruned one has to come down."""

Progress = Callable[[str], None]


def read_ablation(path: str | Path) -> dict[str, TrainConfig]:
    """Read the file of an ablation, and return its runs by the names of their folders.

    ::

        seeds = [0, 1, 2]            # default: the base's seed alone

        [base]                       # what all runs share
        preset = "fashion-vgg16"     # default: a TrainConfig's own defaults
        coarse_epochs = 10           # "none" stands for no value, as in the files of `train`

        [[grid]]                     # every combination of these values
        out_block = [16, 64, 128]
        shapes = ["free", "rigid"]

        [[grid]]                     # and these as well
        penalty = ["macs", "latency"]

    A value that is no list stands for a list of one. Without a grid there is the base alone. Combinations
    that come to the same settings are trained once: settings of the grid that mean nothing beside the others
    are left out, as ``parts`` where the topology is learned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML or holds something else; a setting is unknown or out of its range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; an ablation is a TOML file with [base] and [[grid]]")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes")
    try:
        return _runs(tomllib.loads(path.read_text(encoding="utf-8")))
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply") from error
    except (TypeError, ValueError) as error:  # broken TOML and broken UTF-8 are ValueErrors as well
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _runs(document: Mapping[str, Any]) -> dict[str, TrainConfig]:
    unknown = sorted(set(document) - {"seeds", "base", "grid"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of seeds, base, grid")
    base, seeds, grids = _base(document), document.get("seeds"), document.get("grid", [{}])
    seeds = [base.seed] if seeds is None else seeds
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"seeds is {seeds!r}, expected a list of whole numbers")
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        raise ValueError("grid is no list of tables; head each one with [[grid]]")
    runs: dict[str, TrainConfig] = {}
    # Seed by seed: one that is stopped early has tried everything before it repeats anything.
    for seed in seeds:
        for changes in (changes for grid in grids for changes in _combinations(grid)):
            meant, config = _run(base, {**changes, "seed": seed})
            if config not in runs.values():
                runs[_name(meant)] = config
            if len(runs) > MAX_RUNS:
                raise ValueError(f"more than {MAX_RUNS} runs; split the grid")
    return runs


def _base(document: Mapping[str, Any]) -> TrainConfig:
    given = document.get("base", {})
    if not isinstance(given, dict):
        raise ValueError("base is no table; head it with [base]")
    settings = dict(given)
    preset = settings.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    return _changed(TrainConfig() if preset is None else PRESETS[preset], settings)


def _combinations(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values, the last name changing fastest."""
    if "seed" in grid:
        raise ValueError("seed is in a grid; give seeds at the top of the file")
    for name, value in grid.items():
        if value == []:
            raise ValueError(f"{name} in a grid is an empty list; give it a value, or leave it out")
    choices = [value if isinstance(value, list) else [value] for value in grid.values()]
    for values in product(*choices):
        yield dict(zip(grid, values, strict=True))


def _run(base: TrainConfig, changes: Mapping[str, Any]) -> tuple[dict[str, Any], TrainConfig]:
    """The changes that mean something beside each other, and the settings they come to."""
    topology = changes.get("topology", base.topology)
    idle = idle_settings(topology, changes.get("density", base.density) not in (None, NOTHING))
    if idle & changes.keys():  # what is left out has to be in its range as well
        _changed(base, {**changes, "topology": "learned", "density": TrainConfig().density})
    meant = {name: value for name, value in changes.items() if name not in idle}
    # The rest keeps the base's value: runs that were trained before have it in their checkpoints.
    return meant, _changed(base, {**meant, **{k: v for k, v in OF_TARGET.items() if k in idle}})


def _changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    # JSON's numbers, booleans and lists are TOML's as well.
    return config.changed({k: v if isinstance(v, str) else json.dumps(v) for k, v in changes.items()})


def _name(changes: Mapping[str, Any]) -> str:
    """A folder's name that says what was changed."""
    text = ",".join(f"{name}={value}" for name, value in changes.items())
    name = re.sub(r"[^\w.,=+-]", "_", text)
    if len(name) > LONGEST_NAME or name != text:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def check_ablation(runs: Mapping[str, TrainConfig]) -> None:
    """Refuse runs whose network is too small for its images, or cannot have its topology; no data are read.

    Raises:
        ValueError: there are such runs; one line that names the first.
    """
    reasons: dict[tuple[Any, ...], str] = {}  # building takes up to half a second, and many are the same
    unsuited = {}
    for name, config in runs.items():
        settings = (*BUILT_FROM, *PRUNED_TO) if config.topology == "pruned" else BUILT_FROM
        key = tuple(getattr(config, setting) for setting in settings)
        if key not in reasons:
            try:
                check_topology(config, _image_format(config))
                reasons[key] = ""
            except ValueError as error:
                reasons[key] = " ".join(str(error).split())
        if reasons[key]:
            unsuited[name] = reasons[key]
    if unsuited:
        name, why = next(iter(unsuited.items()))
        raise ValueError(
            f"{len(unsuited)} of {len(runs)} runs cannot be trained; the first is {name}: {why}; "
            "leave them out of the grid"
        )


def _image_format(config: TrainConfig) -> ImageFormat:
    """What the data set's images will be, as far as a topology depends on it."""
    channels = 1 if config.data == "fashion-mnist" else 3
    sides = {"fashion-mnist": fashion.SIDE, "cifar10": cifar.SIDE, "cifar100": cifar.SIDE}
    size = config.image_size or sides.get(config.data, tree.DEFAULT_SIZE)
    return ImageFormat(channels, size, ("one", "other"), (0.0,) * channels, (1.0,) * channels)


@dataclass(frozen=True)
class Trained:
    """What `run_ablation` came to.

    Attributes:
        folders: of the runs that finished.
        failures: why each of the others did not, in one line, by the run's name.
    """

    folders: tuple[Path, ...]
    failures: Mapping[str, str]


def run_ablation(
    runs: Mapping[str, TrainConfig],
    out_dir: str | Path,
    progress: Progress,
    failed: Progress | None = None,
) -> Trained:
    """Train every run into its folder under ``out_dir``; one that is there already goes on, or is kept.

    Runs whose dense twins would be the same (same data, network, recipe and seed) share it: the first one
    trains it. A run that fails for its own settings (a loss that is not finite, too large a batch for the
    memory) lets the others go on, since the same call would stop at it again; those that need its dense twin
    fail as well if that was not trained to the end.

    Args:
        runs: what `read_ablation` gave.
        out_dir: folder for theirs.
        progress: called with a line before each run.
        failed: called with a line after each run that failed; None takes ``progress``.

    Raises:
        OSError: data are missing, or the disk is full; the runs before it are finished, and the same call
            goes on.
        ConnectionError: another process of the run was lost; the same call goes on.
    """
    out = Path(out_dir)
    failed = progress if failed is None else failed
    twins: dict[TrainConfig, str] = {}
    folders: list[Path] = []
    failures: dict[str, str] = {}
    for done, (name, config) in enumerate(runs.items(), start=1):
        progress(f"run {done} of {len(runs)}: {name}")
        folder, twin = out / name, dense_part(config)
        try:
            if config.dense_twin == "train":
                first = twins.setdefault(twin, name)
                if first != name and not _has_own_twin(folder):
                    if first in failures and not _has_dense(config, out / first):
                        raise ValueError(
                            f"it needs the dense twin of run {first}, which failed before that was trained"
                        )
                    config = replace(config, dense_twin=str(out / first))
            train(config, folder)
            folders.append(folder)
        except (ValueError, MemoryError) as error:
            failures[name] = " ".join(str(error).split())
            failed(f"run {name} failed: {failures[name]}")
            if twins.get(twin) == name and not (folder / LAST).exists():
                del twins[twin]  # it failed before it trained anything: the next one trains the twin
    return Trained(tuple(folders), failures)


def _has_own_twin(folder: Path) -> bool:
    """Whether a run is there that trains its dense twin itself: it did when the first one had failed."""
    try:
        return read_config(folder / "config.toml").dense_twin == "train"
    except (FileNotFoundError, ValueError):
        return False


def _has_dense(config: TrainConfig, folder: Path) -> bool:
    """Whether the dense network of a run that failed is trained to the end."""
    try:
        _, document = read_tensors(folder / LAST, CHECKPOINT_KIND, CHECKPOINT_VERSION)
        return finished(config, "dense", [EpochMetrics.from_dict(row) for row in document["rows"]])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return False


def dense_part(config: TrainConfig) -> TrainConfig:
    """The settings, those of the topology alone at their defaults: where equal, so are the dense twins."""
    kept = {name: value for name, value in config.to_dict().items() if name not in TOPOLOGY_ONLY}
    return TrainConfig.from_dict(kept)
