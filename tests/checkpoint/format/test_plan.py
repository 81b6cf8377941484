"""`TernaryPlan`: checked options, JSON, and expressions that must match."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilens.checkpoint.format.plan import TernaryPlan
from trilens.errors import TrilensError, UsageError, ValueRangeError

RULES = ["absmean", "absmean_refit", "twn", "exact", "asymmetric", "planes"]


@given(
    st.sampled_from(RULES),
    st.one_of(st.none(), st.integers(1, 4096)),
    st.lists(st.sampled_from(["a", r"\.q_proj", "^x$"]), max_size=3),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_json_round_trip(rule, group_size, expressions, scale_dtype) -> None:
    plan = TernaryPlan(
        rule, group_size, keep=expressions, only=expressions, scale_dtype=scale_dtype
    )
    assert TernaryPlan.from_json(plan.to_json()) == plan
    assert plan.per == ("group" if group_size else "tensor")
    assert isinstance(plan.keep, tuple)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TernaryPlan().rule = "exact"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rule": "magic"}, UsageError, "magic"),
        ({"group_size": 0}, ValueRangeError, "group size 0"),
        ({"group_size": 64, "per": "row"}, UsageError, "group size 64"),
        ({"per": "column"}, UsageError, "column"),
        ({"scale_dtype": "float8"}, UsageError, "float8"),
        ({"keep": "a"}, UsageError, "keep is 'a'"),
        ({"only": ["("]}, UsageError, "not a regular expression"),
        ({"keep": [""]}, UsageError, "not empty"),
        ({"keep": [3]}, UsageError, "3"),
    ],
)
def test_bad_options(options, error, words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        TernaryPlan(**options)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"rule": "absmean", "rul": 1}', '{"rule": 7}', "[" * 100_000]
)
def test_bad_json(text: str) -> None:
    with pytest.raises(TrilensError):
        TernaryPlan.from_json(text)


NAMES = ["h.0.a.weight", "h.0.b.weight", "h.1.a.weight"]
ALL = [*NAMES, "head.weight"]


def test_chosen() -> None:
    assert TernaryPlan().chosen(NAMES, ALL) == {}
    assert set(TernaryPlan(keep=[r"h\.0"]).chosen(NAMES, ALL)) == set(NAMES[:2])
    assert set(TernaryPlan(only=[r"\.a\."]).chosen(NAMES, ALL)) == {NAMES[1]}
    kept = TernaryPlan(only=[r"\.a\."], keep=["1"]).chosen(NAMES, ALL)
    assert kept == {NAMES[1]: "the plan's only does not name it", NAMES[2]: "the plan keeps '1'"}
    # What is kept anyway may be named: it is there.
    assert TernaryPlan(keep=["head"]).chosen(NAMES, ALL) == {}


def test_an_expression_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"keep expression 'lm_head' matches no tensor.*h\.0\.a"):
        TernaryPlan(keep=["lm_head"]).chosen(NAMES, ALL)
    with pytest.raises(UsageError, match="only expression 'head' matches no linear layer"):
        TernaryPlan(only=["head"]).chosen(NAMES, ALL)
