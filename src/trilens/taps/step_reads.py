"""Gradients through loops over tokens, in time that grows with the tokens, not with their square.

Without its kernel, a recurrent layer reads its tensors step by step, `x[:, i]`. The gradient of
each such read is a tensor of zeros as large as `x`, with one step in it, and all of them are added
up. Here a tensor that is read that way is taken apart once, by `unbind`, whose gradient puts the
steps together once: the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["StepReads", "reading_steps"]

T = TypeVar("T")

_LOOP = 2  # reads of neighbouring steps, from which on it is a loop
_FEWEST = 8  # steps of a loop: shorter axes hold parts (queries, keys, values), which are no tokens
_UNWRITABLE = "of Unbind is a view"  # in what torch says where steps were written into
_WHOLE = slice(None)


def reading_steps(run: Callable[[], T]) -> T:
    """What `run` gives, a forward pass, with `StepReads`.

    A model that writes into the steps that it reads is run again as it always was: torch forbids
    that where a tensor was taken apart.
    """
    try:
        with StepReads():
            return run()
    except RuntimeError as error:
        if _UNWRITABLE not in str(error):
            raise
    return run()


class StepReads(TorchFunctionMode):
    """While it is entered, tensors with a gradient are taken apart where a loop reads their steps.

    That is one which reads one step after the other, up or down. A tensor that is written into
    between two reads is read as it always was; see `reading_steps` for what is written into later.

    Memory: what was read in a loop is held until the mode ends, and a small view for each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[int, int], _Steps] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__getitem__ and torch.is_grad_enabled() and args[0].requires_grad:
            found = self._read(*args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: object) -> None:
        """Hold nothing any more."""
        self._seen.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _read(self, tensor: Tensor, index: object) -> Tensor | None:
        """What a loop reads there; None: it is no loop, or this is not known to be one."""
        place = _step_of(index if isinstance(index, tuple) else (index,))
        if place is None or torch.compiler.is_compiling():
            return None
        dim, step, rest = place
        if dim >= tensor.ndim or not -tensor.shape[dim] <= step < tensor.shape[dim]:
            return None  # torch says what is wrong with it
        if tensor.shape[dim] < _FEWEST:
            return None
        steps = self._seen.get((id(tensor), dim))
        if steps is None or steps.version != tensor._version:
            steps = self._seen[id(tensor), dim] = _Steps(tensor)
        if not steps.is_loop(step % tensor.shape[dim]):
            return None
        found = steps.views(dim)[step]
        return found[rest] if None in rest else found


class _Steps:
    """A tensor, held so that no other gets its place in memory, and its steps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version
        self._reads, self._last = 0, -2
        self._views: tuple[Tensor, ...] = ()

    def is_loop(self, step: int) -> bool:
        """Whether enough neighbours were read, before this one or ever."""
        if not self._views and step != self._last:
            self._reads = self._reads + 1 if abs(step - self._last) == 1 else 1
            self._last = step
        return self._reads > _LOOP

    def views(self, dim: int) -> tuple[Tensor, ...]:
        self._views = self._views or self.tensor.unbind(dim)
        return self._views


def _step_of(index: tuple[object, ...]) -> tuple[int, int, tuple[slice | None, ...]] | None:
    """Axis and number of the one step that an index reads, and what else is in it: all or new."""
    found, rest = None, list[slice | None]()
    for each in index:
        if type(each) is int and found is None:
            found = (sum(other is not None for other in rest), each)
        elif each is None or (type(each) is slice and each == _WHOLE):
            rest.append(each)
        else:
            return None
    return None if found is None else (*found, tuple(rest))
