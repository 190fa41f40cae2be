"""Reading the folders that training leaves: settings, result, curves, networks; all of it checked."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhc_bench.reports.meaning import idle_settings
from lhc_triton.files import parse_json
from lhc_triton.training import TrainConfig, read_config
from lhc_triton.training.identity import TOPOLOGY_ONLY

MAX_TEXT_BYTES = 256 << 20
MAX_NUMBER = 1e15
NOT_A_SETTING = ("seed", "device", "workers", "dense_twin", "tensorboard", "on_bad_file")
"""Fields of a TrainConfig that do not make two runs different experiments."""

MAY_DIFFER = {*NOT_A_SETTING, *TOPOLOGY_ONLY, "data_folder", "precision"} - {"seed"}
"""Fields in which a run may differ from the one that its dense twin was taken over from."""

METRICS = {
    "stage": str,
    "epoch": int,
    "task_loss": float,
    "density": float,
    "mac_density": float,
    "val_accuracy": float,
}
LAYERS = {"stage": str, "epoch": int, "layer": str, "density": float, "correlation": float}
SHARES = ("density", "mac_density", "val_accuracy")


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it.

    Attributes:
        folder: where it lies.
        config: its settings.
        dense_accuracy: share of the test images that the dense twin puts into their class; None without one.
        lhc_accuracy: the same of the network of learned topology.
        density_reached: whether the density is within 0.01 of the target.
        seconds: spent on training.
        command: the command line that makes the run, where one does.
        epochs: rows of metrics.csv, columns as in METRICS; the dense ones may be those of a run beside it
            whose twin it took over.
        layers: rows of layers.csv, columns as in LAYERS; empty where the run has no such file.
        notes: what the folder lacks, for people.
    """

    folder: Path
    config: TrainConfig
    dense_accuracy: float | None
    lhc_accuracy: float
    density_reached: bool
    seconds: float
    command: str | None
    epochs: tuple[Mapping[str, Any], ...]
    layers: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def setting(self) -> dict[str, Any]:
        """The settings that make it the experiment it is; runs of other seeds have equal ones."""
        return {k: v for k, v in self.config.to_dict().items() if k not in NOT_A_SETTING}

    @property
    def meaning(self) -> dict[str, Any]:
        """Those of the settings that mean something beside the others."""
        idle = idle_settings(self.config.topology, self.config.density is not None)
        return {k: v for k, v in self.setting.items() if k not in idle}

    @property
    def density_target(self) -> float | None:
        """The share of the weights that was aimed at; None where the aim was none, or another."""
        return self.config.target if self.config.penalty == "weights" else None

    @property
    def lhc_file(self) -> Path:
        """Weights of the network of learned topology."""
        return self.folder / "lhc.safetensors"

    @property
    def dense_file(self) -> Path | None:
        """Weights of the dense twin; None without one."""
        return None if self.dense_accuracy is None else self.folder / "dense.safetensors"


