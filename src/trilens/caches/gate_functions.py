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

__all__ = [
    "GATE_FUNCTIONS",
    "INNER_FUNCTIONS",
    "LOG_OF_ZERO",
    "RATED_FUNCTIONS",
    "GateFunction",
    "RatedFunction",
]


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
        closed: A pre-activation of which the value is 0.
    """

    value: Callable[[Tensor], Tensor]
    openness: Callable[[Tensor], Tensor] | None
    range: tuple[float, float]
    closed: float = 0.0


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
LOG_OF_ZERO = -104.0
"""exp of it is 0 in float32; where logs are summed and subtracted, −inf would make NaN."""
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
        "sigmoid": GateFunction(torch.sigmoid, _sigmoid_value, (0.0, 1.0), -_INF),
        "tanh": GateFunction(torch.tanh, None, (-1.0, 1.0)),
        "identity": GateFunction(_identity, None, (-_INF, _INF)),
    }
)
"""Function name → what it does."""


def _unit(x: Tensor) -> Tensor:
    return _wide(x).float().clamp(0.0, 1.0)


def _half(x: Tensor) -> Tensor:
    return (_wide(x) / 2).float().clamp(0.0, 1.0)


def _decay(x: Tensor) -> Tensor:
    return torch.exp(_wide(x)).float()


def _softmax(x: Tensor) -> Tensor:
    # PROMOTE: every router of transformers takes its softmax in float32.
    return F.softmax(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


INNER_FUNCTIONS: Mapping[str, GateFunction] = MappingProxyType(
    {
        "unit": GateFunction(_identity, _unit, (0.0, 1.0)),
        "doubled": GateFunction(_identity, _half, (0.0, 2.0)),
        "log_decay": GateFunction(torch.exp, _decay, (0.0, 1.0), LOG_OF_ZERO),
        "softmax": GateFunction(_softmax, _softmax, (0.0, 1.0), -_INF),
        "exp": GateFunction(torch.exp, None, (0.0, _INF), LOG_OF_ZERO),
        "softplus": GateFunction(F.softplus, None, (0.0, _INF), -_INF),
    }
)
"""Functions of what recurrences and routers hold: a value in [0, 1] or a doubled one, kept as it
is; the log of a decay; a router's logits, over all experts; an unbounded exp or softplus."""


@dataclass(frozen=True, slots=True)
class RatedFunction:
    """A function of a step size dt and of a static rate A ≤ 0 with one or more states per channel.

    Attributes:
        value: (dt, rate) → the value.
        openness: (dt, rate) → float32 in [0, 1], of the value's shape.
        per_state: whether there is one value per state (else one per channel).

    Shapes:
        dt [seq, channels], rate [1, channels · states], row-major.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    openness: Callable[[Tensor, Tensor], Tensor]
    per_state: bool


def _exponent(dt: Tensor, rate: Tensor) -> Tensor:
    """dt · A [seq, channels, states]."""
    return dt[:, :, None] * rate.reshape(dt.shape[1], -1)


def _state_decay(dt: Tensor, rate: Tensor) -> Tensor:
    return torch.exp(_exponent(dt, rate)).flatten(1)


def _state_openness(dt: Tensor, rate: Tensor) -> Tensor:
    return torch.exp(_exponent(_wide(dt), _wide(rate))).flatten(1).float()


def _step_value(dt: Tensor, _rate: Tensor) -> Tensor:
    return dt


def _step_openness(dt: Tensor, rate: Tensor) -> Tensor:
    # −expm1 keeps small steps, which 1 − exp would round to 0.
    return -torch.expm1(_exponent(_wide(dt), _wide(rate))).mean(-1).float()


RATED_FUNCTIONS: Mapping[str, RatedFunction] = MappingProxyType(
    {
        "step": RatedFunction(_step_value, _step_openness, per_state=False),
        "step_decay": RatedFunction(_state_decay, _state_openness, per_state=True),
    }
)
"""dt itself, open where it takes the new token and forgets the old; and the decay exp(dt·A)."""
