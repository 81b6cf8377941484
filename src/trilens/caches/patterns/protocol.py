"""What an attention pattern answers, and the pattern that is simply stored.

A pattern is the weight that each query position gives to each key position, for every head. The
`Pattern` class says what can be asked of it without building the [seq_q, seq_k] matrix;
`DensePattern` answers from a stored tensor, `SoftmaxPattern` (its own file) from q and k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from trilens.caches.indices import check_index, check_positions, check_unpad
from trilens.caches.patterns.softmax.checks import check_four_axes
from trilens.caches.patterns.softmax.masks import SharedMasks, tensor_identity
from trilens.caches.storage import distinct_bytes, moved

__all__ = [
    "BLOCK_BYTES",
    "DensePattern",
    "Device",
    "KeptPattern",
    "Moved",
    "Pattern",
    "moved_once",
]

#: Ceiling of the scratch memory of one statistic, whatever the length of the sequence. (One head's
#: keys are the smallest unit: where they alone are larger, they set the ceiling.)
BLOCK_BYTES = 32 * 2**20

Device = torch.device | str | int
Moved = dict[tuple[object, ...], Tensor]


class Pattern(ABC):
    """Attention weights of one layer, for every prompt of a batch.

    Shapes
        rows [heads or 1, n, seq_k], columns [heads or 1, seq_q, n], dense [batch, heads, seq_q,
        seq_k]; lse, entropy, mean_distance and sink_mass [heads, seq_q]; received [heads, seq_k].

    Tensors are float32, or float64 where the pattern was given float64. Weights keep their raw
    mass: what an attention sink takes is missing from the row. A masked weight is exactly 0.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def _shape(self) -> tuple[int, int, int, int]:
        """[batch, heads, seq_q, seq_k]."""

    @property
    def batch(self) -> int:
        """Prompts in the pattern."""
        return self._shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self._shape[1]

    @property
    def seq_q(self) -> int:
        """Query positions."""
        return self._shape[2]

    @property
    def seq_k(self) -> int:
        """Key positions."""
        return self._shape[3]

    @property
    @abstractmethod
    def signed(self) -> bool:
        """True where weights may be negative, so that entropy and the like have no meaning."""

    @property
    @abstractmethod
    def dense_bytes(self) -> int:
        """Bytes that `dense()` would take."""

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that the pattern keeps alive, without kept answers."""
        return distinct_bytes(self.tensors().values())

    def rows(self, positions: Sequence[int], head: int | None = None, batch: int = 0) -> Tensor:
        """Weights from the given query positions: [heads or 1, n, seq_k], owned by the caller.

        Raises:
            OutOfRangeError: a position, head or batch that is not there.
        """
        index = check_positions(positions, self.seq_q, "query position", "this pattern")
        row, one = self._place(batch, head)
        return self._rows(index, one, row)

    def columns(self, positions: Sequence[int], head: int | None = None, batch: int = 0) -> Tensor:
        """Weights to the given key positions: [heads or 1, seq_q, n], owned by the caller.

        Raises:
            OutOfRangeError: a position, head or batch that is not there.
        """
        index = check_positions(positions, self.seq_k, "key position", "this pattern")
        row, one = self._place(batch, head)
        return self._columns(index, one, row)

    @abstractmethod
    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        """`rows` of positions, head and batch row that are there."""

    @abstractmethod
    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        """`columns` of positions, head and batch row that are there."""

    @abstractmethod
    def entropy(self, batch: int = 0) -> Tensor:
        """Entropy of each row in nats, renormalised over its keys: [heads, seq_q]."""

    @abstractmethod
    def mean_distance(self, batch: int = 0) -> Tensor:
        """Mean distance in tokens between query and key, of the renormalised row."""

    @abstractmethod
    def received(self, batch: int = 0) -> Tensor:
        """Mean (not summed) weight of a key over the queries that may see it: [heads, seq_k]."""

    @abstractmethod
    def sink_mass(self, batch: int = 0) -> Tensor:
        """Share of each row that no key got, because a sink took it: [heads, seq_q]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole pattern: [batch, heads, seq_q, seq_k]."""

    @abstractmethod
    def unpad(self, row: int, n: int, shared: SharedMasks | None = None) -> Pattern:
        """One prompt of a batch padded on the right: its first n tokens, in tensors of its own."""

    @abstractmethod
    def to(self, device: Device, moved_so_far: Moved | None = None) -> Pattern:
        """The pattern on another device; `moved_so_far` lets layers keep sharing tensors."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors it keeps, by name: with `params` all that `rebuild` needs."""

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """Everything else it keeps, as JSON; `kind` names the class of pattern."""

    def _place(self, batch: int, head: int | None) -> tuple[int, int | None]:
        one = None if head is None else check_index(head, self.heads, "head", "this pattern")
        return self._row(batch), one

    def _row(self, batch: int) -> int:
        return check_index(batch, self.batch, "batch row", "this pattern")


