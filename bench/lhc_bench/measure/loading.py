"""How fast training is fed: images a second, decoded, augmented and prefetched, by worker threads."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lhc_bench.files import check_writable
from lhc_bench.measure.rows import check_fields, environment, read_document, read_rows, write_document
from lhc_bench.measure.setting import Progress, Request, Timer
from lhc_triton.runtime.choosing.timing import Timing, time_paired
from lhc_triton.training.data import Augmentation, Source, open_data
from lhc_triton.training.data.prefetch import ahead

SUITE = "loading"
WORKERS = (0, 1, 2, 4, 8)
PICTURES, CLASSES = 192, 8
WIDTH, HEIGHT, QUALITY = 500, 375, 90
BATCH, MEMORY_BATCH = 12, 128  # small ones for files, so that the pipeline's start and end weigh little
ROUNDS, BUDGET_S = 5, 20.0

AUGMENTATIONS: dict[str, Augmentation] = {"train": "standard", "evaluation": "none", "memory": "standard"}
DECODE = "decode"
_POSITIVE = ("width", "height", "batch", "images", "images_per_s", "p20_images_per_s", "p80_images_per_s")
_OCTAVES, _SWING, _FALL = (4, 32, 128, 512), 0.5, 0.8


@dataclass(frozen=True)
class LoadingRow:
    """One measurement: a pass over all images of a source, nothing being done with the batches.

    Attributes:
        case: what was measured, for example "train/2 workers".
        kind: "train", random crops of image files; "evaluation", their middles; "memory", Fashion-MNIST's
            images; "decode", Pillow alone on the same files, in one thread.
        augmentation: as the data sources name it.
        width, height: of the images that are delivered, in pixels.
        batch: images in a batch.
        images: in a pass.
        workers: threads that prepare batches ahead; 0: the thread that takes them.
        images_per_s: median over the rounds.
        p20_images_per_s, p80_images_per_s: a fifth and four fifths of the rounds were at most this fast.
        decode_share: images_per_s over that of "decode"; None where nothing is decoded.
    """

    case: str
    kind: str
    augmentation: str
    width: int
    height: int
    batch: int
    images: int
    workers: int
    images_per_s: float
    p20_images_per_s: float
    p80_images_per_s: float
    decode_share: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, _POSITIVE)
        if self.kind not in (*AUGMENTATIONS, DECODE):
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join((*AUGMENTATIONS, DECODE))}")
        if not self.p20_images_per_s <= self.images_per_s <= self.p80_images_per_s:
            raise ValueError("images_per_s is not from p20_images_per_s to p80_images_per_s")


@dataclass(frozen=True)
class LoadingResults:
    """What results.json holds.

    Attributes:
        env: where and how it was measured; see `environment`. "cpus" and "pictures" say more.
        rows: the measurements; the one of bare decoding is always among them.
        summary: {"decode_images_per_s", "kinds"}; for each kind its fastest row's "images_per_s" and
            "workers", and "scaling", that rate over the one with the fewest workers.
    """

    env: dict[str, Any]
    rows: tuple[LoadingRow, ...]
    summary: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form: {"env", "rows", "summary"}."""
        return {"env": self.env, "rows": [asdict(row) for row in self.rows], "summary": self.summary}


@dataclass(frozen=True)
class _Case:
    kind: str
    workers: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.workers} workers"


