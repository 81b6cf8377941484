"""Text as it may leave the program."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilens.errors import CaptureError, TrilensError, UsageError
from trilens.io.messages import listed
from trilens.printable import MESSAGE_LIMIT, as_unicode, bounded, escaped, escaped_json, one_line

CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
MARKS = [
    *(chr(code) for code in range(0x202A, 0x202F)),
    *(chr(code) for code in range(0x2066, 0x206A)),
    "\u200e", "\u200f", "\u061c", "\u2028", "\u2029",
]  # fmt: skip
SURROGATES = ["\ud800", "\udbff", "\udc80", "\udfff"]
texts = st.text(st.characters(), max_size=60) | st.text(
    st.sampled_from([*CONTROLS, *MARKS, *SURROGATES, "a", "é", "漢", "\\", "😀"]), max_size=60
)


@pytest.mark.parametrize(
    "char", [*CONTROLS, *MARKS, *SURROGATES], ids=lambda char: f"{ord(char):x}"
)
def test_what_a_terminal_obeys_is_spelled_out(char: str) -> None:
    shown = escaped(f"a{char}b")
    assert shown.isascii() and shown.isprintable()
    assert shown == "a" + repr(char)[1:-1] + "b"


def test_words_of_any_script_stay_as_they_are() -> None:
    words = "naïve 漢字 עברית हिन्दी 👩‍🔬 → − ‖x‖ \\x1b"
    assert escaped(words) == one_line(words) == as_unicode(words) == words


@given(texts)
def test_one_line_holds_no_control_and_can_be_encoded(text: str) -> None:
    shown = one_line(text)
    shown.encode()
    assert not any(unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} for char in shown)
    assert not set(shown) & {*CONTROLS, *MARKS, *SURROGATES}
    assert escaped(shown) == shown


@given(st.recursive(texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)))
def test_json_reads_as_the_same_values(value: object) -> None:
    text = escaped_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == json.loads(json.dumps(value))
    assert not set(text) - {"\n"} & {*CONTROLS, *MARKS, *SURROGATES}


@given(texts, st.integers(10, 400), st.integers(1, 40))
def test_text_is_bounded_and_keeps_its_ends(text: str, limit: int, times: int) -> None:
    long = f"begin {text * times} end"
    cut = bounded(long, limit)
    assert len(cut) <= limit
    assert cut == long or ("…" in cut and cut[:5] == "begin" and cut[-3:] == "end")


def test_a_long_value_is_cut_before_the_advice_is() -> None:
    message = f"tensor {'x' * 5000!r} is not there: {'name one of the file. ' * 8}"
    assert bounded(message).startswith("tensor 'xxx")
    assert bounded(message).endswith("name one of the file. " * 8)


@pytest.mark.parametrize("error", [TrilensError, UsageError, CaptureError])
def test_a_message_is_one_bounded_line_and_args_are_as_raised(error: type[TrilensError]) -> None:
    raw = "tensor '\x1b]0;owned\x07\u202e\n' " + "x" * 10_000_000 + " is bad; rename it"
    raised = error(raw)
    shown = str(raised)
    assert len(shown) <= MESSAGE_LIMIT and shown == one_line(shown)
    assert shown.startswith(r"tensor '\x1b]0;owned\x07\u202e\n' x")
    assert shown.endswith("is bad; rename it")
    assert raised.args == (raw,)


def test_a_list_names_the_first_and_counts_the_rest() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(10)) == "0, 1, 2, 3 and 6 more"
    assert listed((name for name in "abc"), 1) == "a and 2 more"
    assert listed([]) == "none" and listed([], nothing="no gates") == "no gates"
    assert len(listed(["x" * 1000] * 10)) < 520
    assert listed(["\x1b[2J"]) == r"\x1b[2J"
