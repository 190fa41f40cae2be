"""The run on the example from which both planning and tracing learn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from lhc_triton.runtime.network.copying import has_hooks
from lhc_triton.runtime.network.left_out import Elsewhere
from lhc_triton.runtime.network.tracing import Shapes, TraceError, record_shapes, trace
from lhc_triton.runtime.network.trials import Observed


class ExampleRun:
    """Runs a model's copy, as a graph where torch.fx can trace it, and keeps what is seen of that.

    It is called once, with the example, in the place of the copy.

    Args:
        work: the copy.
        observed: what the model does.

    Attributes:
        graph: the traced copy, or None.
        untraced: why there is none, in one phrase.
        shapes: what each of its nodes was.
        output: its output.
        elsewhere: counts the convolutions outside the copy's layers, where it watches the run.
    """

    def __init__(self, work: nn.Module, observed: Observed) -> None:
        self._work = work
        self.graph: fx.GraphModule | None = None
        self.untraced = why_not_traced(work, observed)
        self.shapes: Shapes = {}
        self.output: Any = None
        self.elsewhere = Elsewhere()
        if self.untraced is None:
            try:
                self.graph = trace(work, len(observed.trials[0].inputs))
            except TraceError as failure:
                self._give_up(failure)

    def _give_up(self, failure: TraceError) -> None:
        self.graph, self.untraced = None, f"torch.fx could not trace the model ({failure})"

    def __call__(self, *inputs: Tensor) -> None:
        """Run on copies of the example, to which the model may write."""
        if self.graph is not None:
            try:
                self.shapes, self.output = record_shapes(self.graph, inputs)
                return
            except TraceError as failure:
                self._give_up(failure)
                self.elsewhere.calls = 0
        self._work(*(value.clone() for value in inputs))


def why_not_traced(work: nn.Module, observed: Observed) -> str | None:
    """Say why a model's own code has to run, where a graph would miss part of what it does."""
    if "forward" in vars(work) or _calls_otherwise(work):
        return "the model is called by other code than its class's forward"
    hooked = [name for name, module in work.named_modules() if name and has_hooks(module)]
    if hooked:
        return f"module {hooked[0]!r} has forward hooks, which are kept"
    if observed.random:
        return "forward draws random numbers"
    if observed.varies:
        return "two runs of the model on one input differ, by state that it keeps"
    return "forward switches autocast on" if observed.autocast else None


def _calls_otherwise(model: nn.Module) -> bool:
    return type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule)
