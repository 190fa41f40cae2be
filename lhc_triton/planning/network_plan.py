"""The plan of a whole network: its layers, what they add up to, and its forms for people and for files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .explanation import Measured, explain_plan
from .schema import LayerPlan, OtherWork
from .serialization import parse_plan, plan_from_data, plan_to_data
from .totals import Totals, totals_of


@dataclass(frozen=True)
class Plan:
    """How a whole network will run: one LayerPlan per planned convolution.

    Attributes:
        layers: in the order in which the network calls them.
        skipped: (module name, reason) of the convolutions that stay as they are.
        device: the device kind the cost model priced ("cpu" or "cuda").
        dtype: the compute type, for example "float32".
        others: what else the network computes, by kind; empty where that was not looked at.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]
    device: str
    dtype: str
    others: tuple[OtherWork, ...] = ()

    def __getitem__(self, name: str) -> LayerPlan:
        """Return the plan of the layer with this name; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def totals(self) -> Totals:
        """Sums over the planned layers."""
        return totals_of(self.layers, self.others)

    def explain(self, measured: Measured | None = None) -> str:
        """Return a table for people: how every layer will run, and why; 80 columns wide.

        Args:
            measured: measured us by layer and backend, shown beside the predicted ones.
        """
        return explain_plan(
            self.layers, self.totals, self.skipped, self.device, self.dtype, self.others, measured
        )

    def to_data(self) -> dict[str, Any]:
        """Return the plan as what JSON can hold, to be part of a larger document."""
        return plan_to_data(self.layers, self.skipped, self.device, self.dtype, self.others)

    @classmethod
    def from_data(cls, document: Any) -> Plan:
        """Read what `to_data` returned; ValueError as in `from_json`."""
        return cls(*plan_from_data(document))

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_data())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises:
            ValueError: if the text is no plan of this version, or a layer contradicts itself; the message
                says in one line which layer and what.
            TypeError: if ``text`` is no str.
        """
        return cls.from_data(parse_plan(text))
