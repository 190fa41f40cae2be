"""Looking on while a network runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """A mode that sees every operator, from scripted code too, and is told of convolution layers.

    A plain mode imports torch._dynamo at the first operator, to keep it from compiling the mode: that takes a
    second. This one does not.

    Attributes:
        inside: how many convolution layers are running, one inside another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @contextmanager
    def convolution(self) -> Iterator[None]:
        """Count what runs meanwhile as a convolution layer's: its operator, and what computes its weight."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def convolved(self, name: str, conv: _ConvNd, given: Any, output: Any) -> None:
        """Learn what a convolution layer has made of its input."""
