"""The hot loops of the calibrated rules in torch, all rows at once, on any device.

`numpy_kernels` documents what each one computes. No step waits for a value to come back from the
device; sums may be added up in another order than there.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["code_columns", "sweep"]


def code_columns(
    work: Tensor,
    scales: Tensor,
    upper: Tensor,
    groups: Tensor,
    trits: Tensor,
    errors: Tensor,
    levels: int = 3,
) -> None:
    """See `numpy_kernels.code_columns`."""
    of_column = scales[:, groups]
    for j in range(work.shape[1]):
        found, value = _nearest(work[:, j], of_column[:, j], levels)
        trits[:, :, j] = found
        error = (work[:, j] - value) / upper[j, j]
        errors[:, j] = error
        work[:, j + 1 :].addr_(error, upper[j, j + 1 :], alpha=-1)


def sweep(
    trits: Tensor,
    scales: Tensor,
    groups: Tensor,
    slope: Tensor,
    hessian: Tensor,
    least: Tensor,
    levels: int = 3,
) -> tuple[int, float]:
    """See `numpy_kernels.sweep`."""
    of_column = scales[:, groups]
    changed = torch.zeros((), dtype=torch.int64, device=slope.device)
    gained = torch.zeros((), dtype=slope.dtype, device=slope.device)
    curves = hessian.diagonal()
    tiny = torch.finfo(slope.dtype).tiny
    for j in range(trits.shape[2]):
        curve = curves[j]
        old = (of_column[:, j] * trits[:, :, j]).sum(1)
        target = old - slope[:, j] / curve.clamp_min(tiny)
        found, value = _nearest(target, of_column[:, j], levels)
        step = value - old
        gain = -step * (2.0 * slope[:, j] + curve * step)
        better = (gain > least) & (curve > 0)
        trits[:, :, j] = torch.where(better[:, None], found, trits[:, :, j])
        slope.addr_(torch.where(better, step, 0.0), hessian[j])
        changed += better.sum()
        gained += torch.where(better, gain, 0.0).sum()
    return int(changed), float(gained)


def _nearest(target: Tensor, scales: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """See `numpy_kernels.nearest`."""
    first = scales[:, 0]
    if scales.shape[1] == 1:
        if levels == 4:
            signed = torch.where(first < 0, -target, target)
            one = _trit(signed, first.abs()) + (signed > 1.5 * first.abs()).to(torch.int8)
        else:
            one = _trit(target, first)
        return one[:, None], first * one
    levels_of_first = torch.tensor([-1, 0, 1], dtype=torch.int8, device=target.device)
    rest = target[:, None] - first[:, None] * levels_of_first
    second = _trit(rest, scales[:, 1:])
    value = first[:, None] * levels_of_first + scales[:, 1:] * second
    distance = (target[:, None] - value).abs()
    # The first of equally near ones, whatever a device's argmin takes.
    place = (distance <= distance.amin(1, keepdim=True)).to(torch.int8).argmax(1, keepdim=True)
    trits = torch.cat([levels_of_first[place], second.gather(1, place)], dim=1)
    return trits, value.gather(1, place)[:, 0]


def _trit(values: Tensor, scale: Tensor) -> Tensor:
    return (values > 0.5 * scale).to(torch.int8) - (values < -0.5 * scale).to(torch.int8)
