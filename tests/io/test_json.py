"""One reader and one writer of JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trilens.errors import ConfigError, CorruptFileError, UsageError
from trilens.io.json import json_bytes, json_text, parse_json, parse_object, read_json


def test_what_is_not_finite_becomes_null() -> None:
    value = {"a": [1.5, float("nan"), (float("inf"), {"b": -float("inf")})], "c": "NaN", "d": True}
    wanted = {"a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": True}
    assert json.loads(json_text(value)) == wanted
    assert json_text("Größe", indent=None) == '"Größe"'


def test_bytes_of_a_file() -> None:
    assert json_bytes({"ä": [1, 2.5], "b": {}}) == (
        '{\n "ä": [\n  1,\n  2.5\n ],\n "b": {}\n}\n'.encode()
    )


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_not_finite_is_refused(tmp_path: Path, word: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(f'{{"a": [{word}]}}')
    with pytest.raises(CorruptFileError, match=r"x\.json holds the number"):
        read_json(path, CorruptFileError)
    # Configurations of state-space models hold an infinite limit.
    assert not math.isfinite(read_json(path, ConfigError, non_finite=True)["a"][0])


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_json("[" * 100 + "]" * 100, "x")
    for text in ("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101, "[" * 100_000):
        with pytest.raises(UsageError, match="nested too deep"):
            parse_json(text, "x", UsageError)
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    monkeypatch.setattr("trilens.io.json.SIZE_LIMIT_BYTES", 7)
    with pytest.raises(CorruptFileError, match="at most 7 bytes"):
        read_json(path, CorruptFileError)


def test_objects_and_keys() -> None:
    with pytest.raises(CorruptFileError, match="the plan is no JSON object but a list"):
        parse_object("[]", "the plan")
    assert parse_object('{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(CorruptFileError, match="x is malformed: 'a' is there twice"):
        parse_object('{"b": {"a": 1, "a": 2}}', "x", unique_keys=True)
    with pytest.raises(CorruptFileError, match="line 1, column 2"):
        parse_json("{", "x")
    with pytest.raises(CorruptFileError, match="not UTF-8, bad byte at position 1"):
        parse_json(b'"\xff"', "x")
