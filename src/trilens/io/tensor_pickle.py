"""The pickle inside a `.pth`, read opcode by opcode: nothing in it is imported or run.

Of all that a pickle can say, containers, numbers, text and torch's own description of a tensor are
understood. Whatever else torch writes becomes an `Opaque`; every other name is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trilens.errors import CorruptFileError, UnsafeFormatError
from trilens.io.messages import clip

__all__ = ["Opaque", "StorageClaim", "TensorClaim", "read_pickle"]

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MOST_AXES = 64


@dataclass(frozen=True, slots=True)
class StorageClaim:
    """A record of numbers, as the pickle describes it."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorClaim:
    """A strided view of a storage that stays within it and meets each element once at most."""

    storage: StorageClaim
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something of torch's that is no plain tensor."""

    name: str


class _Mark:
    pass


_MARK = _Mark()


def read_pickle(data: bytes, what: str) -> Any:
    """What a pickle holds.

    Args:
        data: the pickle.
        what: what errors call it.

    Raises:
        UnsafeFormatError: it asks for something that is not torch's.
        CorruptFileError: it is malformed, or a tensor that it describes cannot be.
    """
    machine = _Machine(what)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as cause:
        raise CorruptFileError(f"{what} is no readable .pth file: its pickle is damaged") from cause
    raise CorruptFileError(f"{what} is no readable .pth file: its pickle has no end")


class _Machine:
    """A stack, a memo and the opcodes that build values."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _MADE:
            _MADE[name](self)
        elif name in {"BINPUT", "LONG_BINPUT"}:
            self.memo[argument] = self.stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self._name(*argument.split(" ", 1)))
        elif name not in {"PROTO", "FRAME"}:
            raise self._unsafe(name)

    def _unsafe(self, name: str) -> UnsafeFormatError:
        return UnsafeFormatError(
            f"{self.what} holds more than plain tensors ({clip(name).strip(chr(39))}) and is not "
            "loaded"
        )

    def _name(self, module: str, name: str) -> Opaque:
        full = f"{module}.{name}"
        if full != "collections.OrderedDict" and module.partition(".")[0] != "torch":
            raise self._unsafe(full)
        return Opaque(full)

    def pop_mark(self) -> list[Any]:
        """Values above the last mark."""
        at = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def stack_global(self) -> None:
        """A name whose parts lie on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self._name(str(module), str(name)))

    def memoize(self) -> None:
        """Remember the top under the next number."""
        self.memo[len(self.memo)] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        """Enter keys and values into the dict on top."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError
        target.update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        """Extend the list on top."""
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(items)

    def tuple_of(self, n: int) -> None:
        """Take n values as a tuple."""
        if len(self.stack) < n:
            raise IndexError
        self.stack[len(self.stack) - n :] = [tuple(self.stack[len(self.stack) - n :])]

    def build(self) -> None:
        """A state, such as a state dict's version numbers: of no use here."""
        self.stack.pop()

    def persistent(self) -> None:
        """A storage."""
        match self.stack.pop():
            case ("storage", Opaque(name), str(key), str(), int(numel)):
                dtype = _DTYPES.get(name.removeprefix("torch."))
                if dtype is None:
                    raise self._unsafe(name)
                self.stack.append(StorageClaim(dtype, key, numel))
            case _:
                raise TypeError

    def reduce(self) -> None:
        """A call, of which only descriptions of tensors are followed."""
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Opaque) or not isinstance(arguments, tuple):
            raise TypeError
        if called.name == "collections.OrderedDict":
            self.stack.append(dict(*arguments))
        elif called.name == "torch._utils._rebuild_tensor_v2":
            self.stack.append(self._tensor(*arguments[:4]))
        elif called.name == "torch._utils._rebuild_parameter":
            self.stack.append(arguments[0])
        else:
            self.stack.append(called)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> TensorClaim:
        if not isinstance(storage, StorageClaim):
            raise TypeError
        numbers = (offset, storage.numel, *size, *stride)
        whole = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        if not whole or len(size) != len(stride) or len(size) > _MOST_AXES:
            raise ValueError
        count, last = 1, offset
        for n, step in zip(size, stride, strict=True):
            count *= n
            last += (n - 1) * step
        if count > storage.numel or (count and last >= storage.numel):
            raise CorruptFileError(
                f"{self.what} has a tensor of shape {clip(list(size))} and strides "
                f"{clip(list(stride))} in a storage of {storage.numel} numbers: it does not fit"
            )
        return TensorClaim(storage, offset, tuple(size), tuple(stride))


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_LITERALS = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "FLOAT", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE",
    }
)  # fmt: skip
_MADE: dict[str, Callable[[_Machine], Any]] = {
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "EMPTY_TUPLE": lambda m: m.stack.append(()),
    "SETITEMS": lambda m: m.set_items(m.pop_mark()),
    "SETITEM": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "APPENDS": lambda m: m.append(m.pop_mark()),
    "APPEND": lambda m: m.append([m.stack.pop()]),
    "TUPLE": lambda m: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m: m.tuple_of(1),
    "TUPLE2": lambda m: m.tuple_of(2),
    "TUPLE3": lambda m: m.tuple_of(3),
    "STACK_GLOBAL": _Machine.stack_global,
    "MEMOIZE": _Machine.memoize,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "POP": lambda m: m.stack.pop(),
}
