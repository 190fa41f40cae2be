"""A report as one HTML page: text escaped, pictures inlined, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lhc_bench.reports.experiment_rows import Experiment, RunRow
from lhc_triton.training.networks import network_name

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 1rem; font-size: 0.87rem; }
td { font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
img { display: block; max-width: 100%; height: auto; background: white; border-radius: 4px; margin: 1rem 0; }
code { font-size: 0.87rem; overflow-wrap: anywhere; }
.note { opacity: 0.75; font-size: 0.87rem; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows, for those who cannot see it."""

    path: Path
    shows: str


@dataclass(frozen=True)
class Section:
    """A heading with pictures, and the experiment they are of."""

    title: str
    experiment: Experiment | None
    pictures: tuple[Picture, ...]


def page(
    experiments: Sequence[Experiment],
    env: Mapping[str, Any],
    batch: int,
    rounds: int,
    sections: Iterable[Section],
) -> str:
    """Return the page.

    Args:
        experiments: rows of the first two tables.
        env: where the report was made; see `rows.environment`.
        batch: images of a predicted or measured call.
        rounds: of a timing; 0 where nothing was measured.
        sections: what follows the tables; their pictures are read and inlined.

    Raises:
        OSError: a picture cannot be read.
    """
    configs = [experiment.first.run.config for experiment in experiments]
    networks = ", ".join(dict.fromkeys(f"{network_name(config)} on {config.data}" for config in configs))
    several = any(len(experiment.rows) > 1 for experiment in experiments)
    parts = [
        f"<h1>Learned topologies: {escape(networks)}</h1>",
        # Two tables: side by side their columns would not fit on a screen.
        _table(RESULTS, [_result_cells(experiment) for experiment in experiments]),
        _table(SIZES, [_size_cells(experiment) for experiment in experiments]),
        _paragraph(_explanation(batch, rounds, several, env), "note"),
    ]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.experiment is not None:
            parts.append(_told(section.experiment))
        parts += [_image(picture) for picture in section.pictures]
        if section.experiment is not None:
            parts.append(_layers(section.experiment.first))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Learned topologies</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


RESULTS = (
    "setting", "runs", "dense accuracy, %", "LHC accuracy, %", "gain, points", "predicted on CPU",
    "modelled on H100", "measured",
)  # fmt: skip
SIZES = (
    "setting", "density, converted layers", "fewer weights, converted layers", "fewer MACs, converted layers",
    "patterns of filter groups", "weights, whole network", "fewer weights, whole network",
    "MACs, whole network", "fewer MACs, whole network",
)  # fmt: skip


def _result_cells(experiment: Experiment) -> list[str]:
    return [
        experiment.label,
        str(len(experiment.rows)),
        spread_text(experiment, "dense_accuracy", 2, 100),
        spread_text(experiment, "lhc_accuracy", 2, 100),
        spread_text(experiment, "gain", 2, 100, sign=True),
        *(
            spread_text(experiment, name, 2, unit="x")
            for name in ("predicted_cpu", "predicted_cuda", "measured")
        ),
    ]


def _size_cells(experiment: Experiment) -> list[str]:
    first = experiment.first
    return [
        experiment.label,
        spread_text(experiment, "density", 3),
        spread_text(experiment, "weight_reduction", 2, unit="x"),
        spread_text(experiment, "mac_reduction", 2, unit="x"),
        f"{spread_text(experiment, 'patterns', 0)} of {first.groups}",
        f"{short(first.weights)} to {short(first.live_weights)}",
        spread_text(experiment, "network_weight_reduction", 2, unit="x"),
        f"{short(first.macs)} to {short(first.live_macs)}",
        spread_text(experiment, "network_mac_reduction", 2, unit="x"),
    ]


def spread_text(
    experiment: Experiment, name: str, digits: int, factor: float = 1, unit: str = "", sign: bool = False
) -> str:
    """Write a number's mean, and its spread where several runs have it; a dash where none has it."""
    mean, spread = experiment.mean(name), experiment.spread(name)
    if mean is None:
        return "–"
    text = f"{factor * mean:{'+' if sign else ''}.{digits}f}{unit}"
    return text if spread is None else f"{text} ± {factor * spread:.{digits}f}"


def short(count: int) -> str:
    """Write a count with three digits and the unit that fits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _explanation(batch: int, rounds: int, several: bool, env: Mapping[str, Any]) -> str:
    text = "MACs are for one image. The whole network has its dense layers beside the converted ones. "
    if several:
        text += "± is the standard deviation over the seeds; counts without it are those of the first seed. "
    text += f"Times are for {batch} images. Predicted and modelled: the converted convolutions alone, by the "
    text += "cost models (CPU: float32; H100: float16, on paper). Measured: "
    if not rounds:
        return text + "nothing in this report."
    text += f"the whole network against its fastest dense form, medians of {rounds} interleaved rounds on "
    text += str(env["device"])
    text += f", {env['threads']} threads." if env["device_kind"] == "cpu" else "."
    return text


def _told(experiment: Experiment) -> str:
    """Say how the runs were made and what they lack."""
    notes = []
    for row in experiment.rows:
        run = row.run
        if run.command is not None:
            notes.append(f"{escape(run.name)}: <code>{escape(run.command)}</code>")
        if row.training_images is not None:
            notes.append(f"{escape(run.name)}: trained on {row.training_images:,} images")
        if not run.density_reached:
            aim = f"the share of {run.config.penalty} is not within 0.01 of the target {run.config.target}"
            notes.append(escape(f"{run.name}: {aim}"))
        if row.measured is not None:
            timed = row.measured
            text = f"{run.name}: {timed.lhc_us / 1000:.2f} ms against {timed.dense_us / 1000:.2f} ms"
            notes.append(escape(f"{text} ({timed.source})"))
            notes += [escape(f"{run.name}: no {peer}: {reason}") for peer, reason in timed.skipped.items()]
        notes += [escape(f"{run.name}: {note}") for note in run.notes]
    return '<p class="note">' + "<br>\n".join(notes) + "</p>"


def _layers(row: RunRow) -> str:
    header = ("layer", "shape", "kernel", "density", "live weights", "live MACs", "patterns of filter groups")
    cells = []
    for topology in row.topologies:
        geometry = topology.geometry
        cells.append(
            [
                topology.name,
                f"{geometry.in_channels} → {geometry.out_channels}",
                "x".join(map(str, geometry.kernel)),
                f"{topology.density:.3f}",
                short(topology.live_weights),
                short(topology.live_macs // geometry.batch),
                f"{len(topology.patterns)} of {topology.groups}",
            ]
        )
    summary = f"Layers of {row.run.name}"
    return f"<details><summary>{escape(summary)}</summary>\n{_table(header, cells)}\n</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _paragraph(text: str, kind: str) -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(picture.shows)}" src="data:image/png;base64,{data}">'
