"""The logs of a run beside metrics.csv: layers.csv, and TensorBoard's files where they are asked for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lhc_triton.files import write_beside
from lhc_triton.training.metrics import EpochMetrics, LayerMetrics

_COLUMNS = [field.name for field in fields(LayerMetrics)]
_MAX_BYTES = 256 << 20
_SHAPES_SHOWN = 16


class RunLog:
    """Writes what the layers did in each epoch; a resumed run goes on after the epochs it has.

    Args:
        folder: of the run.
        rows: the epochs that the run has; what layers.csv holds of later ones is dropped.
        tensorboard: whether to write TensorBoard's files, into the folder ``tensorboard``.

    Raises:
        ValueError: layers.csv is damaged, or there is no tensorboard package.
    """

    def __init__(self, folder: Path, rows: Sequence[EpochMetrics], tensorboard: bool) -> None:
        self._path = folder / "layers.csv"
        self._lines = _read(self._path, {(row.stage, row.epoch) for row in rows})
        self._writer = _summary_writer(folder / "tensorboard") if tensorboard else None

    def write_layers(self, layers: Sequence[LayerMetrics]) -> None:
        """Add an epoch's layers to layers.csv; the file is written whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        self._lines += [{**asdict(layer), "shapes": json.dumps(layer.shapes)} for layer in layers]
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._lines)
        write_beside(self._path, text.getvalue().encode())

    def show(self, row: EpochMetrics, layers: Sequence[LayerMetrics]) -> None:
        """Give an epoch to TensorBoard: under the stage's name, and for each layer under the layer's."""
        if self._writer is None:
            return
        for name, value in asdict(row).items():
            if name not in ("stage", "epoch"):
                self._writer.add_scalar(f"{row.stage}/{name}", float(value), row.epoch)
        for layer in layers:
            for name in ("density", "mac_share", "patterns", "correlation"):
                tag = f"{row.stage} layers/{layer.layer}/{name}"
                self._writer.add_scalar(tag, float(getattr(layer, name)), row.epoch)
            self._writer.add_text(
                f"{row.stage} layers/{layer.layer}/shapes", _shape_table(layer.shapes), row.epoch
            )
        self._writer.flush()

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()


def _shape_table(shapes: Mapping[str, int]) -> str:
    """The most frequent kernel shapes and their numbers of blocks, as Markdown."""
    counts = list(shapes.items())
    lines = ["| shape | blocks |", "| --- | --- |"]
    lines += [f"| {shape} | {count} |" for shape, count in counts[:_SHAPES_SHOWN]]
    if counts[_SHAPES_SHOWN:]:
        lines.append(f"| others | {sum(count for _, count in counts[_SHAPES_SHOWN:])} |")
    return "\n".join(lines)


def _read(path: Path, known: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """The lines of a layers.csv that belong to known epochs."""
    if not path.exists():
        return []
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; up to {_MAX_BYTES} are supported")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)
        if reader.fieldnames != _COLUMNS:
            raise ValueError(f"its columns are {reader.fieldnames}")
        lines = list(reader)
        if any(None in line.values() or None in line for line in lines):
            raise ValueError("a line has too few or too many values")
        return [line for line in lines if (line["stage"], int(line["epoch"])) in known]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: a damaged log ({error}); delete it to go on without its epochs") from error


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard=true needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder))
