"""The registry of backends: one record tells everything that is asked of one, from planning to the launch.

The records stand beside what they run, in `lhc_triton.runtime.op`, and are registered by its `backends`.
Planning asks for names and prices only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .cost import COST_MODELS, CostModel


def _as_it_is(weight: Any, in_channels: int) -> Any:
    return weight


def _no_problem(device: str, dtype: str) -> str | None:
    return None


def _not_prepared(weight: Any, dtype: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run sparse layers.

    Attributes:
        name: what people and files call it.
        devices: the device kinds it serves.
        dtypes: the types of activations it serves, as torch spells them.
        run: computes one call, see `lhc_triton.runtime.op.call.Call`, and returns its result channels_last.
        activations: those that it applies by itself; the op applies any other one behind it. None: all.
        problem: says in one line why it cannot run here on a device of a kind, and in a type, that it serves;
            None if it can.
        auto: by device kind, its rank where "auto" looks for a sparse backend to set against dense: the
            highest that can serve is taken. On other kinds it runs only on request.
        price: predicts its time; None where the device's first model has to stand for it.
        reads_host_tables: whether it loops over the tiles on the host. Then its tables stay in host memory:
            reading them from a GPU would stall that on every call.
        writes_int8: whether it rounds its result to int8 by itself where it is given a step for that.
        has_configs: whether a launch config is looked up for each of its calls.
        prepare: turns a packed weight [E, in_block, tile_width] of a layer with so many input channels into
            what ``run`` reads fastest.
        prepared: (in_block, tile_width) of a weight that ``prepare`` made for activations of a type; None of
            any other weight.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    run: Callable[[Any], Any]
    activations: tuple[str, ...] | None = None
    problem: Callable[[str, str], str | None] = _no_problem
    auto: Mapping[str, int] = field(default_factory=dict)
    price: CostModel | None = None
    reads_host_tables: bool = True
    writes_int8: bool = False
    has_configs: bool = False
    prepare: Callable[[Any, int], Any] = _as_it_is
    prepared: Callable[[Any, Any], tuple[int, int] | None] = _not_prepared


BACKENDS: dict[str, Backend] = {}
"""Every backend by name; see `register`."""


def register(backend: Backend) -> None:
    """Add a backend; ValueError if its name is taken."""
    if backend.name in requests():
        raise ValueError(f"backend {backend.name!r} is registered already; give the new one another name")
    BACKENDS[backend.name] = backend
    if backend.price is not None:
        COST_MODELS[backend.name] = backend.price


def runs() -> tuple[str, ...]:
    """Return what can run a layer: "dense" and the backends."""
    return ("dense", *BACKENDS)


def requests() -> tuple[str, ...]:
    """Return what people can ask for: "auto", "dense" and the backends."""
    return ("auto", *runs())


def check_backend(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is "auto", "dense" or the name of a backend."""
    if backend not in requests():
        raise ValueError(f"backend {backend!r} is not known; choose one of {', '.join(requests())}")


def for_auto(device: str) -> list[Backend]:
    """Return the backends that "auto" considers on a device kind, the fastest first."""
    able = [backend for backend in BACKENDS.values() if device in backend.auto]
    return sorted(able, key=lambda backend: -backend.auto[device])
