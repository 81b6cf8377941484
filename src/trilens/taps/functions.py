"""Calls of torch functions, shown while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from trilens.taps.undo import undone

__all__ = ["FunctionCalls", "writes_into"]

_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__setitem__"}


def writes_into(name: str, args: tuple[Any, ...]) -> Tensor | None:
    """The tensor that a torch function of this name writes into, or None."""
    named = name.endswith("_") and not name.endswith("__")
    if (named or name in _IN_PLACE) and args and isinstance(args[0], Tensor):
        return args[0]
    return None


class FunctionCalls(TorchFunctionMode):
    """Shows every call of a torch function: before it runs, and after it with its result.

    Args:
        before: given name, arguments and options; what it returns are the arguments of the call.
        after: given name, arguments, options and result; what it returns is the call's result.
    """

    def __init__(
        self,
        before: Callable[[str, tuple[Any, ...], dict[str, Any]], tuple[Any, ...]],
        after: Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any],
    ) -> None:
        super().__init__()
        self._before = before
        self._after = after

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        # What dynamo traces (flex attention's masks) are stand-ins without values or storage.
        if torch.compiler.is_compiling():
            return func(*args, **options)
        name = getattr(func, "__name__", "")
        args = self._before(name, args, options)
        return self._after(name, args, options, func(*args, **options))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show the calls of this thread for the length of the block."""

        def put_back() -> None:
            if self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        with undone(put_back):
            self.__enter__()  # type: ignore[no-untyped-call]
            yield
