"""Values of sites that are computed when they are asked, from what is kept instead of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trilens.caches.attention import DENSE_LIMIT_BYTES, rebuild_pattern
from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.caches.storage import moved
from trilens.errors import ModifiedInPlaceError, ShapeError, TooLargeError, UsageError

__all__ = ["Derived", "HeadOut", "PatternValue", "rebuild_derived"]


class Derived(Protocol):
    """A value that is not stored; saved as what it is made of."""

    def value(self) -> Tensor:
        """The value, computed now."""

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name and by reference."""

    def params(self) -> dict[str, Any]:
        """Everything else, as JSON, with its kind."""

    def to(self, device: torch.device | str | int) -> Derived:
        """The same elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadOut:
    """What each head adds: its columns of the output projection times its z.

    Attributes:
        z: [seq, heads, d_head], what the projection was given.
        weight: [heads · d_head, d_model], by reference to the model's own.
    """

    z: Tensor
    weight: Tensor
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        width = self.z.shape[1] * self.z.shape[2] if self.z.ndim == 3 else None
        if self.weight.ndim != 2 or width != self.weight.shape[0]:
            raise ShapeError(
                f"attn.head_out of z {list(self.z.shape)} and a weight "
                f"{list(self.weight.shape)}: [seq, heads, d_head] and [heads · d_head, d_model] "
                "are needed"
            )
        object.__setattr__(self, "_version", _version_of(self.weight))

    def value(self) -> Tensor:
        """[seq, heads, d_model].

        Raises:
            ModifiedInPlaceError: the model's weight was written into since.
        """
        if _version_of(self.weight) != self._version:
            raise ModifiedInPlaceError(
                "attn.head_out is computed when it is asked, and the model's output projection was "
                "changed since the capture: capture again, or ask before the model is changed"
            )
        heads, d_head = self.z.shape[1:]
        by_head = self.weight.detach().reshape(heads, d_head, -1)
        return torch.einsum("shd,hdm->shm", self.z, by_head.to(self.z.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """z and weight."""
        return {"z": self.z, "weight": self.weight.detach()}

    def params(self) -> dict[str, Any]:
        """The kind alone."""
        return {"kind": "head_out"}

    def to(self, device: torch.device | str | int) -> HeadOut:
        """The same elsewhere."""
        return HeadOut(moved(self.z, device), moved(self.weight.detach(), device))


@dataclass(frozen=True, slots=True, eq=False)
class PatternValue:
    """A prompt's attention weights, or the scores before the softmax.

    Attributes:
        pattern: of one prompt, as its queries and keys.
        of: which of the two.
    """

    pattern: Pattern
    of: Literal["pattern", "scores"] = "pattern"

    def __post_init__(self) -> None:
        if self.of not in ("pattern", "scores"):
            raise UsageError(f"value {self.of!r} is unknown: 'pattern' or 'scores'")
        if self.of == "scores" and not isinstance(self.pattern, SoftmaxPattern):
            raise UsageError(
                f"attn.scores of a {type(self.pattern).__name__} are not known: its weights were "
                "kept, not what they are made of; ask attn.pattern"
            )

    def value(self) -> Tensor:
        """[heads, seq_q, seq_k]; masked scores are −inf.

        Raises:
            TooLargeError: more than 256 MiB.
        """
        pattern = self.pattern
        if isinstance(pattern, DensePattern):
            return pattern.tensor[0]
        if pattern.dense_bytes > DENSE_LIMIT_BYTES:
            raise TooLargeError(
                f"attn.{self.of} would take {pattern.dense_bytes / 2**20:,.0f} MiB: up to "
                f"{DENSE_LIMIT_BYTES // 2**20} MiB are built without asking; capture with "
                "attention=True and ask cap.attention for rows, columns or statistics"
            )
        if self.of == "scores" and isinstance(pattern, SoftmaxPattern):
            return pattern.scores()[0]
        return pattern.dense()[0]

    def tensors(self) -> dict[str, Tensor]:
        """Those of the pattern."""
        return self.pattern.tensors()

    def params(self) -> dict[str, Any]:
        """Those of the pattern, and which value."""
        return {"kind": "pattern", "of": self.of, "pattern": self.pattern.params()}

    def to(self, device: torch.device | str | int) -> PatternValue:
        """The same elsewhere."""
        return PatternValue(self.pattern.to(device), self.of)


def rebuild_derived(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Derived:
    """What gave these `tensors()` and `params()`.

    Raises:
        UsageError: `params["kind"]` names nothing that is derived.
    """
    kind = params.get("kind")
    if kind == "head_out":
        return HeadOut(tensors["z"], tensors["weight"])
    if kind == "pattern":
        return PatternValue(rebuild_pattern(tensors, params["pattern"]), params["of"])
    raise UsageError(f"derived value {kind!r} is unknown: 'head_out' and 'pattern' are known")


def _version_of(tensor: Tensor) -> int:
    # Tensors made in inference mode do not count what is written into them.
    return 0 if tensor.is_inference() else tensor._version
