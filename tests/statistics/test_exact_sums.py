from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilens.statistics.exact_sums import column_sums, divided, two_sum

numbers = st.floats(-1e100, 1e100)
rows = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 40), st.integers(1, 3)),
    elements=st.one_of(st.floats(0, 1), st.floats(-1e20, 1e20)),
)


@settings(deadline=None)
@given(a=numbers, b=numbers)
def test_two_sum_loses_nothing(a: float, b: float) -> None:
    total, error = two_sum(np.array([a]), np.array([b]))
    assert total[0] == a + b
    assert Fraction(float(total[0])) + Fraction(float(error[0])) == Fraction(a) + Fraction(b)


@settings(deadline=None)
@given(values=rows)
def test_column_sums_and_averages_are_rounded_once(values) -> None:
    before = values.copy()
    total, rest = column_sums(values)
    assert np.array_equal(values, before)
    average = divided(total, rest, len(values))
    for column in range(values.shape[1]):
        entries = [Fraction(x) for x in values[:, column].tolist()]
        exact, size = sum(entries), sum(map(abs, entries))
        got = Fraction(float(total[column])) + Fraction(float(rest[column]))
        # the sum in twice the precision: the rounding errors alone are added in float64, and
        # there are at most 6 levels of halving
        assert abs(got - exact) <= size * Fraction(40 * 6, 2**104)
        mean = Fraction(float(average[column]))
        # one rounding, 2⁻⁵³ relative, on top; below 1e-300 the remainder itself is rounded
        slack = abs(exact) * Fraction(1, 2**53) + size * Fraction(40 * 6, 2**104)
        assert abs(mean - exact / len(entries)) <= slack / len(entries) + Fraction(1, 10**300)


def test_plain_summation_would_not_pass() -> None:
    values = np.array([[1e16], [1.0], [-1e16], [1.0]])
    total, rest = column_sums(values)
    assert float((total + rest)[0]) == 2.0
    assert float(values.sum(axis=0)[0]) != 2.0


def test_a_quotient_is_off_by_half_an_ulp_and_hardly_more() -> None:
    rng = np.random.default_rng(0)
    for count in (3, 7, 1000):
        total = rng.standard_normal(2000)
        rest = total * 2.0**-53 * rng.integers(-1, 2, 2000)
        exact = [
            (Fraction(a) + Fraction(b)) / count
            for a, b in zip(total.tolist(), rest.tolist(), strict=True)
        ]
        found = divided(total, rest, count)
        for got, want, ulp in zip(found.tolist(), exact, np.spacing(found).tolist(), strict=True):
            assert abs(Fraction(got) - want) <= Fraction(abs(ulp)) * Fraction(501, 1000)
