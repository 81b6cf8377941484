"""Which units of a gate are dead, which saturated, how evenly they are used.

`GatingAnalysis` looks at one matrix of gate values, `GatingAccumulator` at any number of batches in
memory of one vector per unit; accumulators of several workers merge. Both compute the same
statistics by the same code.

Source: fractions of tokens below and above a threshold, arXiv 1506.02078 (Karpathy et al.). The
mean alone hides a gate that alternates between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trilens.errors import NonFiniteError, ShapeError, UsageError, ValueRangeError
from trilens.numbers import at_least
from trilens.results import Tabular
from trilens.statistics.exact_sums import Vector, column_sums, divided, two_sum
from trilens.statistics.gate_values import GateValues, read_gate_values, refuse_bad_values

__all__ = ["GateValues", "GatingAccumulator", "GatingAnalysis", "GatingStatistics"]


_CHUNK_ELEMENTS = 1 << 20  # 8 MB of float64 at a time, however long the run


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GatingStatistics(Tabular):
    """What is known of a gate's units over all steps. Arrays are read-only.

    Averages, comparisons and 1 − threshold are float64, whatever the dtype of the gate values:
    1 − 0.1 is the float64 nearest to 0.9, and a float32 value of 0.9 is compared as the
    0.899999976… that it is.

    Attributes:
        avg_gate: float64 [units], the average over the steps.
        dead_gates: int64, ascending: units whose average is < threshold.
        saturated_gates: int64, ascending: units whose average is > 1 − threshold.
        gate_entropy: Shannon entropy in nats of `avg_gate` divided by its sum, in [0, ln units]:
            how evenly the units share the openness. 0 when the sum is 0, None when an average is
            negative.
        binary_entropy_bits: Mean over the units of the entropy of an average read as the
            probability to be open, in [0, 1]; None when an average is outside [0, 1].
        low_fraction: float64 [units], the fraction of steps with a value < threshold.
        high_fraction: float64 [units], the fraction of steps with a value > 1 − threshold.
        threshold: In [0, 0.5].
        n_steps: Steps, that is tokens, that were averaged.
        n_units: Units of the gate.
    """

    avg_gate: Vector
    dead_gates: NDArray[np.int64]
    saturated_gates: NDArray[np.int64]
    gate_entropy: float | None
    binary_entropy_bits: float | None
    low_fraction: Vector
    high_fraction: Vector
    threshold: float
    n_steps: int
    n_units: int

    def effective_capacity(self) -> float:
        """The fraction of units that are neither dead nor saturated, in [0, 1].

        No unit is both: the threshold is at most 0.5 and the comparisons are strict.
        """
        idle = len(self.dead_gates) + len(self.saturated_gates)
        return (self.n_units - idle) / self.n_units

    def table(self) -> list[dict[str, Any]]:
        """One row per unit: unit, average, low_fraction, high_fraction, state."""
        states = dict.fromkeys(self.dead_gates.tolist(), "dead")
        states |= dict.fromkeys(self.saturated_gates.tolist(), "saturated")
        columns = (self.avg_gate.tolist(), self.low_fraction.tolist(), self.high_fraction.tolist())
        return [
            {
                "unit": unit,
                "average": average,
                "low_fraction": low,
                "high_fraction": high,
                "state": states.get(unit, "active"),
            }
            for unit, (average, low, high) in enumerate(zip(*columns, strict=True))
        ]

    def summary(self) -> dict[str, int | float | None]:
        """The statistics of the gate as a whole, as plain numbers."""
        return {
            "n_steps": self.n_steps,
            "n_units": self.n_units,
            "threshold": self.threshold,
            "average": float(self.avg_gate.mean()),
            "dead_fraction": len(self.dead_gates) / self.n_units,
            "saturated_fraction": len(self.saturated_gates) / self.n_units,
            "effective_capacity": self.effective_capacity(),
            "gate_entropy_nats": self.gate_entropy,
            "binary_entropy_bits": self.binary_entropy_bits,
            "low_fraction": float(self.low_fraction.mean()),
            "high_fraction": float(self.high_fraction.mean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary, and the units in a table."""
        return {**self.summary(), "units": self.table()}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n_steps} steps, {self.n_units} units, "
            f"{len(self.dead_gates)} dead and {len(self.saturated_gates)} saturated at threshold "
            f"{self.threshold:g}, effective capacity {self.effective_capacity():.3f})"
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GatingAnalysis(GatingStatistics):
    """The statistics of one matrix of gate values, with the values.

    Attributes:
        gate_values: [steps, units], read-only, float64 or float32. A CPU tensor or an array of one
            of these dtypes is kept by reference, not copied.
    """

    gate_values: NDArray[np.float64] | NDArray[np.float32]

    @classmethod
    def from_activations(cls, gate_values: GateValues, threshold: float) -> GatingAnalysis:
        """Analyse gate values, one vector per step.

        Shapes:
            gate_values [steps, units].

        Args:
            gate_values: Tensor, array, nested lists, or a list of one vector per step. Gates
                with values outside [0, 1] want their openness here (`GateCache.openness`).
            threshold: Dead below it, saturated above 1 − it; in [0, 0.5].

        Raises:
            ValueRangeError: the threshold is NaN or outside [0, 0.5], or a value beyond ±1e100.
            ShapeError: no steps, no units, steps of different length, or not two axes.
            DtypeError: values that are not real numbers.
            NonFiniteError: NaN or Inf, naming the first step and unit.

        Memory:
            The values by reference and O(units) besides; half precision is kept as float32.
        """
        values = read_gate_values(gate_values)
        if not values.shape[0]:
            raise ShapeError("gate values have no steps: pass one vector per step, at least one")
        tally = GatingAccumulator(threshold)
        tally.update(values)
        shared = values.view()
        shared.setflags(write=False)
        return cls(**tally._fields(), gate_values=shared)


