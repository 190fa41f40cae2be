"""Looking on while a network runs."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """A mode that sees every operator, from scripted code too, and does not load torch's compiler for it.

    A plain mode imports torch._dynamo at the first operator, to keep it from compiling the mode: a second for
    whoever has nothing compiled.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
