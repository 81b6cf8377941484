"""What a matrix sees of a calibration text: the second moments of its inputs, and of its outputs.

A matrix W that gets the inputs x and should give the outputs y is measured, when Ŵ takes its place,
by Σ‖Ŵx − y‖². That is a quadratic form in Ŵ, and three sums over the text are all it needs:

    H = Σ x xᵀ   [cols, cols]      C = Σ y xᵀ   [rows, cols]      E = Σ ‖y‖²

    Σ‖Ŵx − y‖² = tr(Ŵ H Ŵᵀ) − 2 tr(Ŵ Cᵀ) + E

Where x is what the layers before, ternary already, give, and y what the dense matrix gave for the
dense model's input, the best Ŵ is not W but W + (C − W·H)·H⁻¹: it also repairs what the layers
before have done to the inputs.

Source: the Hessian of arXiv 2210.17323; the two kinds of input of GPTAQ, arXiv 2504.02692.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilens.errors import NonFiniteError, ShapeError, UsageError
from trilens.ternary.rotation import rotate

__all__ = ["Hessian", "MomentSums", "Moments", "upper_factor", "wide"]

_TOKENS = 2048  # summed in the dtype of the inputs, before the sum is added up in float64
_PANEL = 256  # columns of H that are computed together
_RIDGE = 0.01  # of the mean diagonal: inputs that the text hardly shows leave the weights alone


@dataclass(frozen=True, slots=True, eq=False)
class Hessian:
    """H = Σ x xᵀ over the tokens of a text.

    Attributes:
        matrix: float64 [cols, cols], symmetric; what is computed with it is computed where it is.
        n_tokens: How many inputs it is the sum of.
    """

    matrix: Tensor
    n_tokens: int

    def __post_init__(self) -> None:
        """Take arrays too."""
        object.__setattr__(self, "matrix", wide(self.matrix))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.matrix.device

    @property
    def diagonal(self) -> Tensor:
        """Energy of each input channel. Shapes: → [cols]."""
        return self.matrix.diagonal().clone()

    @property
    def dead(self) -> Tensor:
        """Channels that were 0 at every token. Shapes: → bool [cols]."""
        return self.diagonal <= 0

    @property
    def mean_diagonal(self) -> float:
        """The mean energy of a channel; 1 where all are dead, so that a damping has a size."""
        return float(self.diagonal.mean()) or 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """All that a text says about one matrix.

    Attributes:
        hessian: Of its inputs.
        cross: C = Σ y xᵀ, float64 [rows, cols].
        energy: E = Σ ‖y‖².
    """

    hessian: Hessian
    cross: Tensor
    energy: float

    @classmethod
    def of(cls, weights: Any, hessian: Hessian) -> Moments:
        """The moments where y = W·x: one kind of input, nothing to repair.

        Shapes: weights [rows, cols]
        """
        matrix = wide(weights, hessian.device)
        cross = matrix @ hessian.matrix
        return cls(hessian, cross, float((cross * matrix).sum()))

    def rotated(self) -> Moments:
        """The moments where inputs and weights are rotated by `rotation.rotate`."""
        half = rotate(self.hessian.matrix)
        matrix = rotate(half.T.contiguous())
        hessian = Hessian(0.5 * (matrix + matrix.T), self.hessian.n_tokens)
        return Moments(hessian, rotate(self.cross), self.energy)

    def output_error(self, weights: Any) -> float:
        """Σ‖Ŵx − y‖² / Σ‖y‖²: 0 for exact, 1 for nothing left.

        Shapes: weights [rows, cols]
        """
        # PROMOTE: three large terms cancel; float64 leaves 1e-12 of the energy
        matrix = wide(weights, self.hessian.device)
        found = float((matrix @ self.hessian.matrix * matrix).sum())
        error = found - 2 * float((matrix * self.cross).sum()) + self.energy
        if self.energy <= 0:
            return 0.0 if found <= 0 else math.inf
        return max(0.0, error / self.energy)

    def best_weights(self, weights: Any) -> Tensor:
        """W + (C − W·H)·(H + λ)⁻¹: what Ŵ should be near, λ being 1 % of H's mean diagonal.

        Shapes: weights [rows, cols] → [rows, cols]
        """
        matrix = wide(weights, self.hessian.device)
        missing = self.cross - matrix @ self.hessian.matrix
        damped = self.hessian.matrix.clone()
        damped.diagonal().add_(_RIDGE * self.hessian.mean_diagonal)
        step = torch.cholesky_solve(missing.T.contiguous(), torch.linalg.cholesky(damped))
        return matrix + step.T


class MomentSums:
    """Adds up the moments of all matrices that read the same input, batch by batch.

    Args:
        name: what errors call the input.
        cols: its channels.
        outputs: the matrices, and the rows of each.
        device: where inputs and outputs are.

    Memory: 8·cols·(cols + Σ rows) bytes, and 8·(cols + rows) bytes for each token of a batch.
    """

    def __init__(
        self, name: str, cols: int, outputs: Mapping[str, int], *, device: Any = None
    ) -> None:
        self.name = name
        options: Any = {"dtype": torch.float64, "device": device}
        self._hessian = torch.zeros(cols, cols, **options)
        self._cross = {
            output: torch.zeros(rows, cols, **options) for output, rows in outputs.items()
        }
        self._energy = dict.fromkeys(outputs, 0.0)
        self.n_tokens = 0

    def add(self, inputs: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Shapes: inputs [..., cols]; outputs [..., rows] each, of the same leading dimensions

        Raises:
            ShapeError: other channels than were announced, or unlike numbers of tokens.
            NonFiniteError: NaN or Inf among the inputs or the target outputs.
        """
        x = _rows(inputs)
        if x.shape[1] != len(self._hessian):
            raise ShapeError(
                f"inputs of {self.name} have {x.shape[1]} channels: {len(self._hessian)} are needed"
            )
        given = {output: _rows(values) for output, values in outputs.items()}
        for output, y in given.items():
            if len(y) != len(x):
                raise ShapeError(f"outputs of {output} are of {len(y)} tokens, inputs of {len(x)}")
        # PROMOTE: a sum over 1e5 tokens drifts in float32; one over 2,048 is as exact as its terms.
        for first in range(0, len(x), _TOKENS):
            part = x[first : first + _TOKENS]
            self._add_squares(part)
            for output, y in given.items():
                own = y[first : first + _TOKENS]
                energy = float(own.square().sum(dtype=torch.float64))
                if not math.isfinite(energy):
                    _check(own, f"outputs of {output}")
                self._cross[output] += own.T @ part
                self._energy[output] += energy
        self.n_tokens += len(x)

    def _add_squares(self, x: Tensor) -> None:
        """Add x xᵀ: its upper part alone, panel by panel."""
        for first in range(0, x.shape[1], _PANEL):
            found = x[:, first : first + _PANEL].T @ x[:, first:]
            if not bool(torch.isfinite(found.diagonal()).all()):
                _check(x, f"inputs of {self.name}")
                found = x[:, first : first + _PANEL].double().T @ x[:, first:].double()
            self._hessian[first : first + _PANEL, first:] += found

    def hessian(self) -> Hessian:
        """The Hessian of the inputs so far.

        Raises:
            UsageError: no token was added.
        """
        if self.n_tokens == 0:
            raise UsageError(f"no token reached {self.name}: the calibration text is too short")
        upper = torch.triu(self._hessian)
        return Hessian(upper + torch.triu(upper, 1).T, self.n_tokens)

    def result(self) -> dict[str, Moments]:
        """The moments of each matrix; they share one Hessian.

        Raises:
            UsageError: no token was added.
        """
        hessian = self.hessian()
        return {
            output: Moments(hessian, cross, self._energy[output])
            for output, cross in self._cross.items()
        }


