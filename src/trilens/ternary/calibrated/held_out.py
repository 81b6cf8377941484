"""The error of a coded matrix at its outputs, on text that it was not fitted to."""

from __future__ import annotations

import math

from torch import Tensor

from trilens.ternary.calibrated.hessian import Hessian, wide

__all__ = ["HeldOutError"]


class HeldOutError:
    """Σ‖Ŵx − y‖² / Σ‖y‖², summed batch by batch.

    Two numbers are kept: where the weights are known, those are all it takes.

    Shapes: weights [rows, cols]

    Args:
        weights: Ŵ.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights.float()
        self._error = self._energy = 0.0
        self.n_tokens = 0

    def add(self, inputs: Tensor, *, dense: Tensor, target: Tensor | None = None) -> None:
        """Add a batch.

        Shapes: inputs [..., cols]; dense [rows, cols]; target [..., rows]

        Args:
            inputs: x, what the ternary model gives the matrix.
            dense: W.
            target: y; W·x unless given.
        """
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        # W·x is never subtracted from Ŵ·x: exact weights have an error of exactly 0.
        if target is None:
            y = x @ dense.float().T
            error = x @ (self._weights - dense.float()).T
        else:
            y = target.reshape(-1, target.shape[-1]).float()
            error = x @ self._weights.T - y
        # PROMOTE: sums over a whole text drift in float32.
        self._error += float(error.double().square().sum())
        self._energy += float(y.double().square().sum())
        self.n_tokens += len(x)

    def add_moments(self, hessian: Hessian, *, dense: Tensor) -> None:
        """Add all the tokens that a Hessian is the sum of, where y is W·x.

        Shapes: hessian of [cols, cols]; dense [rows, cols]
        """
        true = wide(dense, hessian.device)
        gap = wide(self._weights - dense.float(), hessian.device)
        self._error += float((gap @ hessian.matrix * gap).sum())
        self._energy += float((true @ hessian.matrix * true).sum())
        self.n_tokens += hessian.n_tokens

    @property
    def value(self) -> float | None:
        """0 for exact, 1 for nothing left; None where no token came by."""
        if self.n_tokens == 0:
            return None
        if self._energy <= 0:
            return 0.0 if self._error <= 0 else math.inf
        return self._error / self._energy
