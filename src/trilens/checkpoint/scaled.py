"""Matrices that a source stores as codes with a scale beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from trilens.io.safetensors_header import TensorHeader

__all__ = ["ScaledMatrix", "decoded_headers"]


class ScaledMatrix(Protocol):
    """Where such a matrix lies."""

    @property
    def scale(self) -> TensorHeader:
        """Its scales."""

    @property
    def header(self) -> TensorHeader:
        """The weight as the model has it, with the place of its codes."""


def decoded_headers(
    headers: Mapping[str, TensorHeader], matrices: Mapping[str, ScaledMatrix]
) -> dict[str, TensorHeader]:
    """The headers as the model has its weights, without the scales beside them."""
    scales = {matrix.scale.name for matrix in matrices.values()}
    return {
        name: matrices[name].header if name in matrices else header
        for name, header in headers.items()
        if name not in scales
    }
