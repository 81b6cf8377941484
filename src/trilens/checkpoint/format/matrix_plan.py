"""`MatrixPlan`: what one matrix of a mixed plan becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

from trilens.errors import UsageError
from trilens.ternary.calibrated.rules import CalibratedName, check_rule
from trilens.ternary.granularity import Per, resolve_units
from trilens.ternary.rules.rules import RuleName

__all__ = ["MatrixPlan", "MatrixRule"]

MatrixRule: TypeAlias = RuleName | CalibratedName | Literal["keep"]

_OPTIONS = ("rule", "per", "group_size")


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """What one matrix becomes.

    Attributes:
        rule: One of `ternary.rules.RULES`, with a calibration text one of
            `ternary.calibrated.CALIBRATED_RULES`, or "keep".
        per: As in `TernaryPlan`; None where the matrix is kept.
        group_size: As in `TernaryPlan`.

    Raises:
        UsageError: an option that does not exist, or one beside "keep".
        ValueRangeError: a group size below 1.
    """

    rule: MatrixRule
    per: Per | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Check the options, and derive what they imply."""
        if self.rule == "keep":
            if self.per is not None or self.group_size is not None:
                raise UsageError(
                    "a matrix that is kept has no scales: leave per and group_size out"
                )
            return
        check_rule(self.rule)
        units = resolve_units(1, 1, self.per, self.group_size)
        object.__setattr__(self, "per", units.per)
        object.__setattr__(self, "group_size", units.group_size)

    @property
    def label(self) -> str:
        """A short name: "exact g128", "planes row", "keep"."""
        if self.rule == "keep":
            return "keep"
        return (
            f"{self.rule} g{self.group_size}" if self.per == "group" else f"{self.rule} {self.per}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, only those that say something."""
        values = {name: getattr(self, name) for name in _OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any, name: str) -> Self:
        """What `to_dict` gave.

        Args:
            values: the options.
            name: the matrix, for errors.

        Raises:
            UsageError: no options, or unknown ones.
        """
        if not isinstance(values, dict) or "rule" not in values:
            raise UsageError(
                f"plan of matrix {name!r} is {values!r}: an object with a rule is needed"
            )
        unknown = sorted(map(str, set(values) - set(_OPTIONS)))
        if unknown:
            raise UsageError(
                f"plan of matrix {name!r} has no option {unknown[0]!r}: {', '.join(_OPTIONS)}"
            )
        return cls(**values)
