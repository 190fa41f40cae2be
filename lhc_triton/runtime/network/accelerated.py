"""The accelerated network, and what it tells about itself."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from lhc_triton.planning.network_plan import Plan
from lhc_triton.runtime.network.calling import Parameters, Settled
from lhc_triton.runtime.network.grouped import check_move
from lhc_triton.runtime.network.record import Record, si, sum_of, table_of
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.replay.cpu_recordings import Tapes, why_not_recordable
from lhc_triton.runtime.replay.cuda_graphs import Graphs


def _goes_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# torch.compile's tracer, which the exporter tries as well, would take the answer to be no.
_goes_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


class AcceleratedModel(nn.Module):
    """A network for inference whose convolutions run as planned; made by ``accelerate`` and ``load``.

    It takes what the model took, by position or by name, any batch and image size included; a traced network
    takes as many arguments as its example had, and tensors where that had tensors. Attributes of the model
    that are plain data (numbers, texts, lists and dicts of them) can be read from it: of a traced network as
    they were, and they cannot be set. It stays in eval mode and has no gradients.
    Calls are recorded and replayed, so that Python costs nothing between the layers: on a GPU in
    CUDA graphs, see `cuda_graphs.Graphs` for who owns the output (the caller) and what concurrent callers get
    (turns); on the CPU by `cpu_recordings.Tapes`, where the native kernel could be built and the graph is one
    of common operations.

    Attributes:
        network: the rewritten network.
        plan: the plan in force.
        record: how it was made.
        attributes: plain data that the model had as attributes, by name.
        graphs: its CUDA graphs; None to launch every kernel by itself.
        tapes: its recordings on the CPU; None to call every layer from Python.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        record: Record,
        graphs: bool = True,
        attributes: Mapping[str, Any] | None = None,
        fixed: Collection[str] = (),
        settled: Settled | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.plan = plan
        self.record = record
        self.attributes = dict(attributes or {})
        self._parameters_of_forward = (
            Parameters(record.model, network, len(record.inputs), settled or Settled())
            if isinstance(network, fx.GraphModule)
            else None
        )
        self.graphs = Graphs() if graphs else None
        self._unrecordable = why_not_recordable(network) if graphs else None
        self.tapes = Tapes() if graphs and self._unrecordable is None else None
        self.train(False)
        self._fixed = frozenset({*self.attributes, *fixed} - {*vars(self), *dir(type(self))})

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network on what the model would take.

        Raises:
            TypeError: a traced network is given other arguments than its example had.
            RuntimeError: derivatives are asked for in forward mode.
        """
        if _goes_to_onnx():
            raise RuntimeError(
                "an accelerated network has no ONNX form, since its sparse layers are operators of ours:"
                " export the model that it was made from, a converted or pruned one after lhc.to_dense(model)"
            )
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
            raise RuntimeError(
                "an accelerated network has no derivatives, those of forward mode (torch.func.jvp) included; "
                "take them of the model that it was made from"
            )
        if self._parameters_of_forward is not None:
            inputs, named = self._parameters_of_forward.bind(inputs, named)
        if named:
            return self.network(*inputs, **named)
        if torch.compiler.is_compiling():
            return self.network(*inputs)
        # Under no_grad an operator whose backward is written in Python, as ours is, would still spend 10 us
        # in autograd's layer at every call.
        skip = contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
        with skip:
            for replays in (self.graphs, self.tapes):
                if replays is not None and replays.applies(inputs):
                    return replays.run(self.network, inputs)
            return self.network(*inputs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_fixed", ()):
            if isinstance(self.network, fx.GraphModule):
                raise AttributeError(
                    f"{name!r} is fixed in the accelerated network: set it on the model, and accelerate again"
                )
            setattr(self.network, name, value)
            self.attributes.pop(name, None)
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "network" not in self._modules:
                raise
        # Where the model's own code runs, it may change its attributes.
        if not isinstance(self.network, fx.GraphModule) and hasattr(self.network, name):
            return getattr(self.network, name)
        if name in self.attributes:
            return self.attributes[name]
        raise AttributeError(
            f"an accelerated network has no {name!r}: it has the computation of {self.record.model}, and its "
            f"attributes that are plain data; take {name!r} from the model itself"
        )

    def train(self, mode: bool = True) -> AcceleratedModel:
        """Stay in eval mode, whatever ``mode`` says: train the model, then accelerate it again."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AcceleratedModel:
        check_move(self, fn)  # all layers can follow, or none moves
        for replays in (self.graphs, self.tapes):
            if replays is not None:
                replays.clear()
        return super()._apply(fn, recurse)

    def fused_layers(self) -> dict[str, FusedConv2d]:
        """Return the fused convolutions by name; shared ones once."""
        return {name: m for name, m in self.network.named_modules() if isinstance(m, FusedConv2d)}

    def report(self) -> dict[str, Any]:
        """Return what runs where and why, as plain data ready for JSON.

        Keys: model, device, dtype, traced, backend (the one asked for), layers (one dict per
        LayerRow), totals (layers, sparse_layers, macs, live_macs, planned_macs, mac_reduction, predicted_us,
        measured_us, rel_err), notes.
        """
        record = self.record
        state = (*self.network.parameters(), *self.network.buffers())
        tensor = next((t for t in state if t.is_floating_point()), torch.empty(0))
        macs = sum(row.macs for row in record.rows)
        planned = sum(row.planned_macs for row in record.rows)
        return {
            "model": record.model,
            "device": str(tensor.device),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "traced": record.traced,
            "backend": record.requested,
            "layers": [dataclasses.asdict(row) for row in record.rows],
            "totals": {
                "layers": len(record.rows),
                "sparse_layers": sum(row.runs_sparse for row in record.rows),
                "macs": macs,
                "live_macs": sum(row.live_macs for row in record.rows),
                "planned_macs": planned,
                "mac_reduction": macs / planned if planned else None,
                "predicted_us": sum_of([row.predicted_us for row in record.rows]),
                "measured_us": sum_of([row.measured_us for row in record.rows]),
                "rel_err": record.output_error,
            },
            "notes": [*record.notes, *self._replay_notes()],
        }

    def _replay_notes(self) -> list[str]:
        means = (("CUDA graphs are", self.graphs), ("recording on the CPU is", self.tapes))
        notes = [f"{name} off: {used.problem}" for name, used in means if used is not None and used.problem]
        if self._unrecordable is not None and not any(t.is_cuda for t in self.network.parameters()):
            notes.append(f"recording on the CPU is off: {self._unrecordable}")
        return notes

    def explain(self) -> str:
        """Return ``report`` as a plain table for people."""
        report = self.report()
        totals = report["totals"]
        how = "traced with torch.fx" if report["traced"] else "module by module, epilogues not fused"
        lines = [
            f"{report['model']} on {report['device']} in {report['dtype']}: "
            f"{totals['sparse_layers']} of {totals['layers']} convolutions run sparse",
            f"(backend {report['backend']!r}; {how})",
            "",
            *table_of(self.record.rows),
            "",
            f"MACs on the example: {si(totals['macs'])} dense, {si(totals['live_macs'])} live, "
            f"{si(totals['planned_macs'])} planned",
            f"output against the model's on the example: norm error {totals['rel_err']:.1e}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])

    def extra_repr(self) -> str:
        """Say how many layers run sparse."""
        sparse = sum(row.runs_sparse for row in self.record.rows)
        return f"{sparse} of {len(self.record.rows)} convolutions sparse"


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    """Return copies of a model's public attributes that are plain data, those of its class included."""
    values = {name: value for kind in reversed(type(model).__mro__) for name, value in vars(kind).items()}
    values |= vars(model)
    return {
        name: copy.deepcopy(values[name])
        for name in public_names(model)
        if _is_plain(values.get(name, model))
    }


def public_names(model: nn.Module) -> set[str]:
    """Return the public names that a model has beyond those of every module."""
    every = {*dir(nn.Module), *vars(nn.Module()), "training"}
    own = {*vars(model), *model._modules, *model._parameters, *model._buffers}
    own |= {name for kind in type(model).__mro__ for name in vars(kind)}
    return {name for name in own - every if not name.startswith("_")}


def _is_plain(value: Any, depth: int = 0) -> bool:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.Size):
        return True
    if depth > 8:
        return False
    if isinstance(value, dict):
        return all(_is_plain(item, depth + 1) for pair in value.items() for item in pair)
    return isinstance(value, list | tuple | set) and all(_is_plain(item, depth + 1) for item in value)
