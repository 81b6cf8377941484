"""absmean packed at once is absmean, packed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trilens.errors import DtypeError, NonFiniteError, ShapeError, ValueRangeError
from trilens.ternary.codecs.packing import TwoBit
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.fused import pack_absmean
from trilens.ternary.rules.kernels import numba_is_here

BACKENDS = ["numpy", "auto"] + (["compiled"] if numba_is_here() else [])


def gaussian(*shape: int) -> torch.Tensor:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (256, 256), (3, 700_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    weights = gaussian(*shape).to(dtype)
    packed = pack_absmean(weights, "w", backend=backend)
    quant = PerLayerQuant.quantize(weights, "w")
    assert packed.scale == quant.scale
    assert packed.shape == shape
    assert packed.was_ternary == quant.was_ternary
    assert np.array_equal(packed.codes, TwoBit().encode(quant.trits))
    assert np.array_equal(TwoBit().decode(packed.codes, shape).trits, quant.trits.numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend: str) -> None:
    weights = gaussian(900, 1301)
    strided = weights.T.contiguous().T
    packed = pack_absmean(strided, "w", backend=backend)
    expected = pack_absmean(weights, "w", backend=backend)
    assert packed.scale == expected.scale
    assert np.array_equal(packed.codes, expected.codes)


def test_ternary_already() -> None:
    weights = 0.3 * torch.sign(gaussian(40, 30)) * (gaussian(40, 30).abs() > 0.5)
    packed = pack_absmean(weights, "w")
    assert packed.was_ternary
    assert packed.scale == float(np.float32(0.3))


def test_scale_dtype() -> None:
    weights = gaussian(40, 30)
    packed = pack_absmean(weights, "w", scale_dtype="float16")
    assert packed.scale == PerLayerQuant.quantize(weights, "w", scale_dtype="float16").scale
    with pytest.raises(ValueRangeError, match="beyond float16"):
        pack_absmean(weights * 1e6, "w", scale_dtype="float16")
    with pytest.raises(ValueRangeError, match="below the smallest float16"):
        pack_absmean(weights * 1e-9, "w", scale_dtype="float16")


def test_refusals() -> None:
    weights = gaussian(40, 30)
    weights[3, 4] = math.inf
    with pytest.raises(NonFiniteError, match=r"index \(3, 4\)"):
        pack_absmean(weights, "w")
    with pytest.raises(DtypeError):
        pack_absmean(torch.ones(3, 4, dtype=torch.int64), "w")
    with pytest.raises(ShapeError):
        pack_absmean(torch.empty(0), "w")
