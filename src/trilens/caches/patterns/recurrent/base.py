"""What every pattern of a recurrence shares: rows, columns, refusals, checks of its tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import NoReturn, Self

import torch
from torch import Tensor

from trilens.caches.indices import check_unpad
from trilens.caches.patterns.protocol import KeptPattern
from trilens.caches.patterns.recurrent.blocks import Recurrence, column_weights, row_weights
from trilens.caches.patterns.relu_l1 import ReluL1Pattern, row_blocks
from trilens.caches.patterns.softmax.masks import SharedMasks, tensor_identity
from trilens.errors import DtypeError, ShapeError, UsageError, ValueRangeError

__all__ = ["RecurrenceBase", "check_decay", "check_tensor", "cut"]


class RecurrenceBase(KeptPattern):
    """A causal pattern whose weights are those of one or more linear recurrences, summed.

    A subclass says what it keeps and gives its recurrences; nothing is computed before it is asked.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        self._tensors = {
            name: tensor.detach() for name, tensor in tensors.items() if tensor is not None
        }

    @abstractmethod
    def recurrences(self, batch: int, head: int | None = None) -> Iterator[Recurrence]:
        """The recurrences whose weights add up to the pattern of one prompt, one after the other.

        Args:
            batch: a row that is there.
            head: a head that is there, or None for all.
        """

    @property
    def signed(self) -> bool:
        """True: weights may be negative."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are computed in: float32, or float64 where a tensor is float64."""
        # PROMOTE: products over hundreds of tokens in half precision lose every digit.
        found = torch.float32
        for tensor in self._tensors.values():
            found = torch.promote_types(found, tensor.dtype)
        return found

    @property
    def dense_bytes(self) -> int:
        """Bytes that `dense()` takes."""
        return self.batch * self.heads * self.seq_q**2 * self.dtype.itemsize

    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        """Costs O(seq_k · d) per row and head. What comes after a query is exactly 0."""
        return _total(row_weights(each, positions) for each in self.recurrences(row, head))

    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        """Costs O(seq_q · d) per column and head. What comes before a key is exactly 0."""
        return _total(column_weights(each, positions) for each in self.recurrences(row, head))

    def dense(self) -> Tensor:
        """The whole pattern: [batch, heads, seq_q, seq_k].

        Memory
            `dense_bytes`: 800 MB for 12 heads of 4,096 tokens.
        """
        device = next(iter(self._tensors.values())).device
        shape = (self.batch, self.heads, self.seq_q, self.seq_k)
        out = torch.empty(shape, dtype=self.dtype, device=device)
        for batch in range(self.batch):
            for block in row_blocks(self):
                out[batch, :, block.start : block.stop] = self.rows(block, batch=batch)
        return out

    def entropy(self, batch: int = 0) -> Tensor:
        """Always refused with `UsageError`: a signed row is no distribution."""
        self._refuse("entropy")

    def mean_distance(self, batch: int = 0) -> Tensor:
        """Always refused with `UsageError`: a signed row is no distribution."""
        self._refuse("mean_distance")

    def received(self, batch: int = 0) -> Tensor:
        """Always refused with `UsageError`: positive and negative weights would cancel."""
        self._refuse("received")

    def sink_mass(self, batch: int = 0) -> Tensor:
        """Always refused with `UsageError`: a signed row has no mass to lack."""
        self._refuse("sink_mass")

    def relu_l1(self) -> ReluL1Pattern:
        """The unsigned view: negative weights dropped, rows scaled to sum 1."""
        return ReluL1Pattern(self, causal=True)

    def unpad(self, row: int, n: int, shared: SharedMasks | None = None) -> Self:
        """One prompt of a batch that was padded on the right, with tensors of its own.

        Nothing that comes later changes a causal pattern, so that its first n tokens are all.

        Args:
            row: the prompt's batch row.
            n: its real tokens.
            shared: not needed here, as there are no masks.

        Raises:
            OutOfRangeError: no such row.
            ValueRangeError: n is not in 1 … seq_q.
        """
        row, n = check_unpad(row, n, batch=self.batch, seq_q=self.seq_q, seq_k=self.seq_k)
        own: dict[tuple[object, ...], Tensor] = {}
        parts = {}
        for name, tensor in self._tensors.items():
            # A tensor that stands under two names is cut once.
            key = tensor_identity(tensor)
            if key not in own:
                own[key] = self._cut(name, row, n)
            parts[name] = own[key]
        return self.rebuild(parts, self.params())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it keeps, by name, by reference, maybe views."""
        return dict(self._tensors)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch {self.batch}, heads {self.heads}, seq {self.seq_q}, "
            f"{self.dtype}, {', '.join(self._tensors)})"
        )

    def _cut(self, name: str, row: int, n: int) -> Tensor:
        """One prompt's own tokens of a tensor; a subclass knows which are not per prompt."""
        return cut(self._tensors[name], row, n)

    def _refuse(self, question: str) -> NoReturn:
        raise UsageError(
            f"{question} of a signed pattern is not defined: ask its view relu_l1() (negative "
            "weights dropped, rows scaled to sum 1)"
        )


def cut(tensor: Tensor, row: int, n: int, *, seq_axis: int = -2) -> Tensor:
    """The first n tokens of one prompt, [1, …], in memory of their own.

    An axis of size 1 that stands for all prompts or all tokens stays as it is.
    """
    if tensor.shape[0] > 1:
        tensor = tensor[row : row + 1]
    length = min(n, tensor.shape[seq_axis])
    return tensor.narrow(seq_axis, 0, length).clone(memory_format=torch.contiguous_format)


def check_tensor(tensor: object, what: str, axes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """A floating-point tensor whose axes have one of the allowed sizes.

    Args:
        tensor: what the caller gave.
        what: its name, for the error.
        axes: for every axis its name and the sizes it may have; an empty tuple allows any but 0.

    Raises:
        UsageError: not a tensor.
        ShapeError: an axis too many or too few, or of a size that is not allowed.
        DtypeError: not floating point.
    """
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{what} of type {type(tensor).__name__}: it has to be a Tensor")
    fits = tensor.ndim == len(axes) and all(
        size in allowed if allowed else size > 0
        for size, allowed in zip(tensor.shape, axes.values(), strict=True)
    )
    if not fits:
        spelled = ", ".join(
            " or ".join(str(size) for size in dict.fromkeys(allowed)) if allowed else name
            for name, allowed in axes.items()
        )
        raise ShapeError(
            f"{what} of shape {list(tensor.shape)} does not fit: it has to be [{spelled}]"
        )
    if not tensor.is_floating_point():
        raise DtypeError(f"{what} of dtype {tensor.dtype}: it has to be floating point")
    return tensor


def check_decay(log_w: Tensor, what: str = "log_w") -> None:
    """Refuse a decay that would grow.

    Raises:
        ValueRangeError: a log decay above 0.
    """
    highest = float(log_w.detach().amax())
    if highest > 0:
        raise ValueRangeError(
            f"{what} of up to {highest:g} is out of range: the log of a decay is 0 (keeps all) or "
            "less; give the logarithm, not the decay"
        )


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total
