"""Rows of a large matrix that stand for all of it where only an error is asked.

Every rule codes a row, or a part of one, by itself; the one scale of a whole matrix hardly depends
on which of its thousands of rows are looked at. So the relative error of some hundred rows is that
of the matrix, and pricing a model takes a time that grows with its matrices and not its weights.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from trilens.planning.matrices import ModelMatrix

__all__ = ["sampled"]

_WEIGHTS = 1 << 21
"""Of a matrix, or of the experts of one parameter: more of them are sampled."""


def sampled(matrix: ModelMatrix, weights: Tensor) -> tuple[ModelMatrix, Tensor]:
    """A matrix of at most some two million weights: rows spread evenly over those that there are.

    Shapes: weights as the parameter → the same with fewer rows, a copy; smaller ones themselves

    Args:
        matrix: what is sampled; of experts, rows of each of them.
        weights: the parameter.

    Returns:
        The matrix as a smaller one, and its weights.
    """
    most = max(1, _WEIGHTS // (math.prod(matrix.lead) * matrix.cols))
    if most >= matrix.rows:
        return matrix, weights
    picks = torch.linspace(0, matrix.rows - 1, most, dtype=torch.float64).long()
    dim = weights.ndim - (1 if matrix.transposed else 2)
    return replace(matrix, rows=most), weights.index_select(dim, picks.to(weights.device))
