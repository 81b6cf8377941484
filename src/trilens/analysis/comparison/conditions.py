"""Conditions such as `kl_nats_mean>0.1`, by which a comparison fails."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType

from trilens.analysis.comparison.rows import METRICS, Row
from trilens.errors import NotStoredError, UsageError

__all__ = ["Condition", "parse_condition"]

_OPERATORS: MappingProxyType[str, Callable[[float, float], bool]] = MappingProxyType(
    {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
)
_GRAMMAR = re.compile(
    r"\s*(?P<metric>\w+)(?:\.(?P<column>\w+))?\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>\S+)\s*"
)
_COLUMNS = ("before", "after", "delta", "ratio")


@dataclass(frozen=True, slots=True)
class Condition:
    """A metric, one of its columns, and a bound.

    Attributes:
        text: as it was written.
        metric: a key of `METRICS`.
        column: before, after, delta, or ratio (after / before).
        sign: one of > >= < <=.
        bound: a finite number.
    """

    text: str
    metric: str
    column: str
    sign: str
    bound: float

    def met_by(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that meet the condition; one that is NaN meets every condition.

        Raises:
            NotStoredError: no row has this metric.
        """
        candidates = [row for row in rows if row.metric == self.metric]
        if not candidates:
            raise NotStoredError(
                f"condition {self.text!r} can't be checked: this comparison has no "
                f"{self.metric} ({METRICS[self.metric]})"
            )
        values = [(row, self.value(row)) for row in candidates]
        meets = _OPERATORS[self.sign]
        return [row for row, value in values if math.isnan(value) or meets(value, self.bound)]

    def value(self, row: Row) -> float:
        """What the condition looks at."""
        if self.column == "ratio":
            if row.before == row.after:
                return 1.0
            return row.after / row.before if row.before else math.inf
        value: float = getattr(row, self.column)
        return value


def parse_condition(text: str) -> Condition:
    """Read METRIC, an optional .before, .after, .delta or .ratio, one of > >= < <=, a number.

    Raises:
        UsageError: anything else, or a metric that is none.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise UsageError(
            f"condition {text!r} can't be read: write a metric, one of > >= < <= and a number, "
            "for example 'kl_nats_mean>0.1' or 'perplexity.ratio>1.05'"
        )
    metric, column = match["metric"], match["column"] or "after"
    if metric not in METRICS:
        raise UsageError(
            f"condition {text!r} names no metric: {metric!r} is none of {', '.join(METRICS)}"
        )
    if column not in _COLUMNS:
        raise UsageError(
            f"condition {text!r} names no column: {column!r} is none of {', '.join(_COLUMNS)}"
        )
    try:
        bound = float(match["bound"])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise UsageError(f"condition {text!r} has no bound: {match['bound']!r} is no number")
    return Condition(text.strip(), metric, column, match["sign"], bound)
