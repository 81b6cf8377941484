"""States and their URLs: what is read back is what was written; what is none is refused by name."""

from __future__ import annotations

from urllib.parse import parse_qsl

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilens.edits import Ablate
from trilens.errors import EditError, OutOfRangeError, TooLargeError, UsageError
from trilens.explorer.state import MAX_EDITS, MAX_NEW_TOKENS, MAX_QUERY_BYTES, State

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.none() | st.integers(0, 10**9 - 1)


@given(
    st.builds(
        State,
        prompt=texts,
        edits=st.lists(texts, max_size=4).map(tuple),
        new=st.integers(0, MAX_NEW_TOKENS),
        layer=numbers,
        head=numbers,
        token=numbers,
    )
)
def test_a_url_is_the_whole_state(state: State) -> None:
    assert State.from_query(parse_qsl(state.query, keep_blank_values=True)) == state
    assert State.from_json({**state.to_dict(), "edits": list(state.edits)}) == state
    assert state.run == State(prompt=state.prompt, edits=state.edits, new=state.new)


@pytest.mark.parametrize(
    ("query", "error", "words"),
    [
        ([("prompt", "a"), ("prompt", "b")], UsageError, "twice"),
        ([("promt", "a")], UsageError, "parameter 'promt' is unknown"),
        ([("layer", "-1")], OutOfRangeError, "layer '-1'"),
        ([("token", "1e3")], OutOfRangeError, "token '1e3'"),
        ([("new", str(MAX_NEW_TOKENS + 1))], OutOfRangeError, f"0–{MAX_NEW_TOKENS}"),
        ([("edit", "x")] * (MAX_EDITS + 1), TooLargeError, f"at most {MAX_EDITS}"),
        ([("prompt", "x" * MAX_QUERY_BYTES)], TooLargeError, f"{MAX_QUERY_BYTES:,}"),
    ],
)
def test_what_is_no_state_is_refused(query, error, words: str) -> None:
    with pytest.raises(error, match=words):
        State.from_query(query)


@pytest.mark.parametrize("body", [None, 3, [], "x", {"edits": "x"}, {"prompt": 1.5}, {"new": True}])
def test_json_that_is_no_state_is_refused(body) -> None:
    with pytest.raises(UsageError):
        State.from_json(body)


def test_edits_are_data_and_read_no_file(tmp_path) -> None:
    (edit,) = State(prompt="x", edits=("ablate:attn.z@2#5",)).read_edits()
    assert isinstance(edit, Ablate) and edit.layers == (2,) and edit.heads == (5,)
    file = tmp_path / "v.npy"
    np.save(file, np.zeros(3))
    for text in (
        f"steer:resid_post@1 vector={file}",
        f"ablate:mlp.post@1 method=mean reference={file}",
        f"patch:resid_post@1 source={file}",
        f"project:resid_post@1 directions={file}",
        f"replace:resid_post@1 value={file}",
    ):
        with pytest.raises(EditError, match="reads a file"):
            State(prompt="x", edits=(text,)).read_edits()
