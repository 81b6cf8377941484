from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tolerances import assert_close_sums, sum_error
from trilens.errors import DtypeError, NonFiniteError, ShapeError, ValueRangeError
from trilens.statistics.divergence import (
    cosine,
    js_nats,
    kl_nats,
    max_relative,
    relative_error,
    relative_errors,
)

ROWS = [kl_nats, js_nats, cosine]
WHOLE = [relative_error, max_relative]

vectors = hnp.arrays(np.float64, 5, elements=st.floats(-1e3, 1e3))
wild = hnp.arrays(np.float64, 4, elements=st.floats(allow_nan=False, allow_infinity=False))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> list[float]:
    top = max(logits.tolist())
    weights = [math.exp(x - top) for x in logits.tolist()]
    return [w / math.fsum(weights) for w in weights]


def kl_of(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


logits = hnp.arrays(np.float64, 6, elements=st.floats(-30, 30))


@settings(deadline=None)
@given(a=logits, b=logits)
def test_kl_is_its_definition(a, b) -> None:
    # float64, terms up to 60 nats, each with two logarithms that are rounded
    close = float(sum_error(3 * 6, 60))
    assert float(kl_nats(a, b)) == pytest.approx(kl_of(softmax(a), softmax(b)), abs=close)
    assert kl_nats(a, b) >= 0
    assert kl_nats(a, a) == 0
    assert float(kl_nats(a + 5.0, b)) == pytest.approx(float(kl_nats(a, b)), abs=2 * close)


@settings(deadline=None)
@given(a=logits, b=logits)
def test_js_is_its_definition(a, b) -> None:
    p, q = softmax(a), softmax(b)
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    wanted = (kl_of(p, middle) + kl_of(q, middle)) / 2
    # Two sums of 6 terms that add up to ln 2 at most, of shares that are rounded themselves
    close = float(sum_error(2 * 6 + 6))
    assert float(js_nats(p, q)) == pytest.approx(wanted, abs=close)
    assert 0 <= js_nats(p, q) <= math.log(2)
    assert float(js_nats(q, p)) == pytest.approx(float(js_nats(p, q)), abs=close)
    assert js_nats(p, p) == 0


def test_divergences_are_not_symmetric_and_the_first_is_before() -> None:
    before, after = torch.tensor([0.0, math.log(3)]), torch.tensor([0.0, 0.0])
    wanted = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(kl_nats(before, after)) == pytest.approx(wanted, abs=1e-8)  # float32 log(3)
    assert float(kl_nats(after, before)) != pytest.approx(wanted, abs=1e-3)


def test_excluded_entries_of_kl() -> None:
    inf = math.inf
    assert kl_nats([0.0, -inf], [0.0, 0.0]) == pytest.approx(math.log(2))
    assert kl_nats([0.0, -inf], [0.0, -inf]) == 0
    assert kl_nats([0.0, 0.0], [0.0, -inf]) == inf
    # p is not excluded, but so small that it rounds to 0
    assert kl_nats([0.0, -2000.0], [0.0, -inf]) == inf


def test_excluded_entries_of_js() -> None:
    assert float(js_nats([1.0, 0.0], [0.0, 1.0])) == math.log(2)
    assert float(js_nats([1.0, 0.0], [1.0, 0.0])) == 0
    tiny = [1.0, 5e-324]
    assert float(js_nats(tiny, tiny)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_inputs_are_exactly_equal(dtype) -> None:
    a = (random(7, 33) * 5).to(dtype)
    assert (kl_nats(a, a.clone()) == 0).all()
    p = a.softmax(-1)
    assert (js_nats(p, p.clone()) == 0).all()
    assert (cosine(a, a.clone()) == 1).all()
    assert relative_error(a, a.clone()) == 0
    assert max_relative(a, a.clone()) == 0


@pytest.mark.parametrize("function", ROWS)
def test_rows_are_independent_and_keep_their_shape(function) -> None:
    a, b = random(2, 3, 8, seed=1).softmax(-1), random(2, 3, 8, seed=2).softmax(-1)
    got = function(a, b)
    assert got.shape == (2, 3)
    assert got.dtype == np.float64
    for i in range(2):
        for j in range(3):
            alone = function(a[i, j], b[i, j])
            assert alone.shape == ()
            # sums of 8 terms may be grouped otherwise in a matrix
            assert float(got[i, j]) == pytest.approx(float(alone), abs=float(sum_error(2 * 8)))


@pytest.mark.parametrize("function", [*ROWS, *WHOLE])
def test_tensors_arrays_and_lists_are_the_same(function) -> None:
    a, b = random(2, 8, seed=1).softmax(-1), random(2, 8, seed=2).softmax(-1)
    wanted = function(a, b)
    frozen = a.numpy().copy()
    frozen.setflags(write=False)
    for x in (a.requires_grad_(), frozen, frozen[::-1][::-1], frozen.astype(">f4"), a.tolist()):
        # Numbers that lie elsewhere in memory may be added up in another order.
        assert_close_sums(function(x, b), wanted, 1.0, 2 * 8)
    assert_close_sums(function(frozen.astype(np.longdouble), b), wanted, 1.0, 2 * 8)


def test_large_inputs_are_read_in_blocks() -> None:
    vocab, rows = 1 << 20, 9  # 4 rows per block
    a = torch.arange(1.0, rows + 1)[:, None].expand(rows, vocab)
    b = a.clone()
    b[:, 0] += 1.0
    # One of n equal logits raised by 1: KL = ln((n − 1 + e)/n) − 1/n. Sums of 1e6 shares of 1 are
    # good to 1e-12 in any order, and so are their logarithms.
    wanted = math.log1p((math.e - 1) / vocab) - 1 / vocab
    np.testing.assert_allclose(kl_nats(a, b), wanted, rtol=0, atol=float(sum_error(3 * vocab)))
    # 9 differences of 1; the squares of a sum to 285 per word
    close = float(sum_error(rows * vocab))
    assert relative_error(a, b) == pytest.approx(rows / (285 * vocab), rel=close)
    assert max_relative(a, b) == 1 / 9
    with pytest.raises(NonFiniteError, match="row 6 of q_logits"):
        kl_nats(a, b.index_fill(0, torch.tensor([6]), math.nan))


@settings(deadline=None)
@given(a=vectors, b=vectors)
def test_cosine_is_its_definition(a, b) -> None:
    x, y = a.tolist(), b.tolist()
    norms = math.hypot(*x) * math.hypot(*y)
    dot = math.fsum(u * v for u, v in zip(x, y, strict=True))
    got = float(cosine(a, b))
    assert -1 <= got <= 1
    if norms > 1e-200:
        assert got == pytest.approx(dot / norms, abs=float(sum_error(3 * 5 + 4)))
    assert float(cosine(b, a)) == got


@settings(deadline=None)
@given(a=wild, factor=st.sampled_from([0.5, 2.0, 1024.0]))
def test_cosine_of_a_vector_with_itself_is_exactly_one_at_any_scale(a, factor) -> None:
    assert cosine(a, a) == 1
    with np.errstate(over="ignore"):
        scaled = a * factor
    if np.isfinite(scaled).all() and np.array_equal(scaled / factor, a) and a.any():
        assert cosine(a, scaled) == 1
        assert cosine(a, -scaled) == -1


def test_cosine_of_zero_vectors_is_defined() -> None:
    assert cosine([0.0, 0.0], [0.0, 0.0]) == 1
    assert cosine([0.0, 0.0], [1.0, 0.0]) == 0
    assert cosine([1.0, 0.0], [0.0, 0.0]) == 0


@settings(deadline=None)
@given(a=vectors, b=vectors)
def test_errors_are_their_definitions(a, b) -> None:
    x, y = a.tolist(), b.tolist()
    square = math.fsum((u - v) ** 2 for u, v in zip(x, y, strict=True))
    norm, top = math.fsum(u * u for u in x), max(map(abs, x))
    if norm > 1e-200 and (square > 1e-200 or square == 0):
        assert relative_error(a, b) == pytest.approx(square / norm, rel=1e-13)
    if top > 1e-200:
        largest = max(abs(u - v) for u, v in zip(x, y, strict=True))
        assert max_relative(a, b) == pytest.approx(largest / top, rel=1e-13)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_errors_do_not_depend_on_the_scale(scale) -> None:
    a, b = np.array([3.0, 4.0, 0.0]) * scale, np.array([3.0, 3.0, -2.0]) * scale
    assert relative_error(a, b) == pytest.approx(0.2, rel=1e-12)
    assert max_relative(a, b) == pytest.approx(0.5, rel=1e-12)
    assert float(cosine(a, b)) == pytest.approx(21 / (5 * math.sqrt(22)), rel=1e-12)


@pytest.mark.parametrize("function", WHOLE)
def test_errors_relative_to_zero_are_defined(function) -> None:
    zero, one = torch.zeros(3), torch.tensor([0.0, 1e-30, 0.0])
    assert function(zero, zero) == 0
    assert function(zero, one) == math.inf
    assert function(one, zero) == 1
    assert isinstance(function(one, zero), float)


def test_a_small_difference_in_a_narrow_dtype_is_measured_in_float64() -> None:
    a = torch.ones(1 << 12, dtype=torch.bfloat16)
    b = a.clone()
    b[5] = 1 + 2**-7  # the next bfloat16
    assert relative_error(a, b) == 2**-14 / 2**12
    assert max_relative(a, b) == 2**-7


@pytest.mark.parametrize("function", [*ROWS, *WHOLE])
def test_operands_that_do_not_match_are_refused(function) -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3\] and \[3, 2\] differ"):
        function(np.zeros((2, 3)), torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="empty"):
        function(np.zeros((2, 0)), np.zeros((2, 0)))
    with pytest.raises(ShapeError, match="ragged"):
        function([[0.5], [0.5, 0.5]], [[0.5], [0.5]])
    with pytest.raises(DtypeError, match="complex"):
        function(torch.zeros(2, dtype=torch.complex64), torch.zeros(2))
    with pytest.raises(DtypeError, match="complex"):
        function(torch.zeros(2), np.zeros(2, complex))


@pytest.mark.parametrize("function", ROWS)
def test_a_number_has_no_rows(function) -> None:
    with pytest.raises(ShapeError, match="no rows"):
        function(torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [js_nats, cosine, *WHOLE])
def test_non_finite_values_are_refused(function, bad) -> None:
    fine = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    broken = fine.clone()
    broken[1, 0] = bad
    for pair in ((fine, broken), (broken, fine)):
        with pytest.raises(NonFiniteError, match="row 1 of" if function not in WHOLE else "holds"):
            function(*pair)


@pytest.mark.parametrize("row", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_distribution_are_refused(row) -> None:
    fine = torch.zeros(2, 2)
    with pytest.raises(NonFiniteError, match="row 1 of p_logits"):
        kl_nats([[0.0, 0.0], row], fine)
    with pytest.raises(NonFiniteError, match="row 1 of q_logits"):
        kl_nats(fine, [[0.0, 0.0], row])


@pytest.mark.parametrize("row", [[0.6, 0.6], [0.4, 0.4], [1.5, -0.5], [0.0, 0.0]])
def test_rows_that_are_no_distribution_are_refused(row) -> None:
    fine = [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(ValueRangeError, match="row 1 of q is no distribution"):
        js_nats(fine, [[0.5, 0.5], row])
    with pytest.raises(ValueRangeError, match="row 1 of p is no distribution"):
        js_nats([[0.5, 0.5], row], fine)


def test_probabilities_of_a_narrow_dtype_are_normalised() -> None:
    a, b = random(50, 1000, seed=1) * 3, random(50, 1000, seed=2) * 3
    exact = js_nats(a.double().softmax(-1), b.double().softmax(-1))
    narrow = js_nats(a.softmax(-1).bfloat16(), b.softmax(-1).bfloat16())
    # bfloat16 rounds every probability by up to 2⁻⁹
    np.testing.assert_allclose(narrow, exact, rtol=4e-3)


def test_relative_errors_are_those_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    b = a + 1e-3 * torch.randn(5, 16, generator=generator, dtype=torch.float64)
    a[3], b[3], a[4] = 0, 0, 0
    b[0] = a[0]
    found = relative_errors(a, b)
    assert found.shape == (5,)
    assert found[0] == found[3] == 0 and found[4] == math.inf
    for row in (1, 2):
        assert found[row] == pytest.approx(relative_error(a[row], b[row]), rel=1e-13)
    with pytest.raises(NonFiniteError, match="row 2 of b"):
        relative_errors(a, b.index_fill(0, torch.tensor([2]), math.nan))
