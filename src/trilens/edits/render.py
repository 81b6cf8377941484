"""The text form of an edit: ``kind:site@layers#heads~streams%units[positions] option=value …``."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from torch import Tensor

from trilens.edits.positions import text_of
from trilens.edits.values import TensorFile, is_source

__all__ = ["MARKS", "edit_text"]

MARKS = {"@": "layers", "#": "heads", "~": "streams", "%": "units"}
"""What stands before each list of numbers."""

_HEAD = {"site", "positions", *MARKS.values()}
_TOKENS = {"queries", "keys", "source_positions"}


def edit_text(edit: Any, kind: str) -> str:
    """The text form. Tensors that came from no file, captures and functions are named in <>."""
    named = {each.name: (getattr(edit, each.name), each.default) for each in fields(edit)}
    head = f"{kind}:{edit.site}" if "site" in named else kind
    for mark, name in MARKS.items():
        numbers, _ = named.get(name, (None, None))
        if numbers is not None:
            head += mark + ",".join(map(str, numbers))
    positions, _ = named.get("positions", (None, None))
    # A patch without positions names its prompt's tokens.
    if positions is not None and (kind, positions) != ("patch", "prompt"):
        head += f"[{text_of(positions)}]"
    options = []
    for name, (value, default) in named.items():
        if name in _HEAD or value is None or (not isinstance(value, Tensor) and value == default):
            continue
        options.append(name if value is True else f"{name}={_word(value, name)}")
    return " ".join([head, *options])


def _word(value: Any, name: str) -> str:
    if name in _TOKENS:
        return text_of(value)
    if isinstance(value, TensorFile):
        return shlex.quote(str(value))
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Tensor) and value.ndim == 0:
        return repr(float(value))
    return f"<{_described(value)}>"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple):
        return f"{len(value)} captures"
    if is_source(value):
        return f"capture of {len(value.tokens)} tokens"
    return getattr(value, "__name__", type(value).__name__)
