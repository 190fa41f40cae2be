"""Reading the pickles of the CIFAR archives as plain data: nothing in them is imported, made or called."""

from __future__ import annotations

import pickletools
import warnings
from dataclasses import dataclass
from typing import Any

# Both versions of CIFAR were written by Python 2 (protocol 2), their pixels as numpy arrays.
_NAMES = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "BINSTRING", "SHORT_BINSTRING"}
# The largest file of CIFAR has a fifth of them; each may take some hundred bytes here.
_MAX_OPCODES = 1 << 20
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False)
class Inert:
    """What a pickle would have called or imported, written down instead.

    Attributes:
        name: module and name of the callable, with a space between.
        args: what it would have been called with; None where it is only named.
        state: what its result would have been given to restore itself from.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None


def read_inert(data: bytes) -> Any:
    """Read a pickle of dicts, lists, tuples, numbers, byte strings and numpy arrays.

    The opcodes are taken apart by ``pickletools`` and interpreted here. Every call that the pickle asks
    for becomes an Inert.

    Args:
        data: the pickle, protocol 2.

    Returns:
        What it holds; byte strings as str in Latin-1, one character for each byte.

    Raises:
        ValueError: it is cut short or damaged, or uses anything else.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of odd escapes in strings that are damaged
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count == _MAX_OPCODES:
                    raise ValueError(f"it has more than {_MAX_OPCODES} opcodes")
                if opcode.name == "STOP":
                    return machine.pop()
                machine.step(opcode.name, argument)
    # Where the parser finds nothing wrong, a damaged pickle still takes what is not there off stack or memo.
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a pickle as CIFAR has them ({error})") from error
    raise ValueError("not a pickle as CIFAR has them (it has no end)")


class _Machine:
    """The stack machine of pickle, without its powers."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            size = _TUPLES[name]
            items = tuple(self.pop() for _ in range(size))
            stack.append(items[::-1])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            self._stack = self._marked.pop()
            self._gather(name, stack)
        elif name == "APPEND":
            self._gather("APPENDS", [self.pop()])
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self._gather("SETITEMS", [key, value])
        elif name in ("GLOBAL", "REDUCE", "BUILD"):
            self._write_down(name, argument)
        elif name != "PROTO":
            raise ValueError(f"it has the opcode {name}")

    def _gather(self, name: str, items: list[Any]) -> None:
        """Put items into the tuple, list or dict that they are meant for."""
        if name == "TUPLE":
            self._stack.append(tuple(items))
            return
        target = self._stack[-1]
        if name == "APPENDS" and isinstance(target, list):
            target.extend(items)
        elif name == "SETITEMS" and isinstance(target, dict):
            if not all(isinstance(key, str) for key in items[::2]):
                raise ValueError("it has a key that is no text")  # a nested tuple may take for ever to hash
            target.update(zip(items[::2], items[1::2], strict=True))
        else:
            raise ValueError(f"{name} of a {type(target).__name__}")

    def _write_down(self, name: str, argument: str) -> None:
        """Note what would have been imported, called, or restored."""
        if name == "GLOBAL":
            if argument not in _NAMES:
                raise ValueError(f"it names {argument!r}")
            self._stack.append(Inert(argument))
            return
        value = self.pop()
        target = self._stack[-1]
        if not isinstance(target, Inert):
            raise ValueError(f"{name} of a {type(target).__name__}")
        if name == "REDUCE":
            self._stack[-1] = Inert(target.name, args=value)
        else:
            target.state = value