def upper_factor(hessian: Hessian, order: Tensor, damping: float) -> Tensor:
    """The upper triangular U with UᵀU = (H + λ)⁻¹, channels taken in an order.

    λ is `damping` of the mean diagonal; a dead channel gets a diagonal of 1 mean instead of 0, so
    that a singular H has a factor too.

    Shapes: order [cols] → [cols, cols]

    Raises:
        NonFiniteError: H is not positive definite even so: it holds NaN or was not made of inputs.

    Source: arXiv 2210.17323, section 3.3, step 3; without an inverse on the way: for the flipped
    matrix's lower Cholesky factor L, the flipped L is an upper R with H = R Rᵀ, and U = R⁻¹.
    """
    mean, last_first = hessian.mean_diagonal, order.flip(0)
    damped = hessian.matrix[last_first][:, last_first]
    damped.diagonal().add_(hessian.dead[last_first].double() * mean + damping * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise NonFiniteError(
            f"the Hessian of {len(order)} channels is not positive definite with a damping of "
            f"{damping:g}: it holds NaN, or is no sum of squares; calibrate with other text"
        )
    eye = torch.eye(len(order), dtype=torch.float64, device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1).contiguous()


def wide(values: Any, device: torch.device | None = None) -> Tensor:
    """Values in float64, on a device; where they are unless given."""
    return torch.as_tensor(values).to(device=device, dtype=torch.float64)


def _rows(values: Tensor) -> Tensor:
    """Shapes: [..., cols] → [tokens, cols], in float32, or in float64 where it is that."""
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()


def _check(values: Tensor, what: str) -> None:
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    bad = int((~finite).sum())
    raise NonFiniteError(
        f"{what} hold {bad} non-finite values of {values.numel()} on the calibration text: the "
        "model overflows or gives NaN there; check its weights, or calibrate with other text"
    )
