"""What tables of sweeps share: points with an effect, some of which may have no value."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

from trilens.numbers import at_least
from trilens.results import Tabular

__all__ = ["Points"]


class Points(Tabular):
    """A result whose table has a row per point, each with an `effect`; NaN where it has none."""

    __slots__ = ()

    def best(self, k: SupportsIndex = 5) -> list[dict[str, Any]]:
        """The k rows of the table with the largest effects, by size."""
        rows = [row for row in self.table() if not math.isnan(row["effect"])]
        return sorted(rows, key=lambda row: -abs(row["effect"]))[: at_least(1, k, "k")]

    def json_rows(self) -> list[dict[str, Any]]:
        """The table as JSON can hold it: null where a point has no value."""
        return [
            {
                name: None if isinstance(value, float) and math.isnan(value) else value
                for name, value in row.items()
            }
            for row in self.table()
        ]
