"""Positions mean what NumPy's indexing means, over the tokens of a prompt and those generated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilens.edits import PerPrompt
from trilens.edits.positions import (
    check_positions_within,
    positions_of,
    read_positions,
    selected,
    text_of,
)
from trilens.errors import EditError, EditRangeError

LENGTHS = st.integers(1, 12)


def named(positions: Any, prompt: int, total: int | None = None) -> list[int]:
    total = prompt if total is None else total
    return np.flatnonzero(selected(read_positions(positions), prompt, 0, total)).tolist()


@given(st.data(), LENGTHS)
def test_indices_and_masks_are_numpys(data: st.DataObject, prompt: int) -> None:
    tokens = np.arange(prompt)
    index = data.draw(st.integers(-prompt, prompt - 1))
    assert named(index, prompt) == [tokens[index]]
    several = data.draw(st.sets(st.integers(0, prompt - 1), min_size=1))
    signed = [i - prompt if data.draw(st.booleans()) else i for i in several]
    for given_as in (signed, tuple(signed), np.array(signed), torch.tensor(signed)):
        assert named(given_as, prompt) == sorted(tokens[signed].tolist())
        places = read_positions(given_as)
        assert positions_of(places, prompt, prompt) == tokens[signed].tolist()  # as given
    mask = [i in several for i in range(prompt)]
    for given_as in (mask, np.array(mask), torch.tensor(mask)):
        assert named(given_as, prompt) == tokens[mask].tolist()


@given(
    LENGTHS,
    st.none() | st.integers(-15, 15),
    st.none() | st.integers(-15, 15),
    st.none() | st.integers(1, 5),
    st.integers(0, 6),
)
def test_slices_are_numpys_and_go_on_over_generated_tokens(
    prompt: int, start: int | None, stop: int | None, step: int | None, new: int
) -> None:
    places = slice(start, stop, step)
    assert named(places, prompt) == np.arange(prompt)[places].tolist()
    # Negative ends count from the prompt's end, whatever was generated.
    from_end = [each + prompt if each is not None and each < 0 else each for each in (start, stop)]
    ends = [None if each is None else max(each, 0) for each in from_end]
    wanted = np.arange(prompt + new)[slice(*ends, step)].tolist()
    assert named(places, prompt, prompt + new) == wanted


@given(LENGTHS, st.integers(0, 6), st.data())
def test_a_pass_sees_its_part_of_the_text(prompt: int, new: int, data: st.DataObject) -> None:
    total = prompt + new
    places = data.draw(
        st.none()
        | st.sampled_from(["last", "prompt", "generated"])
        | st.builds(slice, st.integers(-5, 12), st.integers(-5, 20), st.integers(1, 3))
        | st.lists(st.integers(0, total - 1), min_size=1, unique=True)
    )
    cut = data.draw(st.integers(0, total))
    read = read_positions(places)
    whole = selected(read, prompt, 0, total)
    parts = [selected(read, prompt, 0, cut), selected(read, prompt, cut, total)]
    assert (np.concatenate(parts) == whole).all()


def test_words() -> None:
    assert named("last", 4, 6) == [3]
    assert named("prompt", 4, 6) == [0, 1, 2, 3]
    assert named("generated", 4, 6) == [4, 5]
    assert named(None, 4, 6) == [0, 1, 2, 3, 4, 5]
    assert named([True, False, True, False], 4, 6) == [0, 2]


@pytest.mark.parametrize(
    ("positions", "problem"),
    [
        ("first", "'first' cannot be read"),
        (True, "True cannot be read"),
        ([], "empty"),
        ([False, False], "False everywhere"),
        ([1, 1], "not distinct"),
        ([1.5], "1.5 is not a whole number"),
        ([1, True], "True is not a whole number"),
        (object(), "is not a whole number"),
        (slice(None, None, -1), "step -1"),
        (slice("a", None), "'a' is not a whole number"),
        ({"a": 1}, "cannot be read"),
    ],
)
def test_what_is_no_positions(positions: Any, problem: str) -> None:
    with pytest.raises(EditError, match=problem):
        read_positions(positions)


@pytest.mark.parametrize(
    ("positions", "new", "problem"),
    [
        (4, 0, r"position 4 is out of range: the prompt has positions 0–3 \(or −4 to −1\)"),
        (-5, 3, "position -5 is out of range"),
        (7, 3, "position 7 is out of range: .*, generated tokens 4–6"),
        ([3, -1], 0, "name a token twice"),
        ([True] * 3, 0, "a mask of 3 tokens: the prompt has 4"),
        ("generated", 0, "no token is generated here"),
        (slice(4, None), 0, "4: name no token"),
        (slice(3, 2), 9, "3:2 name no token"),
    ],
)
def test_positions_outside_the_text(positions: Any, new: int, problem: str) -> None:
    with pytest.raises(EditRangeError, match=problem):
        check_positions_within(read_positions(positions), 4, new, "the prompt")


def test_positions_inside_the_text() -> None:
    for positions in (3, -4, "last", slice(None, 9), [True] * 4, None):
        check_positions_within(read_positions(positions), 4, 0, "the prompt")
    for positions in (4, 6, "generated", slice(4, None)):
        check_positions_within(read_positions(positions), 4, 3, "the prompt")


def test_per_prompt() -> None:
    each = PerPrompt([3, [], None, "last", slice(0, 2), [True, False]])
    assert text_of(each) == "|3||*|last|0:2|0"
    assert read_positions(each) is each
    with pytest.raises(EditError, match="no position of any prompt"):
        PerPrompt([[], []])
    with pytest.raises(EditError, match="is no list"):
        PerPrompt(3)  # type: ignore[arg-type]
    with pytest.raises(EditError, match="cannot be read"):
        PerPrompt([each])
