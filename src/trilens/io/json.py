"""The one way in which trilens reads and writes JSON.

NaN and the infinities, for which JSON has no word, are written as null and refused when read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from trilens.errors import CorruptFileError, LoadError
from trilens.io.guarded import read_bytes
from trilens.io.messages import clip

__all__ = ["SIZE_LIMIT_BYTES", "json_bytes", "json_text", "parse_json", "parse_object", "read_json"]

SIZE_LIMIT_BYTES = 100_000_000
_DEPTH_LIMIT = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """JSON that every reader takes; what is not finite becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file: indented by 1, a line end at the end."""
    return (json_text(value, indent=1) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(
    path: Path,
    error: type[LoadError],
    *,
    unique_keys: bool = False,
    non_finite: bool = False,
) -> dict[str, Any]:
    """Read a JSON object from a regular file.

    Args:
        path: the file.
        error: the class to raise: `ConfigError` for settings, `CorruptFileError` for files about
            weights.
        unique_keys: refuse a key that is there twice, of which JSON readers take either.
        non_finite: take NaN and Infinity: other programs write them in configurations.

    Raises:
        LoadError: of the class `error`, when the file cannot be read, is not UTF-8 JSON or is not
            an object.
    """
    data = read_bytes(path, error, max_bytes=SIZE_LIMIT_BYTES)
    return parse_object(data, str(path), error, unique_keys=unique_keys, non_finite=non_finite)


def parse_object(
    data: str | bytes, what: str, error: type[Exception] = CorruptFileError, **options: bool
) -> dict[str, Any]:
    """As `parse_json`, for text that must be an object."""
    found = parse_json(data, what, error, **options)
    if not isinstance(found, dict):
        raise error(f"{what} is no JSON object but a {type(found).__name__}: an object is needed")
    return found


def parse_json(
    data: str | bytes,
    what: str,
    error: type[Exception] = CorruptFileError,
    *,
    unique_keys: bool = False,
    non_finite: bool = False,
) -> Any:
    """Read JSON from text, or from UTF-8 bytes.

    Args:
        data: the text.
        what: what errors call it: "PATH", "the plan".
        error: the class to raise.
        unique_keys: as in `read_json`.
        non_finite: as in `read_json`.

    Raises:
        Exception: of the class `error`: no UTF-8, no JSON, nested too deep, a number that no
            float64 holds, or half a surrogate pair, which no UTF-8 file holds.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise error(f"{what} is malformed: {clip(counts.most_common(1)[0][0])} is there twice")
        return found

    def refuse(word: str) -> NoReturn:
        raise error(f"{what} holds the number {clip(word)}: finite ones are needed")

    def number(word: str) -> float:
        value = float(word)
        return value if math.isfinite(value) or non_finite else refuse(word)

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        found = json.loads(
            text,
            object_pairs_hook=once if unique_keys else None,
            parse_float=None if non_finite else number,
            parse_constant=None if non_finite else refuse,
        )
        _check_depth(found)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as cause:
        raise error(
            f"{what} is not valid JSON: not UTF-8, bad byte at position {cause.start}"
        ) from cause
    except UnicodeEncodeError as cause:
        raise error(
            f"{what} holds half a surrogate pair, {clip(cause.object[cause.start])}: no UTF-8 text "
            "can hold it"
        ) from cause
    except json.JSONDecodeError as cause:
        raise error(
            f"{what} is not valid JSON: {cause.msg} at line {cause.lineno}, column {cause.colno}; "
            "fetch or write it again"
        ) from cause
    except (RecursionError, ValueError) as cause:
        raise error(
            f"{what} is not valid JSON for this reader: nested too deep or a number too long"
        ) from cause
    return found


def _check_depth(value: Any) -> None:
    """What is nested deeper would break code that walks it."""
    level = [value]
    for _ in range(_DEPTH_LIMIT):
        inner = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not inner:
            return
        level = inner
    raise RecursionError
