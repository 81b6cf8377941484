"""What one gate is and where it was found: plain data that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from trilens.axes import GATE_SITES
from trilens.caches.gate_functions import (
    GATE_FUNCTIONS,
    INNER_FUNCTIONS,
    RATED_FUNCTIONS,
    GateFunction,
)
from trilens.errors import UsageError, ValueRangeError
from trilens.numbers import whole_number

__all__ = ["UNARY_FUNCTIONS", "GateKind", "GateSpec"]

UNARY_FUNCTIONS: Mapping[str, GateFunction] = MappingProxyType(
    {**GATE_FUNCTIONS, **INNER_FUNCTIONS}
)
"""Every function of the stored tensor alone."""

GateKind = Literal["sigmoid", "activation", "decay", "step", "linear", "router", "mix"]
"""What a gate is: a sigmoid, another activation, a recurrence's decay or step size dt, a router of
experts, weights that mix residual streams, or "linear": a product without a function or with an
unbounded one, so without openness."""


@dataclass(frozen=True, slots=True)
class GateSpec:
    """What one gate is, and where it was found.

    Attributes:
        name: Site, a key of `axes.GATE_SITES`.
        kind: What the gate is.
        formula: The value in terms of the pre-activation, for people: `silu(x)`.
        function: Key of `UNARY_FUNCTIONS` or `RATED_FUNCTIONS`: from what is stored to
            the value.
        range: Lowest and highest attainable value, infinite where there is none.
        shape: A gate's axes per token before they were flattened to units, in row-major order.
        where: Path of the module whose input or output is the pre-activation.
        static: Whether the gate is a parameter, the same for every token: its seq is 1.
        rate: Name of the static gate of the same layer that holds A, for the functions of dt and A;
            "" for all others.

    Raises:
        ValueRangeError: an unknown name, kind or function; a range that is no range; an empty axis.
    """

    name: str
    kind: GateKind
    formula: str
    function: str
    range: tuple[float, float]
    shape: tuple[int, ...]
    where: str
    static: bool = False
    rate: str = ""

    def __post_init__(self) -> None:
        _one_of(self.name, "gate", GATE_SITES)
        _one_of(self.kind, "gate kind", get_args(GateKind))
        _one_of(self.function, "gate function", [*UNARY_FUNCTIONS, *RATED_FUNCTIONS])
        if bool(self.rate) != (self.function in RATED_FUNCTIONS):
            raise ValueRangeError(
                f"rate of the gate {self.name!r} is {self.rate!r}: functions of dt and A "
                f"({', '.join(RATED_FUNCTIONS)}) name the static gate that holds A, no other does"
            )
        low, high = self.range
        if not low <= high:
            raise ValueRangeError(
                f"range of the gate {self.name!r} is {low}…{high}: the lowest value comes first"
            )
        if not self.shape or min(self.shape) < 1:
            raise ValueRangeError(
                f"shape of the gate {self.name!r} is {list(self.shape)}: it has one axis or more, "
                "none of them empty"
            )

    @property
    def units(self) -> int:
        """How many units a token has: the product of `shape`."""
        return math.prod(self.shape)

    @property
    def has_openness(self) -> bool:
        """Whether its values say how open the gate is."""
        return bool(self.rate) or UNARY_FUNCTIONS[self.function].openness is not None

    @property
    def stored_units(self) -> int:
        """Columns of the stored tensor: a decay exp(dt·A) per state is stored as dt per channel."""
        rated = RATED_FUNCTIONS.get(self.function)
        return self.shape[0] if rated is not None and rated.per_state else self.units

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON can hold it: an infinite bound becomes None."""
        low, high = self.range
        plain = asdict(self)
        plain["range"] = [_bound_to_json(low), _bound_to_json(high)]
        plain["shape"] = list(self.shape)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The spec that `to_dict` wrote.

        Raises:
            UsageError: an entry is missing, unknown or of the wrong type.
            ValueRangeError: an entry names what does not exist here.
        """
        wanted = {field.name for field in fields(cls)}
        if set(plain) != wanted:
            raise UsageError(
                f"gate spec has the entries {sorted(plain)}: it needs exactly {sorted(wanted)}"
            )
        texts = [plain[name] for name in ("name", "kind", "formula", "function", "where", "rate")]
        if not all(isinstance(text, str) for text in texts) or type(plain["static"]) is not bool:
            raise UsageError(
                f"gate spec is malformed: {texts} have to be strings, static {plain['static']!r} "
                "true or false"
            )
        try:
            low, high = plain["range"]
            bounds = (
                -math.inf if low is None else float(low),
                math.inf if high is None else float(high),
            )
            shape = tuple(whole_number(size, "axis") for size in plain["shape"])
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"gate spec is malformed: range {plain['range']!r} has to be two numbers or null, "
                f"shape {plain['shape']!r} a list of whole numbers"
            ) from error
        return cls(**{**plain, "range": bounds, "shape": shape})


def _one_of(value: str, noun: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueRangeError(f"{noun} {value!r} is unknown: known are {', '.join(allowed)}")


def _bound_to_json(bound: float) -> float | None:
    return None if math.isinf(bound) else bound