def run_loading(
    out_dir: str | Path,
    progress: Progress = lambda done, total, label: None,
    seed: int = 0,
    timer: Timer = time_paired,
    only: str = "",
) -> dict[str, Any]:
    """Measure how fast batches are delivered, and write results.json and results.csv.

    Photographs are made in a temporary folder and opened as training opens a tree of image files. Each call
    that is timed takes all of their batches once, and does nothing with them: what is measured is the most
    that training could be fed with. The files lie in the page cache, so no disk takes part.

    Args:
        out_dir: folder for the results; made where it does not exist.
        progress: called with (passes begun, all of them, the one that begins); first with photographs.
        seed: of photographs, order and crops.
        timer: measures as `lhc_triton.runtime.choosing.timing.time_paired` does.
        only: measure the cases whose names contain this, beside bare decoding.

    Returns:
        What results.json holds: {"env", "rows", "summary"}; see `LoadingResults`.

    Raises:
        ValueError: no case with that name, or a negative seed; nothing is written then.
        OSError: if the folder, or the temporary one, cannot be written.
    """
    cpus = len(os.sched_getaffinity(0))
    known = _cases(cpus)
    cases = [case for case in known if only in case.name]
    if not cases:
        names = "; ".join(case.name for case in known)
        raise ValueError(f"no case of suite {SUITE!r} has {only!r} in its name; the cases are {names}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    out = Path(out_dir)
    check_writable(out)

    with tempfile.TemporaryDirectory() as folder:
        files = make_photographs(Path(folder), seed, cpus, progress)
        sources = _sources(Path(folder))
        calls: dict[str, Callable[[], None]] = {DECODE: partial(_decode, files)}
        for case in cases:
            calls[case.name] = partial(_deliver, case, sources[case.kind], seed)
        times = timer(_shown(calls, progress), rounds=ROUNDS, warmup=1, device="cpu", budget_s=BUDGET_S)
        progress(1, 1, "done")
        mean_bytes = round(sum(file.stat().st_size for file in files) / len(files))
    rows = [_decode_row(times[DECODE], len(files))]
    rows += [_row(case, sources[case.kind], times[case.name], rows[0].images_per_s) for case in cases]
    made = [len(timing.samples_us) for timing in times.values()]
    env = environment(
        suite=SUITE,
        rounds=ROUNDS,
        rounds_made=[min(made), max(made)],
        seed=seed,
        cpus=cpus,
        pictures={
            "files": len(files),
            "width": WIDTH,
            "height": HEIGHT,
            "quality": QUALITY,
            "mean_bytes": mean_bytes,
        },
        notes=[],
    )
    results = LoadingResults(env, tuple(rows), _summarise(rows)).to_dict()
    write_document(out, results, [item.name for item in fields(LoadingRow)])
    return results


@dataclass(frozen=True)
class LoadingSuite:
    """The suite "loading", as the other suites are; see `run_loading`."""

    device: str = "cpu"

    def run(self, request: Request) -> dict[str, Any]:
        """Measure, and write; see `run_loading`."""
        return run_loading(request.out, request.progress, request.seed, request.timer, request.only)


def make_photographs(
    root: Path, seed: int, threads: int, progress: Progress = lambda done, total, label: None
) -> list[Path]:
    """Make a tree root/train/CLASS/FILE of JPEGs that are as large as photographs; root/test is the same.

    Their noise falls with its frequency, as in photographs, so that they compress like those.

    Args:
        root: an empty folder.
        seed: of the pixels.
        threads: that make them.
        progress: called with (made, of all, "photographs").

    Returns:
        The files.
    """
    for label in range(CLASSES):
        (root / "train" / f"class{label}").mkdir(parents=True)
    (root / "test").symlink_to("train")

    def make(index: int) -> Path:
        path = root / "train" / f"class{index % CLASSES}" / f"{index:04d}.jpg"
        _photograph(np.random.default_rng((seed, index))).save(path, quality=QUALITY)
        return path

    files = []
    for path in ahead(make, range(PICTURES), threads):
        files.append(path)
        progress(len(files), PICTURES, "photographs")
    return files


def _photograph(rng: np.random.Generator) -> Image.Image:
    pixels = np.full((HEIGHT, WIDTH, 3), 127.5, dtype=np.float32)
    for octave, side in enumerate(_OCTAVES):
        noise = Image.fromarray(rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8))
        smooth = np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels += (smooth - 127.5) * (_SWING * _FALL**octave)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _cases(cpus: int) -> list[_Case]:
    """Up to two workers for each CPU: more have nothing to run on."""
    counts = [count for count in WORKERS if count <= 2 * cpus]
    return [*(_Case(kind, count) for kind in ("train", "evaluation") for count in counts), _Case("memory", 0)]


