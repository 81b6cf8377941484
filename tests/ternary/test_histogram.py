"""Weights by level: all of them where they are few, thresholds where levels part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilens.ternary.histogram import BINS, REACH, LevelSample
from trilens.ternary.quantize import PerLayerQuant

BIN = 2 * REACH / 1024  # what a threshold is resolved to


def weights(rows: int = 64, cols: int = 200, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def histogram(matrix: torch.Tensor, **options):
    quant = PerLayerQuant.quantize(matrix, "w", **options)
    sample = LevelSample()
    sample.add(matrix, quant)
    return sample.result(), quant


@pytest.mark.parametrize("options", [{}, {"per": "row"}, {"group_size": 48}])
def test_thresholds_of_rounding_are_half_a_scale(options) -> None:
    matrix = weights()
    found, quant = histogram(matrix, rule="absmean", **options)
    assert found.levels == (-1, 0, 1)
    assert found.thresholds == pytest.approx((-0.5, 0.5), abs=2 * BIN)
    assert found.n_weights == matrix.numel()
    zeros = int((quant.trits == 0).sum())
    assert sum(found.counts[1]) == zeros
    # No weight of level 0 lies beyond the bins that half a scale falls into.
    at = np.flatnonzero(found.counts[1])
    assert (at.min(), at.max()) == (BINS // 2 - 4, BINS // 2 + 3)
    scales = np.abs(quant.scales)
    assert found.scale == pytest.approx((scales.min(), np.median(scales), scales.max()), rel=0.05)


def test_the_threshold_of_twn_is_its_own() -> None:
    matrix = weights()
    found, quant = histogram(matrix, rule="twn")
    own = 0.7 * float(matrix.abs().mean()) / float(quant.scale)
    assert found.thresholds == pytest.approx((-own, own), abs=2 * BIN)
    assert own < 0.49  # which the rounding to the nearest level would not give


def test_an_offset_is_taken_away() -> None:
    found, _ = histogram(weights() + 0.3, rule="asymmetric", group_size=100)
    below, above = found.thresholds
    assert below == pytest.approx(-0.5, abs=0.05) and above == pytest.approx(0.5, abs=0.05)


def test_four_levels_with_scales_of_either_sign() -> None:
    matrix = weights()
    matrix[::2] -= 0.02  # skewed both ways
    matrix[1::2] += 0.02
    found, quant = histogram(matrix, rule="quad", per="row")
    assert (quant.scales < 0).any() and (quant.scales > 0).any()
    assert found.levels == (-1, 0, 1, 2)
    assert found.thresholds == pytest.approx((-0.5, 0.5, 1.5), abs=2 * BIN)
    assert min(found.scale) > 0


def test_units_of_zeros_have_no_place() -> None:
    matrix = weights()
    matrix[:3] = 0
    found, _ = histogram(matrix, per="row")
    assert found.n_weights == matrix[3:].numel()
    nothing, _ = histogram(torch.zeros(4, 8))
    assert nothing is None


def test_of_a_large_matrix_rows_are_taken() -> None:
    matrix = weights(3000, 300)
    found, quant = histogram(matrix, rule="absmean")
    assert (1 << 15) < found.n_weights <= 1 << 16
    share = sum(found.counts[1]) / found.n_weights
    assert share == pytest.approx(quant.sparsity, abs=0.02)


def test_what_was_moved_across_shows() -> None:
    matrix = weights()
    quant = PerLayerQuant.quantize(matrix, "w")
    trits = quant.trits.clone()
    trits[:20] = trits[:20].roll(1, dims=1)  # as a calibration moves them
    sample = LevelSample()
    sample.add(matrix, PerLayerQuant.from_trits(trits, quant.scale, "w"))
    found = sample.result()
    assert sum(found.counts[1][: BINS // 2 - 4]) > 0  # zeros among large weights
    assert found.thresholds == pytest.approx((-0.5, 0.5), abs=2 * BIN)


def test_experts_are_summed() -> None:
    sample = LevelSample()
    for seed in range(3):
        matrix = weights(seed=seed)
        sample.add(matrix, PerLayerQuant.quantize(matrix, "w", per="row"))
    assert sample.result().n_weights == 3 * weights().numel()
