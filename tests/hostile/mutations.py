"""Damage to bytes and to JSON, drawn from a seed: the same seed gives the same damage anywhere."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

__all__ = ["mutate_bytes", "mutate_json"]

_NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
    -(2**63), 30_000_000, 100_000, 0.5, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
_TEXTS = (
    "", " ", "x", "\0", "\ud800", "\u2028", "\u202e", "\x1b[2J", "../../etc/passwd", "/dev/zero",
    "~", "é" * 300, "x" * 5000, "nan", "1e999", "[", "(", "(a+)+$", "model.safetensors", "None",
    "true", "-1",
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"x": {}},
    [0] * 50,
)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, move, overwrite or lengthen: one to four times."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTES)(rng, data)
    return data


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        found[_place(rng, len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _place(rng: random.Random, size: int) -> int:
    """Anywhere, and often near one of the ends, where formats keep what they say of themselves."""
    kind = rng.randrange(3)
    near = min(size, rng.choice((16, 64, 400)))
    return (
        rng.randrange(size)
        if kind == 0
        else rng.randrange(near)
        if kind == 1
        else size - 1 - rng.randrange(near)
    )


def _cut(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] if rng.random() < 0.7 else data[at:]


def _remove(rng: random.Random, data: bytes) -> bytes:
    at, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
    return data[:at] + data[at + n :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at, n = rng.randrange(len(data) + 1), rng.choice((1, 8, 64, 1000))
    return data[:at] + data[at : at + n] * rng.choice((2, 3, 50)) + data[at + n :]


def _move(rng: random.Random, data: bytes) -> bytes:
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[b:] + data[a:b] + data[:a]


def _number(rng: random.Random, data: bytes) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1))
    if len(data) < width:
        return data
    at = min(_place(rng, len(data)), len(data) - width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice(
        (b"\0", b"\xff" * 9, b"[" * 3000, b'{"a":' * 3000, b"\n", b"\xe2\x80\xa8", b"\xed\xa0\x80",
         b'"', b"\\", b"NaN", b"1e999", b"9" * 5000, rng.randbytes(20))
    )  # fmt: skip
    return data[:at] + piece + data[at:]


_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip, _flip, _flip, _cut, _remove, _repeat, _move, _number, _number, _insert,
)  # fmt: skip


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """Change values, types, names and places in a JSON document one to three times, or its text."""
    found = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = _mutate_value(rng, found)
    text = json.dumps(found).encode()
    return mutate_bytes(rng, text) if rng.random() < 0.1 else text


def _mutate_value(rng: random.Random, document: Any) -> Any:
    places = list(_places(document))
    if not places or rng.random() < 0.02:
        return _strange(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, name = rng.choice(places)
        if _is_there(other, name) and _is_there(holder, key):
            holder[key] = copy.deepcopy(other[name])
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice((*_TEXTS, key + "x", key.upper()))] = holder.pop(key)
    elif kind == 3:
        holder[key] = _retyped(holder[key])
    elif kind == 4:
        deep: Any = holder[key]
        for _ in range(rng.choice((1, 3, 90, 400))):
            deep = [deep] if rng.random() < 0.5 else {"x": deep}
        holder[key] = deep
    elif kind == 5 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((holder[key] + 1, -holder[key], holder[key] * 2, *_NUMBERS))
    else:
        holder[key] = _strange(rng)
    return document


def _is_there(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _strange(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice((_NUMBERS, _TEXTS, _OTHERS))))


def _retyped(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list):
        return {str(n): item for n, item in enumerate(value)}
    if isinstance(value, str):
        return [value]
    return str(value)


def _places(document: Any) -> Any:
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        if not isinstance(holder, dict | list):
            continue
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            waiting.append(holder[key])
