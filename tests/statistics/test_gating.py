from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tolerances import assert_close_sums
from trilens.errors import (
    DtypeError,
    NonFiniteError,
    ShapeError,
    UsageError,
    ValueRangeError,
)
from trilens.statistics.gating import GatingAccumulator, GatingAnalysis, GatingStatistics

openings = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7),
    # few distinct values, so that averages fall on the thresholds too
    elements=st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0]), st.floats(0, 1)),
)
thresholds = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.5]), st.floats(0, 0.5))


def reference(rows: list[list[float]], threshold: float, average: list[float]) -> dict[str, object]:
    """The definition, given the averages; only logarithms are floating-point."""
    steps, units = len(rows), len(rows[0])
    columns = [[row[unit] for row in rows] for unit in range(units)]
    high = 1.0 - threshold
    total = math.fsum(average)
    shares = [a / total for a in average if a] if total else []
    bits = [-(a * math.log2(a) + (1 - a) * math.log2(1 - a)) if 0 < a < 1 else 0.0 for a in average]
    return {
        "dead_gates": [u for u, a in enumerate(average) if a < threshold],
        "saturated_gates": [u for u, a in enumerate(average) if a > high],
        "gate_entropy": -math.fsum(s * math.log(s) for s in shares if s),
        "binary_entropy_bits": math.fsum(bits) / units,
        "low_fraction": [sum(v < threshold for v in column) / steps for column in columns],
        "high_fraction": [sum(v > high for v in column) / steps for column in columns],
    }


def same(a: GatingStatistics, b: GatingStatistics) -> bool:
    """Equal to the last bit in every statistic."""
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(GatingStatistics)
    )


@settings(deadline=None)
@given(values=openings, threshold=thresholds)
def test_statistics_are_the_definition(values, threshold) -> None:
    got = GatingAnalysis.from_activations(values, threshold)
    for column, average in zip(values.T.tolist(), got.avg_gate.tolist(), strict=True):
        exact = sum(map(Fraction, column)) / len(column)
        # Rounded once, after a sum in twice the precision: the exact average rounded, but where
        # that is nearer than 2⁻⁹⁰ of itself to the middle of two floats.
        slack = exact / 2**90 + Fraction(1, 10**300)
        assert float(exact - slack) <= average <= float(exact + slack)
    wanted = reference(values.tolist(), threshold, got.avg_gate.tolist())
    assert got.dead_gates.tolist() == wanted["dead_gates"]
    assert got.saturated_gates.tolist() == wanted["saturated_gates"]
    assert got.low_fraction.tolist() == wanted["low_fraction"]
    assert got.high_fraction.tolist() == wanted["high_fraction"]
    # sums of at most 7 terms of size ≤ 1: a few float64 roundings
    assert got.gate_entropy == pytest.approx(wanted["gate_entropy"], abs=1e-14)
    assert got.binary_entropy_bits == pytest.approx(wanted["binary_entropy_bits"], abs=1e-14)
    assert -1e-15 <= got.gate_entropy <= math.log(values.shape[1]) + 1e-14
    assert 0.0 <= got.binary_entropy_bits <= 1.0
    idle = {*wanted["dead_gates"], *wanted["saturated_gates"]}
    assert got.effective_capacity() == (values.shape[1] - len(idle)) / values.shape[1]
    assert (got.n_steps, got.n_units) == values.shape
    assert got.threshold == threshold


@settings(deadline=None)
@given(values=openings, threshold=thresholds, data=st.data())
def test_any_split_and_order_gives_the_same_statistics(values, threshold, data) -> None:
    whole = GatingAnalysis.from_activations(values, threshold)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=3)))
    parts = data.draw(st.permutations(np.split(values, cuts)))
    stream = GatingAccumulator(threshold)
    workers = []
    for part in parts:
        stream.update(part)
        worker = GatingAccumulator(threshold, values.shape[1])
        worker.update(part)
        workers.append(GatingAccumulator.from_dict(json.loads(json.dumps(worker.to_dict()))))
    merged = GatingAccumulator(threshold)
    for worker in workers:
        merged = merged.merge(worker)
    assert same(stream.result(), whole)
    assert same(merged.result(), whole)


