"""Names of others in Markdown."""

from __future__ import annotations

import re

import pytest

from trilens.text.markdown import markdown_code, markdown_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("held-out.txt", "held-out.txt"),
        ("a_b*c*.txt", r"a\_b\*c\*.txt"),
        ("[x](javascript:alert(1))", r"\[x\](javascript:alert(1))"),
        ("![i](http://h/p)", r"!\[i\](http\://h/p)"),
        ("<img src=x onerror=y>", r"\<img src=x onerror=y\>"),
        ("a|b", r"a\|b"),
        ("`code`", r"\`code\`"),
        ("# heading", r"\# heading"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("www.host.example", r"www\.host.example"),
        ("me@host.example", r"me\@host.example"),
        ("a\n\n# heading", r"a\\n\\n# heading"),
        ("\x1b[31m", r"\\x1b\[31m"),
    ],
)
def test_words_stay_words(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.weight", "a b", "<b>", "*x*"])
def test_a_plain_name_is_code(name: str) -> None:
    assert markdown_code(name) == f"`{name}`"


@pytest.mark.parametrize("name", ["a`b", "a|b", "", " a", "``", "<`|", "a\nb", "\u202e`", "]`("])
def test_any_other_name_is_code_that_nothing_ends(name: str) -> None:
    shown = markdown_code(name)
    inner = re.fullmatch(r"<code>(.*)</code>", shown)
    assert inner is not None
    assert re.fullmatch(r"(\w|[ .-]|&#\d+;)*", inner[1])
