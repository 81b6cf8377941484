"""The elementwise functions that gates apply, each with its range and its openness.

A capture keeps a gate's pre-activation, for a silu's output does not give σ(x) back. This table
turns it into the value that the model used and into the openness, how far the gate is open, in
[0, 1]. A new function is one more entry here.

Source: SiLU and GELU, arXiv 1606.08415; the squared ReLU, arXiv 2109.08668.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GATE_FUNCTIONS", "GateFunction"]


@dataclass(frozen=True, slots=True)
class GateFunction:
    """An elementwise function: what it gives, where its values lie, how open it is.

    Attributes:
        value: Pre-activation → the value, in the tensor's own dtype, by the very torch calls that
            `transformers` makes, so that the two agree bit for bit.
        openness: Pre-activation → how open the gate is, float32 in [0, 1] of the same shape; NaN
            stays NaN. None for a function of which no such share exists.
        range: Lowest and highest attainable value, infinite where there is none. In a narrow dtype
            the values themselves are rounded, and may lie one rounding step outside.
    """

    value: Callable[[Tensor], Tensor]
    openness: Callable[[Tensor], Tensor] | None
    range: tuple[float, float]


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    # PROMOTE: in bfloat16 σ rounds to 1 from 6.24 and Φ from 2.89 on: nearly open becomes open.
    return x if x.dtype == torch.float64 else x.float()


def _logistic(x: Tensor) -> Tensor:
    return torch.sigmoid(_wide(x)).float()


def _normal_cdf(x: Tensor) -> Tensor:
    # erfc instead of 1 + erf, which cancels to 0 for x < −6 in float32 (so does special.ndtr).
    return (0.5 * torch.erfc(_wide(x) * -math.sqrt(0.5))).float()


def _quick_logistic(x: Tensor) -> Tensor:
    return torch.sigmoid(1.702 * _wide(x)).float()


def _step(x: Tensor) -> Tensor:
    # A comparison alone would turn NaN into a closed gate.
    return torch.where(x.isnan(), x.float(), (x > 0).float())


def _sigmoid_value(x: Tensor) -> Tensor:
    return torch.sigmoid(x).float()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_new(x: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def _identity(x: Tensor) -> Tensor:
    return x


_INF = math.inf
# The minima have no closed form: they are the values at the root of the derivative, in float64.
_SILU_MIN = -0.27846454276107385
_GELU_MIN = -0.16997120747990369
_GELU_TANH_MIN = -0.17004075057125406
_GELU_FAST_MIN = -0.170040750571836

GATE_FUNCTIONS: Mapping[str, GateFunction] = MappingProxyType(
    {
        "silu": GateFunction(F.silu, _logistic, (_SILU_MIN, _INF)),
        "gelu": GateFunction(F.gelu, _normal_cdf, (_GELU_MIN, _INF)),
        # The tanh forms approximate x·Φ(x): their openness is the Φ(x) they stand for.
        "gelu_tanh": GateFunction(_gelu_tanh, _normal_cdf, (_GELU_TANH_MIN, _INF)),
        "gelu_new": GateFunction(_gelu_new, _normal_cdf, (_GELU_TANH_MIN, _INF)),
        "gelu_fast": GateFunction(_gelu_fast, _normal_cdf, (_GELU_FAST_MIN, _INF)),
        "quick_gelu": GateFunction(_quick_gelu, _quick_logistic, (_SILU_MIN / 1.702, _INF)),
        "relu": GateFunction(F.relu, _step, (0.0, _INF)),
        "relu2": GateFunction(_relu2, _step, (0.0, _INF)),
        "sigmoid": GateFunction(torch.sigmoid, _sigmoid_value, (0.0, 1.0)),
        "tanh": GateFunction(torch.tanh, None, (-1.0, 1.0)),
        "identity": GateFunction(_identity, None, (-_INF, _INF)),
    }
)
"""Function name → what it does."""