@settings(deadline=None)
@given(
    value=st.floats(0, 1),
    steps=st.integers(1, 300),
    dtype=st.sampled_from([np.float64, np.float32]),
)
def test_a_constant_gate_averages_to_its_constant(value, steps, dtype) -> None:
    constant = dtype(value)
    got = GatingAnalysis.from_activations(np.full((steps, 1), constant), 0.1)
    assert got.avg_gate[0] == constant


def test_a_gate_exactly_on_the_threshold_is_neither_dead_nor_saturated() -> None:
    # naive summation of ten 0.1 gives an average of 0.09999999999999999
    assert sum([0.1] * 10) / 10 < 0.1
    got = GatingAnalysis.from_activations([[0.1, 0.9]] * 10, 0.1)
    assert got.dead_gates.size == got.saturated_gates.size == 0
    assert got.low_fraction.tolist() == got.high_fraction.tolist() == [0, 0]
    assert got.effective_capacity() == 1.0


def test_float32_is_compared_in_float64() -> None:
    # float32(0.9) = 0.8999999762 < 0.9 and float32(0.1) = 0.1000000015 > 0.1: both stay active.
    # float32(0.35) = 0.3499999940 is below 0.35 and dead; compared in float32 it would be equal.
    values = torch.tensor([[0.9, 0.1]])
    got = GatingAnalysis.from_activations(values, 0.1)
    assert got.dead_gates.size == got.saturated_gates.size == 0
    assert GatingAnalysis.from_activations(torch.tensor([[0.35]]), 0.35).dead_gates.tolist() == [0]
    assert got.avg_gate.dtype == np.float64


def test_a_gate_that_alternates_shows_in_the_fractions() -> None:
    got = GatingAnalysis.from_activations([[0.0, 0.5], [1.0, 0.5]] * 5, 0.1)
    assert got.avg_gate.tolist() == [0.5, 0.5]
    assert got.low_fraction.tolist() == [0.5, 0.0]
    assert got.high_fraction.tolist() == [0.5, 0.0]


def test_entropies_at_their_bounds() -> None:
    even = GatingAnalysis.from_activations(np.full((3, 8), 0.5), 0.1)
    assert even.gate_entropy == pytest.approx(math.log(8), abs=1e-14)
    assert even.binary_entropy_bits == 1.0
    one = GatingAnalysis.from_activations([[0.0, 1.0]], 0.1)
    assert one.gate_entropy == 0.0
    assert math.copysign(1, one.gate_entropy) == 1
    assert one.binary_entropy_bits == 0.0
    shut = GatingAnalysis.from_activations([[0.0, 0.0]], 0.1)
    assert shut.gate_entropy == 0.0
    assert shut.effective_capacity() == 0.0


def test_entropies_outside_their_domain_are_none() -> None:
    above = GatingAnalysis.from_activations([[1.5, 0.5]], 0.1)
    assert above.gate_entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert above.binary_entropy_bits is None
    below = GatingAnalysis.from_activations([[-0.2, 0.5]], 0.1)
    assert below.gate_entropy is None
    assert below.binary_entropy_bits is None


def test_extreme_thresholds() -> None:
    values = [[0.0, 0.3, 0.5, 0.7, 1.0]]
    loose = GatingAnalysis.from_activations(values, 0)
    assert loose.effective_capacity() == 1.0
    tight = GatingAnalysis.from_activations(values, 0.5)
    assert tight.dead_gates.tolist() == [0, 1]
    assert tight.saturated_gates.tolist() == [3, 4]
    assert tight.effective_capacity() == 0.2


@pytest.mark.parametrize("threshold", [-0.1, 0.500001, 1, math.nan, math.inf, -math.inf])
def test_thresholds_are_not_clamped(threshold) -> None:
    with pytest.raises(ValueRangeError, match=r"threshold .* is out of range: \[0, 0.5\]"):
        GatingAnalysis.from_activations([[0.5]], threshold)
    with pytest.raises(ValueRangeError):
        GatingAccumulator(threshold)


@pytest.mark.parametrize("threshold", ["0.1", None, True])
def test_a_threshold_is_a_number(threshold) -> None:
    with pytest.raises(UsageError, match="is not a number"):
        GatingAccumulator(threshold)


ROWS = [[0.25, 0.5], [0.75, 1.0], [0.0, 0.125]]