class GatingAccumulator:
    """Streaming statistics of a gate: any number of batches in O(units) memory.

    Args:
        threshold: Dead below it, saturated above 1 − it; in [0, 0.5].
        n_units: Units of the gate; the first update says it where it is left out.

    Raises:
        ValueRangeError: the threshold is NaN or outside [0, 0.5], or `n_units` is below 1.
    """

    __slots__ = ("_high", "_low", "_n_steps", "_n_units", "_rest", "_sum", "_threshold")

    def __init__(self, threshold: float, n_units: int | None = None) -> None:
        self._threshold = _checked_threshold(threshold)
        self._n_units: int | None = None
        self._n_steps = 0
        # The sum of a unit is _sum + _rest: two float64 carry it to twice their precision.
        self._sum: Vector = np.zeros(0)
        self._rest: Vector = np.zeros(0)
        self._low: NDArray[np.int64] = np.zeros(0, np.int64)
        self._high: NDArray[np.int64] = np.zeros(0, np.int64)
        if n_units is not None:
            self._begin(n_units)

    @property
    def threshold(self) -> float:
        """Dead below it, saturated above 1 − it."""
        return self._threshold

    @property
    def n_units(self) -> int | None:
        """Units of the gate; None before the first update says it."""
        return self._n_units

    @property
    def n_steps(self) -> int:
        """Steps seen so far."""
        return self._n_steps

    def update(self, values: GateValues) -> None:
        """Take in one batch; a batch that is refused leaves the accumulator as it was.

        Shapes:
            values [steps, units]; no steps is no news.

        Raises:
            ShapeError: not two axes, no units, or another number of units than before.
            DtypeError: values that are not real numbers.
            NonFiniteError: NaN or Inf, naming the batch's first step and unit.
            ValueRangeError: a value beyond ±1e100.
        """
        matrix = read_gate_values(values)
        steps, units = matrix.shape
        if self._n_units is not None and units != self._n_units:
            raise ShapeError(f"gate values have {units} units: this gate has {self._n_units}")
        batch = GatingAccumulator(self._threshold, units)
        chunk_steps = max(1, _CHUNK_ELEMENTS // units)
        for start in range(0, steps, chunk_steps):
            # PROMOTE: sums over a corpus drift in float32, and bfloat16 stops counting at 256.
            chunk = matrix[start : start + chunk_steps].astype(np.float64)
            refuse_bad_values(chunk, start)
            batch._low += (chunk < self._threshold).sum(axis=0)
            batch._high += (chunk > 1.0 - self._threshold).sum(axis=0)
            batch._add(*column_sums(chunk))
        batch._n_steps = steps
        # Only now, when no value was refused, does the batch count.
        if self._n_units is None:
            self._begin(units)
        self._absorb(batch)

    def merge(self, other: GatingAccumulator) -> GatingAccumulator:
        """A new accumulator that has seen what both have seen; neither is changed.

        Raises:
            ValueRangeError: the thresholds differ.
            ShapeError: the numbers of units differ.
        """
        if other._threshold != self._threshold:
            raise ValueRangeError(
                f"thresholds {self._threshold} and {other._threshold} differ: statistics of "
                "different thresholds cannot be merged"
            )
        if None not in (self._n_units, other._n_units) and self._n_units != other._n_units:
            raise ShapeError(
                f"accumulators of {self._n_units} and {other._n_units} units cannot be merged: "
                "they belong to different gates"
            )
        merged = GatingAccumulator(self._threshold, self._n_units or other._n_units)
        for part in (self, other):
            if part._n_units is not None:
                merged._absorb(part)
        return merged

    def result(self) -> GatingStatistics:
        """The statistics of everything seen so far; the accumulator can go on afterwards.

        Raises:
            ShapeError: no step was seen.
        """
        return GatingStatistics(**self._fields())

    def to_dict(self) -> dict[str, Any]:
        """The accumulator as JSON can hold it, exactly; `from_dict` reads it."""
        return {
            "threshold": self._threshold,
            "n_units": self._n_units,
            "n_steps": self._n_steps,
            "sum": self._sum.tolist(),
            "rest": self._rest.tolist(),
            "low": self._low.tolist(),
            "high": self._high.tolist(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The accumulator that `to_dict` wrote.

        Raises:
            UsageError: an entry is missing, unknown, of the wrong type or of the wrong length.
            ValueRangeError: counts that cannot be, or a threshold outside [0, 0.5].
            NonFiniteError: a sum that is NaN or Inf.
        """
        wanted = {"threshold", "n_units", "n_steps", "sum", "rest", "low", "high"}
        if set(plain) != wanted:
            raise UsageError(
                f"gating accumulator has the entries {sorted(plain)}: it needs {sorted(wanted)}"
            )
        tally = cls(plain["threshold"], plain["n_units"])
        units = tally._n_units or 0
        tally._sum = _read_vector(plain["sum"], "sum", units, np.float64)
        tally._rest = _read_vector(plain["rest"], "rest", units, np.float64)
        tally._low = _read_vector(plain["low"], "low", units, np.int64)
        tally._high = _read_vector(plain["high"], "high", units, np.int64)
        steps = plain["n_steps"]
        counts = np.concatenate([tally._low, tally._high])
        if not isinstance(steps, int) or steps < 0 or ((counts < 0) | (counts > steps)).any():
            raise ValueRangeError(
                f"gating accumulator of {steps!r} steps is malformed: low and high count 0…steps"
            )
        if steps and not units:
            raise ValueRangeError(f"gating accumulator of {steps} steps has no units: name them")
        if not (np.isfinite(tally._sum).all() and np.isfinite(tally._rest).all()):
            raise NonFiniteError("gating accumulator has NaN or Inf among its sums: count again")
        tally._n_steps = steps
        return tally

    def __repr__(self) -> str:
        units = "units unknown" if self._n_units is None else f"{self._n_units} units"
        return f"GatingAccumulator({self._n_steps} steps, {units}, threshold {self._threshold:g})"

    def _begin(self, n_units: int) -> None:
        units = at_least(1, n_units, "n_units")
        self._n_units = units
        self._sum, self._rest = np.zeros(units), np.zeros(units)
        self._low, self._high = np.zeros(units, np.int64), np.zeros(units, np.int64)

    def _absorb(self, part: GatingAccumulator) -> None:
        self._add(part._sum, part._rest)
        self._low += part._low
        self._high += part._high
        self._n_steps += part._n_steps

    def _add(self, total: Vector, rest: Vector) -> None:
        self._sum, error = two_sum(self._sum, total)
        self._sum, self._rest = two_sum(self._sum, self._rest + (error + rest))

    def _fields(self) -> dict[str, Any]:
        """The fields of GatingStatistics."""
        if not self._n_steps or self._n_units is None:
            raise ShapeError("no gate values were seen: update with at least one step")
        average = divided(self._sum, self._rest, self._n_steps)
        values = {
            "avg_gate": average,
            "dead_gates": np.flatnonzero(average < self._threshold).astype(np.int64),
            "saturated_gates": np.flatnonzero(average > 1.0 - self._threshold).astype(np.int64),
            "low_fraction": self._low / self._n_steps,
            "high_fraction": self._high / self._n_steps,
        }
        for array in values.values():
            array.setflags(write=False)
        return values | {
            "gate_entropy": _entropy_nats(average),
            "binary_entropy_bits": _binary_entropy_bits(average),
            "threshold": self._threshold,
            "n_steps": self._n_steps,
            "n_units": self._n_units,
        }


def _checked_threshold(threshold: object) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise UsageError(f"threshold {threshold!r} is not a number: pass one in [0, 0.5]")
    value = float(threshold)
    if not 0.0 <= value <= 0.5:
        raise ValueRangeError(
            f"threshold {value} is out of range: [0, 0.5]; above 0.5 a unit could be dead and "
            "saturated at once"
        )
    return value


def _entropy_nats(average: Vector) -> float | None:
    if (average < 0.0).any():
        return None
    total = float(average.sum())
    if not total:
        return 0.0
    share = average / total
    share = share[share > 0.0]
    # One unit alone gives −1·ln 1 = −0.0.
    return max(0.0, float(-(share * np.log(share)).sum()))


def _binary_entropy_bits(average: Vector) -> float | None:
    if ((average < 0.0) | (average > 1.0)).any():
        return None
    inside = average[(average > 0.0) & (average < 1.0)]
    bits = -(inside * np.log2(inside) + (1.0 - inside) * np.log1p(-inside) / math.log(2.0))
    return float(bits.sum()) / average.size


def _read_vector(values: Any, entry: str, units: int, dtype: type[Any]) -> NDArray[Any]:
    try:
        array = np.asarray(values if units else [], dtype=dtype)
        whole = np.array_equal(array, np.asarray(values, dtype=np.float64), equal_nan=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"gating accumulator's {entry!r} is no list of numbers: {error}"
        ) from error
    if array.shape != (units,) or not whole:
        raise UsageError(
            f"gating accumulator's {entry!r} is malformed: it needs {units} "
            f"{'whole ' if dtype is np.int64 else ''}numbers"
        )
    return array
