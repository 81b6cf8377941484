"""What a product reads of a packed matrix."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

__all__ = ["PackedMatrix"]


class PackedMatrix(Protocol):
    """What is read of `linear.Packed`, for one matrix."""

    @property
    def codes(self) -> Tensor:
        """uint8 [rows, ceil(cols / 4)]."""

    @property
    def scale(self) -> Tensor:
        """[rows or 1, groups or 1]."""

    @property
    def cols(self) -> int:
        """Weights in a row."""

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale in a row."""

    @property
    def offset(self) -> Tensor | None:
        """As `scale`."""

    @property
    def second_codes(self) -> Tensor | None:
        """As `codes`."""

    @property
    def second_scale(self) -> Tensor | None:
        """As `scale`."""

    def dense(self, dtype: torch.dtype = ...) -> Tensor:
        """The matrix, rounded once."""

    def rows(self, start: int, stop: int) -> Self:
        """Some of its rows."""