@pytest.mark.parametrize(
    "values",
    [
        ROWS,
        tuple(map(tuple, ROWS)),
        np.array(ROWS),
        np.array(ROWS, np.float16),
        np.array(ROWS)[::-1][::-1],
        torch.tensor(ROWS),
        torch.tensor(ROWS, dtype=torch.bfloat16, requires_grad=True),
        torch.tensor(ROWS, dtype=torch.float16).T.contiguous().T,
        [torch.tensor(row) for row in ROWS],
        [np.array(row, np.float32) for row in ROWS],
    ],
)
def test_every_way_to_hand_over_values(values) -> None:
    got = GatingAnalysis.from_activations(values, 0.1)
    assert same(got, GatingAnalysis.from_activations(np.array(ROWS), 0.1))
    assert got.gate_values.tolist() == ROWS
    assert not got.gate_values.flags.writeable


def test_whole_numbers_and_truth_values_are_gate_values() -> None:
    for values in ([[0, 1], [1, 1]], torch.tensor([[False, True], [True, True]])):
        assert GatingAnalysis.from_activations(values, 0.1).avg_gate.tolist() == [0.5, 1.0]


def test_values_are_kept_by_reference_and_the_callers_array_stays_writable() -> None:
    values = np.full((2, 3), 0.5)
    got = GatingAnalysis.from_activations(values, 0.1)
    assert np.shares_memory(got.gate_values, values)
    values[0, 0] = 0.25


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ([], ShapeError, "no steps"),
        (np.zeros((0, 3)), ShapeError, "no steps"),
        (np.zeros((3, 0)), ShapeError, "1 unit or more"),
        ([[], []], ShapeError, "1 unit or more"),
        ([[0.1, 0.2], [0.3]], ShapeError, "step 1 have 1 units, step 0 has 2"),
        ([[[0.1], [0.2, 0.3]]], ShapeError, "ragged"),
        ([0.1, 0.2], ShapeError, "each step is a vector"),
        (np.zeros(3), ShapeError, "one vector per step"),
        (torch.zeros(2, 3, 4), ShapeError, r"\[2, 3, 4\]"),
        ([["a"]], DtypeError, "real numbers"),
        ("text", DtypeError, "are a str"),
        (0.5, DtypeError, "are a float"),
        (torch.zeros(2, 2, dtype=torch.complex64), DtypeError, "complex64"),
        ([[0.1, 0.2], [0.3, math.nan]], NonFiniteError, "step 1, unit 1 is nan"),
        (torch.tensor([[0.1], [math.inf]]), NonFiniteError, "step 1, unit 0 is inf"),
        (np.array([[-np.inf]], np.float32), NonFiniteError, "step 0, unit 0 is -inf"),
        ([[1e101]], ValueRangeError, "out of range"),
    ],
)
def test_what_is_no_gate_is_refused(values, error, words) -> None:
    with pytest.raises(error, match=words):
        GatingAnalysis.from_activations(values, 0.1)


def test_the_first_bad_value_is_named_wherever_it_is() -> None:
    values = np.zeros((3, 1 << 20), np.float32)  # one chunk per step
    values[2, 77] = np.nan
    with pytest.raises(NonFiniteError, match="step 2, unit 77"):
        GatingAnalysis.from_activations(values, 0.1)


