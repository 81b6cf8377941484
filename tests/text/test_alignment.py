from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilens.errors import OutOfRangeError
from trilens.text.alignment import Alignment, align


def aligned(here: str, there: str) -> Alignment:
    tokens, others = here.split(), there.split()
    return align(tokens, others, (tokens, others))


def test_one_word_replaced() -> None:
    found = aligned("the Eiffel Tower is in Paris", "the Louvre Museum is in Paris")
    assert found.is_equal_length
    assert found.pairs == tuple((i, i) for i in range(6))
    assert found.replaced == ((1, 1), (2, 2))
    assert [row["kind"] for row in found.table()].count("replaced") == 2


def test_a_longer_replacement_pairs_the_last_tokens() -> None:
    found = aligned("the Eiffel Tower is in Paris", "the old Blue Church is in Paris")
    assert not found.is_equal_length
    assert found.map(1) == 2
    assert found.map(2) == 3
    assert found.map(-1) == 6
    assert found.map(0) == 0
    rows = [row for row in found.table() if row["kind"] == "only there"]
    assert [row["other_token"] for row in rows] == ["old"]


def test_what_is_only_here_has_no_partner() -> None:
    found = aligned("a very long day", "a day")
    assert [found.map(i) for i in range(4)] == [0, None, None, 1]
    assert [row["kind"] for row in found.table()] == ["equal", "only here", "only here", "equal"]


def test_names_that_change_places_are_replaced_in_place() -> None:
    found = aligned(
        "When Mary and John met John gave Mary", "When John and Mary met Mary gave John"
    )
    assert found.pairs == tuple((i, i) for i in range(8))
    assert [pair[0] for pair in found.replaced] == [1, 3, 5, 7]


@pytest.mark.parametrize("position", [4, -5, 1.5, "last"])
def test_a_position_that_is_not_there(position: object) -> None:
    with pytest.raises(OutOfRangeError):
        aligned("a b c d", "a b").map(position)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_any_two_prompts(here: list[str], there: list[str]) -> None:
    found = align(here, there, (here, there))
    for before, after in zip(found.pairs, found.pairs[1:], strict=False):
        assert before[0] < after[0]
        assert before[1] < after[1]
    assert all(here[i] == there[j] for i, j in found.equal)
    assert set(found.equal) <= set(found.pairs)
    assert all(here[i] != there[j] for i, j in found.replaced)
    rows = found.table()
    assert [row["position"] for row in rows if row["position"] is not None] == [*range(len(here))]
    others = [row["other_position"] for row in rows if row["other_position"] is not None]
    assert others == [*range(len(there))]
    json.dumps(found.to_dict())
    if here == there:
        assert found.equal == tuple((i, i) for i in range(len(here)))
