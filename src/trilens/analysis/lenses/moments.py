"""Sums that least squares needs, in float64, taken in pieces of any number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments", "fitted", "squared_errors"]


class Moments:
    """Sums over tokens of x, of g = y − x and of their products, less the first tokens' mean.

    The shift takes out the constant part of a stream, which may be a thousand times what varies.

    Memory:
        16 · d² bytes.
    """

    def __init__(self, d: int) -> None:
        self.n = 0
        self.d = d
        self._shift: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> bool:
        """Tokens [n, d] of both; False, and nothing is added, where they are not finite."""
        device = "cpu" if x.device.type == "mps" else x.device  # Apple's GPUs have no float64
        a = x.to(device, torch.float64)
        g = y.to(device, torch.float64) - a
        if not bool(a.isfinite().all() & g.isfinite().all()):
            return False
        if self._shift is None:
            self._shift = a.mean(0), g.mean(0)
            self._x, self._g = torch.zeros_like(a[0]), torch.zeros_like(a[0])
            self._xx = a.new_zeros(self.d, self.d)
            self._xg = a.new_zeros(self.d, self.d)
            self._gg = a.new_zeros(())
            self._yy = a.new_zeros(())
        a, g = a - self._shift[0], g - self._shift[1]
        self.n += len(a)
        self._x += a.sum(0)
        self._g += g.sum(0)
        self._xx.addmm_(a.T, a)
        self._xg.addmm_(a.T, g)
        self._gg += g.square().sum()
        self._yy += (a + g).square().sum()
        return True

    def means(self) -> tuple[Tensor, Tensor]:
        """Of x and of g: [d] each."""
        shift = self._offsets()
        return shift[0] + self._x / self.n, shift[1] + self._g / self.n

    def covariances(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of x [d, d], of x and g [d, d]; the total variance of g and of y = x + g."""
        x, g = self._x / self.n, self._g / self.n
        return (
            self._xx / self.n - torch.outer(x, x),
            self._xg / self.n - torch.outer(x, g),
            self._gg / self.n - g.square().sum(),
            self._yy / self.n - (x + g).square().sum(),
        )

    def _offsets(self) -> tuple[Tensor, Tensor]:
        if self._shift is None:
            raise RuntimeError("no tokens were added")
        return self._shift


def fitted(moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """The change [d, d] and bias [d] of y ≈ x + x · change + bias; NaN where there is no solution.

    Args:
        moments: of x and y.
        ridge: relative to the mean variance of x.
    """
    xx, xg, _, _ = moments.covariances()
    level = xx.diagonal().mean()
    system = xx + ridge * level * torch.eye(moments.d, dtype=xx.dtype, device=xx.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return torch.full_like(xx, torch.nan), torch.full_like(xx[0], torch.nan)
    change = torch.cholesky_solve(xg, factor)
    mean_x, mean_g = moments.means()
    return change, mean_g - mean_x @ change


def squared_errors(moments: Moments, change: Tensor, bias: Tensor) -> float:
    """Mean ‖y − (x + x · change + bias)‖², relative to the variance of y.

    Where y does not vary: 0 if the error is 0 too, else Inf.
    """
    xx, xg, gg, yy = moments.covariances()
    mean_x, mean_g = moments.means()
    change = change.to(xx.device)
    left = mean_g - mean_x @ change - bias.to(xx.device)
    spread = gg - 2 * (change * xg).sum() + (change * (xx @ change)).sum()
    error = float((spread + left.square().sum()).clamp(min=0.0))
    variance = float(yy)
    if variance <= 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / variance