def test_results_are_frozen() -> None:
    got = GatingAnalysis.from_activations(ROWS, 0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.threshold = 0.2
    for name in ("avg_gate", "dead_gates", "saturated_gates", "low_fraction", "high_fraction"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(got, name)[...] = 0
    assert got.dead_gates.dtype == got.saturated_gates.dtype == np.int64


def test_table_and_summary_are_plain_and_say_the_same() -> None:
    got = GatingAnalysis.from_activations([[0.0, 0.5, 1.0], [0.0, 0.75, 1.0]], 0.1)
    table = got.table()
    assert [row["state"] for row in table] == ["dead", "active", "saturated"]
    assert table[1] == {
        "unit": 1,
        "average": 0.625,
        "low_fraction": 0.0,
        "high_fraction": 0.0,
        "state": "active",
    }
    summary = got.summary()
    assert json.loads(json.dumps(table)) == table
    assert json.loads(json.dumps(summary)) == summary
    assert summary["effective_capacity"] == pytest.approx(1 / 3)
    assert summary["dead_fraction"] == summary["saturated_fraction"] == pytest.approx(1 / 3)
    assert summary["average"] == pytest.approx(1.625 / 3)
    assert summary["gate_entropy_nats"] == got.gate_entropy
    assert summary["n_steps"] == 2
    assert repr(got) == (
        "GatingAnalysis(2 steps, 3 units, 1 dead and 1 saturated at threshold 0.1, "
        "effective capacity 0.333)"
    )


def test_an_accumulator_needs_steps_but_a_batch_may_be_empty() -> None:
    tally = GatingAccumulator(0.1, 2)
    with pytest.raises(ShapeError, match="no gate values"):
        tally.result()
    tally.update(np.zeros((0, 2)))
    assert tally.n_steps == 0
    with pytest.raises(ShapeError, match="no gate values"):
        GatingAccumulator(0.1).result()
    tally.update(ROWS)
    assert tally.n_steps == 3
    assert type(tally.result()) is GatingStatistics


def test_a_refused_batch_leaves_no_trace() -> None:
    tally = GatingAccumulator(0.1)
    with pytest.raises(NonFiniteError):
        tally.update([[0.5, math.nan]])
    assert tally.n_units is None
    tally.update(ROWS)
    before = tally.to_dict()
    big = np.zeros((3, 2))
    big[2, 1] = np.nan
    with pytest.raises(NonFiniteError):
        tally.update(big)
    with pytest.raises(ShapeError, match="have 3 units: this gate has 2"):
        tally.update([[0.1, 0.2, 0.3]])
    assert tally.to_dict() == before


def test_long_batches_are_read_in_chunks() -> None:
    values = np.random.default_rng(0).random((9, 300_000)).astype(np.float32)  # 3 steps per chunk
    got = GatingAnalysis.from_activations(values, 0.2)
    assert_close_sums(got.avg_gate, values.mean(0, dtype=np.float64), got.avg_gate, 9)
    assert got.low_fraction.sum() == pytest.approx((values < np.float64(0.2)).mean(0).sum())


def test_merging_what_does_not_belong_together_is_refused() -> None:
    tally = GatingAccumulator(0.1, 2)
    with pytest.raises(ValueRangeError, match=r"thresholds 0\.1 and 0\.2"):
        tally.merge(GatingAccumulator(0.2, 2))
    with pytest.raises(ShapeError, match="2 and 3 units"):
        tally.merge(GatingAccumulator(0.1, 3))


def test_merge_changes_neither() -> None:
    one, two = GatingAccumulator(0.1), GatingAccumulator(0.1)
    one.update(ROWS)
    two.update(ROWS)
    before = one.to_dict(), two.to_dict()
    merged = one.merge(two)
    merged.update(ROWS)
    assert (one.to_dict(), two.to_dict()) == before
    assert merged.n_steps == 9
    empty = GatingAccumulator(0.1)
    assert same(empty.merge(one).result(), one.result())
    assert same(one.merge(empty).result(), one.result())


@pytest.mark.parametrize("n_units", [0, -1, 2.0, True, "2"])
def test_units_are_a_count(n_units) -> None:
    with pytest.raises(ValueRangeError, match="n_units"):
        GatingAccumulator(0.1, n_units)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"threshold": 0.7}, ValueRangeError),
        ({"n_units": 0}, ValueRangeError),
        ({"n_units": 3}, UsageError),
        ({"n_units": None}, UsageError),
        ({"n_steps": 2.0}, ValueRangeError),
        ({"n_steps": -1}, ValueRangeError),
        ({"n_steps": 0}, ValueRangeError),
        ({"sum": [1.0]}, UsageError),
        ({"sum": [1.0, math.nan]}, NonFiniteError),
        ({"rest": "ab"}, UsageError),
        ({"low": [0, 99]}, ValueRangeError),
        ({"high": [0.5, 0]}, UsageError),
        ({"high": [-1, 0]}, ValueRangeError),
        ({"extra": 1}, UsageError),
    ],
)
def test_a_damaged_dictionary_is_refused(change, error) -> None:
    tally = GatingAccumulator(0.1)
    tally.update(ROWS)
    with pytest.raises(error):
        GatingAccumulator.from_dict({**tally.to_dict(), **change})


def test_an_accumulator_that_saw_nothing_survives_json() -> None:
    for tally in (GatingAccumulator(0.1), GatingAccumulator(0.1, 3)):
        again = GatingAccumulator.from_dict(json.loads(json.dumps(tally.to_dict())))
        assert again.n_units == tally.n_units
        assert again.n_steps == 0
    with pytest.raises(ValueRangeError, match="has no units"):
        GatingAccumulator.from_dict({**GatingAccumulator(0.1).to_dict(), "n_steps": 4})