def moved_once(tensor: Tensor, device: Device, moved_so_far: Moved) -> Tensor:
    """The tensor on the device; views of the same memory are moved once per `moved_so_far`."""
    key = tensor_identity(tensor)
    if key not in moved_so_far:
        moved_so_far[key] = moved(tensor, device)
    return moved_so_far[key]


class KeptPattern(Pattern):
    """A pattern whose `tensors()` and `params()` are the arguments of its constructor."""

    __slots__ = ()

    def to(self, device: Device, moved_so_far: Moved | None = None) -> Self:
        """The pattern on another device; kept answers stay behind."""
        memo = {} if moved_so_far is None else moved_so_far
        tensors = {name: moved_once(each, device, memo) for name, each in self.tensors().items()}
        return self.rebuild(tensors, self.params())

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Self:
        """The pattern that gave these `tensors()` and `params()`."""
        options: dict[str, Any] = {**tensors, **params}
        options.pop("kind", None)
        return cls(**options)


class DensePattern(Pattern):
    """A pattern that is stored as it is: given by a model as weights, or pushed by hand.

    The tensor is kept by reference, detached, never copied. It carries no mask: a key counts as
    visible to a query where the weight is not 0. That is what a softmax writes for a masked key
    and never (but by underflow) for a visible one, so `received` of a causal pattern is the mean
    over the queries that come after the key. The sink's share of a row is what its weights lack
    to 1, as far as the dtype can tell; a row of zeros attends to nothing and has no sink.

    Args:
        tensor: [batch, heads, seq_q, seq_k], floating point.

    Raises:
        ShapeError: not four axes, or an empty one.
        DtypeError: not floating point.
    """

    __slots__ = ("_signed", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        check_four_axes(tensor, "pattern", "batch, heads, seq_q, seq_k")
        self._tensor = tensor.detach()
        self._signed: bool | None = None

    @property
    def tensor(self) -> Tensor:
        """The stored weights [batch, heads, seq_q, seq_k], by reference."""
        return self._tensor

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        batch, heads, seq_q, seq_k = self._tensor.shape
        return batch, heads, seq_q, seq_k

    @property
    def signed(self) -> bool:
        """True where any weight is negative; looked up once."""
        if self._signed is None:
            self._signed = bool(self._tensor.amin() < 0)
        return self._signed

    @property
    def dense_bytes(self) -> int:
        """Bytes of the stored weights, whatever else their storage holds."""
        return self._tensor.numel() * self._tensor.element_size()

    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        return _promoted(self._of(row, head)[:, positions])

    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        return _promoted(self._of(row, head)[:, :, positions])

    def entropy(self, batch: int = 0) -> Tensor:
        """Entropy of each row in nats, renormalised over its keys, 0 for a row of zeros."""
        parts = [
            -torch.special.xlogy(weights, weights).sum(-1).clamp_(max=0)
            for _, weights in self._normalised(batch)
        ]
        return torch.cat(parts, dim=1)

    def mean_distance(self, batch: int = 0) -> Tensor:
        """Mean |query − key| in tokens of the renormalised row: [heads, seq_q].

        Where there are more keys than queries, the queries are the last ones.
        """
        keys = torch.arange(self.seq_k, device=self._tensor.device)
        parts = []
        for start, weights in self._normalised(batch):
            queries = torch.arange(start, start + weights.shape[1], device=keys.device)
            queries += max(0, self.seq_k - self.seq_q)
            distance = (queries[:, None] - keys).abs().to(weights.dtype)
            parts.append((weights * distance).sum(-1))
        return torch.cat(parts, dim=1)

    def received(self, batch: int = 0) -> Tensor:
        """Mean weight that a key gets from the queries with weight on it, 0 where none has."""
        given = self._of(batch, None)
        total = torch.zeros(self.heads, self.seq_k, dtype=_compute(given), device=given.device)
        queries = torch.zeros_like(total)
        for start, stop in self._blocks():
            weights = given[:, start:stop].to(total.dtype)
            total += weights.sum(1)
            queries += (weights != 0).sum(1)
        return total.div_(queries.clamp_(min=1))

    def sink_mass(self, batch: int = 0) -> Tensor:
        """What each row lacks to 1, in [0, 1]: [heads, seq_q].

        A lack within the rounding of the stored weights counts as 0.
        """
        given = self._of(batch, None)
        stored = torch.finfo(given.dtype)
        # Every weight is off by eps/2 of itself, or is lost below the smallest number.
        noise = 2 * stored.eps + self.seq_k * stored.smallest_normal
        noise += 16 * torch.finfo(_compute(given)).eps
        parts = []
        for start, stop in self._blocks():
            mass = given[:, start:stop].to(_compute(given)).sum(-1)
            missing = (1 - mass).clamp_(0, 1)
            parts.append(missing.masked_fill_((missing <= noise) | (mass == 0), 0))
        return torch.cat(parts, dim=1)

    def dense(self) -> Tensor:
        """The stored weights, by reference and in their own dtype."""
        return self._tensor

    def unpad(self, row: int, n: int, shared: SharedMasks | None = None) -> DensePattern:
        """One prompt of a batch padded on the right: its first n tokens, in a tensor of its own.

        Raises:
            OutOfRangeError: no such row.
            ValueRangeError: n is not in 1 … seq_q.
            UsageError: queries and keys are not the same tokens.
        """
        row, n = check_unpad(row, n, batch=self.batch, seq_q=self.seq_q, seq_k=self.seq_k)
        own = self._tensor[row : row + 1, :, :n, :n]
        return DensePattern(own.clone(memory_format=torch.contiguous_format))

    def to(self, device: Device, moved_so_far: Moved | None = None) -> DensePattern:
        """The pattern on another device."""
        memo = {} if moved_so_far is None else moved_so_far
        return DensePattern(moved_once(self._tensor, device, memo))

    def tensors(self) -> dict[str, Tensor]:
        """The stored weights, under the name `weights`."""
        return {"weights": self._tensor}

    def params(self) -> dict[str, Any]:
        """The kind alone."""
        return {"kind": "dense"}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Self:
        """The pattern that gave these `tensors()` and `params()`."""
        return cls(tensors["weights"])

    def __repr__(self) -> str:
        return f"DensePattern({list(self._tensor.shape)}, {self._tensor.dtype})"

    def _of(self, batch: int, head: int | None) -> Tensor:
        row = self._row(batch)
        if head is None:
            return self._tensor[row]
        one = check_index(head, self.heads, "head", "this pattern")
        return self._tensor[row, one : one + 1]

    def _blocks(self) -> Iterator[tuple[int, int]]:
        # Four blocks of float64 at most are alive at once.
        step = max(1, BLOCK_BYTES // (32 * self.heads * self.seq_k))
        for start in range(0, self.seq_q, step):
            yield start, min(start + step, self.seq_q)

    def _normalised(self, batch: int) -> Iterator[tuple[int, Tensor]]:
        given = self._of(batch, None)
        for start, stop in self._blocks():
            weights = _promoted(given[:, start:stop])
            mass = weights.sum(-1, keepdim=True)
            yield start, weights.div_(mass.masked_fill_(mass == 0, 1))


def _compute(tensor: Tensor) -> torch.dtype:
    # PROMOTE: sums over seq_k bfloat16 weights keep two digits at best.
    return torch.promote_types(tensor.dtype, torch.float32)


def _promoted(tensor: Tensor) -> Tensor:
    return tensor.to(_compute(tensor), copy=True)
