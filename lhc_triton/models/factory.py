"""Somebody's own network by the name of what makes it: package.module:factory."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_factory(name: str) -> bool:
    """Return whether a name is of the form package.module:factory."""
    return _FACTORY.fullmatch(name) is not None


def call_factory(source: str) -> nn.Module:
    """Return what package.module:factory makes; modules of the working folder are found as well.

    Raises:
        ValueError: the module cannot be imported, lacks the name, or the factory raises or gives no module.
    """
    module_name, _, path = source.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # its code is not ours: whatever it raises becomes one line
        raise ValueError(f"{source}: importing {module_name} failed: {one_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")][:6]
            raise ValueError(
                f"{source}: {module_name} has no {part!r}; it has {', '.join(near) or 'nothing to call'}"
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ValueError(
            f"{source}: is a {type(found).__name__}; give a function or class that makes a network"
        )
    try:
        made = found()
    except (Exception, SystemExit) as error:  # as above
        raise ValueError(f"{source} raised {one_line(error)}{_wants(found)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{source} gave a {type(made).__name__}, not a torch.nn.Module")
    return made


def _wants(factory: Callable[..., Any]) -> str:
    """Say which arguments a factory misses, if that is why it failed."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return ""
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return f"; it needs {', '.join(needed)}: give a function of no arguments" if needed else ""


def one_line(error: BaseException) -> str:
    """Return an exception of somebody else's code in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
