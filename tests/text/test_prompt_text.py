from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilens.errors import OutOfRangeError, TextNotFoundError, UsageError, ValueRangeError
from trilens.text.prompt_text import PromptText

PIECES = [None, b"The", b" Paris", b" of", b" \xf0\x9f", b"\x98\x80", b" Paris", b"ian"]
TOKENS = ["<s>", "The", " Paris", " of", " <0xF0><0x9F>", "<0x98><0x80>", " Paris", "ian"]
PROMPT = PromptText.from_pieces(PIECES)


def test_text_and_spans() -> None:
    assert PROMPT.text == "The Paris of 😀 Parisian"
    assert PROMPT.spans[:3] == ((0, 0), (0, 3), (3, 9))
    # Both halves of the emoji cover it.
    assert PROMPT.spans[4:6] == ((12, 14), (13, 14))


@pytest.mark.parametrize(
    ("text", "occurrence", "expected"),
    [
        ("Paris", None, (2, 6)),
        ("Paris", 0, (2,)),
        ("Paris", -1, (6,)),
        ("Parisian", None, (6, 7)),
        ("he Pa", None, (1, 2)),
        ("😀", None, (4, 5)),
        (" ", 1, (3,)),
    ],
)
def test_find(text: str, occurrence: int | None, expected: tuple[int, ...]) -> None:
    assert PROMPT.find(text, TOKENS, occurrence) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("paris", "nearest is ' Paris' at position 2"),
        ("Parisien", "nearest is ' Parisian' at positions 6–7"),
        ("<s>", "it is the special token at position 0"),
        ("€", "does not occur in this prompt of 8 tokens"),
    ],
)
def test_what_does_not_occur_names_the_nearest(text: str, words: str) -> None:
    with pytest.raises(TextNotFoundError, match=words):
        PROMPT.find(text, TOKENS)


def test_other_unicode_forms_are_named() -> None:
    prompt = PromptText.from_pieces(["café".encode()])
    with pytest.raises(TextNotFoundError, match="Unicode form NFC"):
        prompt.find(unicodedata.normalize("NFD", "café"), ["café"])


@pytest.mark.parametrize(
    ("text", "occurrence", "error"),
    [
        ("", None, ValueRangeError),
        (5, None, UsageError),
        ("Paris", 2, OutOfRangeError),
        ("Paris", True, OutOfRangeError),
        ("Paris", "last", OutOfRangeError),
    ],
)
def test_bad_input(text: object, occurrence: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        PROMPT.find(text, TOKENS, occurrence)  # type: ignore[arg-type]


def test_characters_between_tokens_are_covered_by_none() -> None:
    prompt = PromptText("a b", ((0, 1), (2, 3)))
    with pytest.raises(TextNotFoundError, match="between tokens"):
        prompt.find(" ", ["a", "b"])
    assert prompt.find("a b", ["a", "b"]) == (0, 1)


@given(st.lists(st.none() | st.binary(max_size=4), max_size=12))
def test_any_bytes(pieces: list[bytes | None]) -> None:
    """Spans are in order, every character is covered, and JSON gives the same back."""
    found = PromptText.from_pieces(pieces)
    assert len(found.spans) == len(pieces)
    for (start, stop), piece in zip(found.spans, pieces, strict=True):
        assert (stop > start) == bool(piece)
    filled = [span for span in found.spans if span[1] > span[0]]
    assert filled == sorted(filled)
    assert all(found.positions(i, i + 1) for i in range(len(found.text)))
    assert PromptText.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@given(st.text(max_size=20), st.integers(1, 3))
def test_pieces_of_any_text(text: str, size: int) -> None:
    """A text cut anywhere between its bytes is the same text, each character under its bytes."""
    raw = text.encode("utf-8", errors="replace")
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    found = PromptText.from_pieces(pieces)
    assert found.text == raw.decode()
    at = 0
    for i, char in enumerate(found.text):
        stop = at + len(char.encode())
        assert found.positions(i, i + 1) == tuple(range(at // size, (stop - 1) // size + 1))
        at = stop