def _sources(folder: Path) -> dict[str, Source]:
    photographs = open_data("folder", folder)
    return {
        "train": photographs.train,
        "evaluation": photographs.test,
        "memory": open_data("fashion-mnist").train,
    }


def _decode(files: Sequence[Path]) -> None:
    for file in files:
        with Image.open(file) as image:
            image.load()


def _deliver(case: _Case, source: Source, seed: int) -> None:
    """Take all batches of a source: in random order for training, in their own for evaluation."""
    order = torch.arange(len(source))
    if case.kind != "evaluation":
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    batches = source.batches(
        order.split(_batch(case.kind)),
        augmentation=AUGMENTATIONS[case.kind],
        epoch_seed=seed,
        workers=case.workers,
    )
    for _ in batches:
        pass


def _batch(kind: str) -> int:
    return MEMORY_BATCH if kind == "memory" else BATCH


def _shown(calls: Mapping[str, Callable[[], None]], progress: Progress) -> dict[str, Callable[[], None]]:
    """The same functions, which tell when they begin."""
    total = len(calls) * (ROUNDS + 1)
    begun = itertools.count()

    def shown(name: str, call: Callable[[], None]) -> None:
        progress(min(next(begun), total), total, name)
        call()

    return {name: partial(shown, name, call) for name, call in calls.items()}


def _rates(timing: Timing, images: int) -> tuple[float, float, float]:
    """Images a second: median, and what a fifth and four fifths of the rounds did not exceed."""
    median, slow, fast = (
        images / time_us * 1e6 for time_us in (timing.median_us, timing.p80_us, timing.p20_us)
    )
    return median, slow, fast


def _decode_row(timing: Timing, images: int) -> LoadingRow:
    return LoadingRow(DECODE, DECODE, "none", WIDTH, HEIGHT, 1, images, 0, *_rates(timing, images), 1.0)


def _row(case: _Case, source: Source, timing: Timing, decode_rate: float) -> LoadingRow:
    rates, size = _rates(timing, len(source)), source.format.size
    return LoadingRow(
        case=case.name,
        kind=case.kind,
        augmentation=AUGMENTATIONS[case.kind],
        width=size,
        height=size,
        batch=_batch(case.kind),
        images=len(source),
        workers=case.workers,
        images_per_s=rates[0],
        p20_images_per_s=rates[1],
        p80_images_per_s=rates[2],
        decode_share=None if case.kind == "memory" else rates[0] / decode_rate,
    )


def _summarise(rows: Sequence[LoadingRow]) -> dict[str, Any]:
    kinds = {}
    for kind in AUGMENTATIONS:
        mine = [row for row in rows if row.kind == kind]
        if mine:
            best, fewest = max(mine, key=lambda row: row.images_per_s), min(mine, key=lambda row: row.workers)
            kinds[kind] = {
                "images_per_s": best.images_per_s,
                "workers": best.workers,
                "scaling": best.images_per_s / fewest.images_per_s,
            }
    return {"decode_images_per_s": rows[0].images_per_s, "kinds": kinds}


def read_loading(path: str | Path) -> LoadingResults:
    """Read and check a results.json of this suite.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: one line that names the file and what is wrong with it.
    """
    return read_document(path, _checked)


def _checked(found: dict[str, Any]) -> LoadingResults:
    rows = read_rows(LoadingRow, found["rows"])
    if sum(row.kind == DECODE for row in rows) != 1:
        raise ValueError(f'it needs one row of the kind "{DECODE}", which the others are compared with')
    cpus = found["env"].get("cpus")
    if not isinstance(cpus, int) or isinstance(cpus, bool) or cpus < 1:
        raise ValueError(f'"cpus" in "env" is {cpus!r}, expected an integer above 0')
    return LoadingResults(found["env"], rows, found["summary"])
