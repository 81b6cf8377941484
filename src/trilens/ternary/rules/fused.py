"""absmean straight to two-bit codes: two passes over the weights, and no trit in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trilens.ternary.codecs.packing import TwoBit
from trilens.ternary.granularity import resolve_units
from trilens.ternary.rules.coder import ScaleDtype, code_units, lost_scales_error, round_scales
from trilens.ternary.rules.kernels import Backend, kernels_for, parallel_map
from trilens.ternary.rules.rules import absmean
from trilens.ternary.rules.unit_scan import UnitScan, inner_cuts
from trilens.ternary.weights_view import BLOCK, WeightsLike, WeightsView, view_weights

__all__ = ["PackedQuant", "pack_absmean"]

_TASKS_OF_A_THREAD = 16  # small enough that the last one is soon done, beside other work too


@dataclass(frozen=True, slots=True, eq=False)
class PackedQuant:
    """A weight tensor as two-bit codes and one scale.

    Attributes:
        name: What the caller calls the tensor.
        shape: Its shape.
        codes: uint8 [ceil(size / 4)], in the layout of `packing.TwoBit`.
        scale: As `PerLayerQuant.scale`.
        was_ternary: The weights were −c, 0 or +c already.
    """

    name: str
    shape: tuple[int, ...]
    codes: NDArray[np.uint8]
    scale: float
    was_ternary: bool


def pack_absmean(
    weights: WeightsLike,
    name: str,
    shape: Sequence[int] | None = None,
    *,
    scale_dtype: ScaleDtype | None = None,
    backend: Backend = "auto",
) -> PackedQuant:
    """The codes and scale of `PerLayerQuant.quantize(…, rule="absmean")`, packed.

    Args:
        weights: As for `PerLayerQuant.quantize`.
        name: The tensor's name, which errors repeat.
        shape: The shape of flat weights; None takes theirs.
        scale_dtype: Round the scale to this dtype.
        backend: Which kernels; they give the same bits.

    Raises: as `PerLayerQuant.quantize`.

    Memory: a quarter of a byte per weight, plus up to 50 MB per thread.
    """
    view = view_weights(weights, name, shape)
    kernels = kernels_for(view.size, backend)
    bounds = [(a, min(a + BLOCK, view.size)) for a in range(0, view.size, BLOCK)]
    scan = UnitScan(1, view.size, len(bounds), lambda i: view.stored(*bounds[i])[None], kernels)
    if scan.ternary_magnitudes()[0] >= 0:
        units = resolve_units(view.rows, view.cols)
        coded = code_units(view, units, absmean, scale_dtype=scale_dtype, backend=backend)
        codes = TwoBit().encode(coded.trits[0])
        return PackedQuant(name, view.shape, codes, float(coded.scales[0, 0]), was_ternary=True)
    runs = _runs(view)

    def sums_of_blocks(run: tuple[int, int]) -> NDArray[np.float64]:
        x = view.stored(*run)
        whole = x.size // BLOCK * BLOCK
        parts = [x[:whole].reshape(-1, BLOCK), x[whole:][None]]
        return np.concatenate([kernels.abs_sums(part) for part in parts if part.size])

    # The blocks' sums are added one by one, as `UnitScan` does: the scale has the same bits.
    abs_sum = np.cumsum(np.concatenate(parallel_map(sums_of_blocks, runs)))[-1:]
    if not np.isfinite(abs_sum[0]):
        raise view.sum_error()
    fit = absmean(scan, abs_sum)
    scale = round_scales(fit.scales, scale_dtype, name, np.zeros(1, dtype=np.int64))[0, 0]
    if np.float32(scale) == 0:
        raise lost_scales_error(name, scale_dtype)
    cut = inner_cuts(fit.cuts, view.dtype)[0, 1]
    codes = np.empty(-(-view.size // 4), dtype=np.uint8)

    def pack(run: tuple[int, int]) -> None:
        kernels.two_bit(view.stored(*run), cut, codes[run[0] // 4 : -(-run[1] // 4)])

    # Backwards: what the first pass read last is still in the cache.
    parallel_map(pack, runs[::-1])
    return PackedQuant(name, view.shape, codes, float(scale), was_ternary=False)


def _runs(view: WeightsView) -> list[tuple[int, int]]:
    """Whole blocks for one call of a kernel: several, where reading them copies nothing."""
    n_blocks = -(-view.size // BLOCK)
    n_tasks = _TASKS_OF_A_THREAD * torch.get_num_threads() if view.reads_in_place else n_blocks
    step = -(-n_blocks // n_tasks) * BLOCK
    return [(a, min(a + step, view.size)) for a in range(0, view.size, step)]