def run_folders(given: Iterable[str | Path], say: Callable[[str], None]) -> list[Path]:
    """The folders of runs that are meant by ``runs/*``, where ablations and reports may lie beside runs.

    Args:
        given: folders. One that holds those of runs, as `ablate` leaves it, stands for the finished ones of
            them; one that holds a report is left out. Any other stays, for `read_run` to take or refuse.
        say: told in a line what was left out, and why.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = []
    for folder in map(Path, given):
        inside = []
        if folder.is_dir() and not _holds_run(folder):
            inside = sorted(child for child in folder.iterdir() if _holds_run(child))
        if inside:
            for child in inside:
                if (child / "result.json").is_file():
                    found.append(child)
                else:
                    say(f"{child}: a run that is not finished, left out")
        elif (folder / "report.json").is_file() and not _holds_run(folder):
            say(f"{folder}: a report, left out")
        else:
            found.append(folder)
    return found


def _holds_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def read_run(folder: str | Path) -> Run:
    """Read and check what `lhc_triton.training.train` left in a folder; the weights are not read yet.

    Raises:
        FileNotFoundError: the folder, or a file that every finished run has, is missing.
        ValueError: a file is damaged; one line that names it and what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of a run; give folders that `train` wrote")
    config = read_config(folder / "config.toml")
    path = folder / "result.json"
    result = _result(path)
    epochs = _table(folder / "metrics.csv", METRICS)
    notes = []
    layers: tuple[Mapping[str, Any], ...] = ()
    if (folder / "layers.csv").exists():
        layers = _table(folder / "layers.csv", LAYERS)
    else:
        notes.append("no layers.csv: its mask correlations are not shown")
    if result["dense_accuracy"] is not None and not any(row["stage"] == "dense" for row in epochs):
        twin = _twin_epochs(folder, config)
        epochs = (*twin, *epochs)
        if not twin:
            notes.append(f"no curve of its dense twin: that of {config.dense_twin} is not beside")
    run = Run(folder, config, **result, epochs=epochs, layers=layers, notes=tuple(notes))
    for weights in filter(None, (run.lhc_file, run.dense_file)):
        if not weights.is_file():
            raise FileNotFoundError(f"no file {weights}: the run in {folder} is not complete")
    return run


def _twin_epochs(folder: Path, config: TrainConfig) -> tuple[Mapping[str, Any], ...]:
    """The dense epochs of the run that a dense twin was taken over from, if its folder lies beside."""
    twin = folder.resolve().parent / Path(config.dense_twin).name
    if not (twin / "metrics.csv").is_file() or not (twin / "config.toml").is_file():
        return ()
    theirs, mine = read_config(twin / "config.toml").to_dict(), config.to_dict()
    if any(theirs[name] != mine[name] for name in mine if name not in MAY_DIFFER):
        return ()
    return tuple(row for row in _table(twin / "metrics.csv", METRICS) if row["stage"] == "dense")


def _result(path: Path) -> dict[str, Any]:
    """The checked fields of result.json that a Run has."""
    try:
        found = parse_json(_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object")
    reached, command = found.get("density_reached"), found.get("command")
    if not isinstance(reached, bool):
        raise ValueError(f"{path}: density_reached is {reached!r}, expected true or false")
    if not isinstance(command, str | None):
        raise ValueError(f"{path}: command is {command!r}, expected a text")
    dense = found.get("dense_accuracy")
    return {
        "dense_accuracy": None if dense is None else _number(path, "dense_accuracy", dense, 1.0),
        "lhc_accuracy": _number(path, "lhc_accuracy", found.get("lhc_accuracy"), 1.0),
        "density_reached": reached,
        "seconds": _number(path, "seconds", found.get("seconds")),
        "command": command,
    }


def _number(path: Path, name: str, value: object, most: float = MAX_NUMBER) -> float:
    # Compared before it is converted: JSON's whole numbers may be larger than any float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{path}: {name} is {repr(value)[:40]}, expected a number from 0 to {most:g}")
    return float(value)


def _table(path: Path, columns: Mapping[str, type]) -> tuple[Mapping[str, Any], ...]:
    """The rows of a CSV file, its columns of these names converted; others are left out."""
    reader = csv.DictReader(_text(path).splitlines())
    try:
        names, lines = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error})") from error
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"{path}: has no column {missing[0]!r}")
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append({name: _cell(name, line[name], kind) for name, kind in columns.items()})
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no epoch")
    return tuple(rows)


def _cell(name: str, text: str | None, kind: type) -> Any:
    try:
        value = kind(text)
        if kind is int:
            fits = 0 <= value <= MAX_NUMBER
        else:
            fits = kind is str or (math.isfinite(value) and (name not in SHARES or 0 <= value <= 1))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{name} is {text!r}")
    return value


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {path.parent} is not the folder of a finished run")
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: {size} bytes; up to {MAX_TEXT_BYTES} are supported")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text ({error})") from error
