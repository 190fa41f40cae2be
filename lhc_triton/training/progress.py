"""Progress of a run on the terminal: a bar with the time left, and a line for each epoch."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

from lhc_triton.training.metrics import EpochMetrics


class Progress(Protocol):
    """What the training loop tells."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: Any) -> None: ...
    def step(self, stage: str, epoch: int, epochs: int, loss: float | None) -> None:
        """One training step is done; its loss may not be known."""

    def epoch(self, row: EpochMetrics, epochs: int) -> None:
        """One epoch is done."""

    def say(self, text: str) -> None:
        """Something worth a line."""


class Silence:
    """Progress for nobody."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def step(self, stage: str, epoch: int, epochs: int, loss: float | None) -> None:
        """Say nothing."""

    def epoch(self, row: EpochMetrics, epochs: int) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""


class TerminalProgress:
    """Progress on stderr; where that is no terminal, only the lines.

    Args:
        steps: of the whole run.
        done: steps that an earlier part of the run has done.
    """

    def __init__(self, steps: int, done: int = 0) -> None:
        # Imported here: rich is wanted only where something is shown.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, stage: str, epoch: int, epochs: int, loss: float | None) -> None:
        """Move the bar on."""
        text = None if loss is None else f"{stage} {epoch + 1}/{epochs} loss {loss:.3f}"
        self._bar.update(self._task, advance=1, description=text)

    def epoch(self, row: EpochMetrics, epochs: int) -> None:
        """Print the epoch's line."""
        parts = [f"{row.stage:6} {row.epoch + 1:3}/{epochs}", f"loss {row.task_loss:.4f}"]
        if row.stage != "dense":
            parts += [f"density {row.density:.4f}", f"MACs {row.mac_density:.4f}"]
        parts += [f"accuracy {row.val_accuracy:.4f}", f"{row.seconds:.1f} s"]
        if row.warming_up:
            parts.append("warming up")
        self._console.print("  ".join(parts))

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text)
