"""Edits from text, as the command line takes them: the inverse of `str(edit)`.

steer:resid_post@6[generated] vector=directions.safetensors:happy scale=4
ablate:attn.z@5#1,3[-1]
ablate:mlp.post@4%17,90 method=mean reference=rows.npy
knockout@5#1 queries=-1 keys=2:5
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from trilens.edits.edit import Ablate, Edit, Knockout, Patch, Project, Replace, Scale, Steer
from trilens.edits.positions import PerPrompt
from trilens.edits.render import MARKS
from trilens.edits.values import TensorFile
from trilens.errors import EditError
from trilens.io.messages import clip

__all__ = ["parse_edit"]

_FORM = "KIND:SITE@LAYERS#HEADS~STREAMS%UNITS[POSITIONS] OPTION=VALUE …"
_HEAD = re.compile(r"([a-z]+)(?::([^@#~%\[\]]*))?((?:[@#~%][^@#~%\[\]]*)*)(?:\[([^\[\]]*)\])?")
_PART = re.compile(r"([@#~%])([^@#~%]*)")
_NUMBER = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_INT = re.compile(r"[-−]?[0-9]{1,18}")
_WORDS = ("last", "prompt", "generated")
_MAX_NUMBERS = 1_000_000


def parse_edit(text: str) -> Edit:
    """Read an edit in its text form.

    Args:
        text: ``KIND:SITE``, then ``@`` layers, ``#`` heads, ``~`` residual streams and ``%`` units
            (``5``, ``1,3``, ``0-4``), ``[positions]`` (``-1``, ``0,3``, ``2:8``, ``last``,
            ``prompt``, ``generated``, ``*``; ``[|0||2:4]`` gives one entry for each prompt), and
            options. A tensor is a file: ``file.npy`` or ``file.safetensors:name``.

    Raises:
        EditError: what cannot be read, and what may stand there.
    """
    try:
        return _parse(text)
    except EditError as error:
        raise type(error)(f"edit {clip(text)}: {error}") from None


def _parse(text: str) -> Edit:
    try:
        head, *words = shlex.split(text)
    except ValueError as error:
        what = "it is empty" if not text.strip() else str(error).lower()
        raise EditError(f"{what}; the form is {_FORM}") from None
    match = _HEAD.fullmatch(head)
    kind = re.split(r"[:@#~%\[]", head)[0]
    if kind not in _KINDS:
        near = get_close_matches(kind[:40], _KINDS, n=1)
        raise EditError(
            f"kind {clip(kind)} is unknown: "
            + (f"did you mean {near[0]}?" if near else f"the kinds are {', '.join(_KINDS)}")
        )
    if match is None:
        raise EditError(f"{clip(head)} cannot be read: the form is {_FORM}, without spaces in it")
    cls, readers, needed = _KINDS[kind]
    _, site, parts, positions = match.groups()
    given: dict[str, Any] = {}
    if (cls is Knockout) != (site is None):
        raise EditError(
            "a knockout has no site: write knockout@LAYERS"
            if cls is Knockout
            else f"the site is missing: write {kind}:SITE, for example {kind}:resid_post"
        )
    if site is not None:
        given["site"] = site
    for mark, numbers in _PART.findall(parts):
        name = MARKS[mark]
        if name in given:
            raise EditError(f"{name} ({mark}) stand twice")
        if cls is Knockout and name in ("units", "streams"):
            raise EditError(f"a knockout has no {name}: name heads with #")
        given[name] = _numbers(numbers, name)
    if positions is not None:
        if cls is Knockout:
            raise EditError("a knockout has no [positions]: write queries=… and keys=…")
        given["positions"] = _positions(positions)
    given |= _options(kind, words, readers, needed)
    edit: Edit = cls(**given)
    return edit


def _options(
    kind: str,
    words: list[str],
    readers: Mapping[str, Callable[[str, str], Any]],
    needed: str | None,
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if name not in readers:
            raise EditError(f"option {clip(name)} is unknown: {kind} takes {', '.join(readers)}")
        if name in given:
            raise EditError(f"option {name} stands twice")
        if (readers[name] is _flag) != (not sign):
            raise EditError(
                f"option {name} takes no value" if sign else f"option {name} needs a value: {name}="
            )
        given[name] = readers[name](value, name)
    if needed is not None and needed not in given:
        raise EditError(f"option {needed} is missing: write {needed}=…")
    return given


def _numbers(text: str, name: str) -> list[int]:
    """Layers, heads or units: ``5``, ``1,3``, ``0-4``."""
    found: list[int] = []
    for part in text.split(","):
        if match := _RANGE.fullmatch(part):
            first, last = int(match[1]), int(match[2])
            if not 0 <= last - first < _MAX_NUMBERS:
                raise EditError(f"{name} {clip(part)} are no range: write the smaller one first")
            found += range(first, last + 1)
        elif _NUMBER.fullmatch(part):
            found.append(int(part))
        else:
            raise EditError(f"{name} {clip(part)} cannot be read: write 5, 1,3 or 0-4")
    return found


def _positions(text: str, name: str = "positions") -> Any:
    """``-1``, ``0,3``, ``2:8``, a word, ``*``; ``|a|b`` for each prompt."""
    if text.startswith("|"):
        return PerPrompt([_positions(each, name) if each else [] for each in text[1:].split("|")])
    if text == "*":
        return None
    if text in _WORDS:
        return text
    if ":" in text:
        ends = text.split(":")
        if len(ends) <= 3 and all(not end or _INT.fullmatch(end) for end in ends):
            return slice(*(_int(end) if end else None for end in ends))
    elif all(_INT.fullmatch(each) for each in text.split(",")):
        return [_int(each) for each in text.split(",")]
    raise EditError(
        f"{name} {clip(text)} cannot be read: write -1, 0,3, 2:8, last, prompt, generated, * for "
        "all, or |0|2:8 for each prompt"
    )


def _int(text: str) -> int:
    return int(text.replace("−", "-"))


def _file(value: str, name: str) -> TensorFile:
    if not value:
        raise EditError(f"option {name} is empty: give file.npy or file.safetensors:name")
    return TensorFile.parse(value)


def _number(value: str, name: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise EditError(f"option {name} is {clip(value)}: give a number") from None


def _whole(value: str, name: str) -> int:
    if not _NUMBER.fullmatch(value):
        raise EditError(f"option {name} is {clip(value)}: give a whole number of 0 or more")
    return int(value)


def _number_or_file(value: str, name: str) -> float | TensorFile:
    return (
        _file(value, name)
        if value.endswith((".npy", ".safetensors")) or ":" in value
        else (_number(value, name))
    )


def _text(value: str, name: str) -> str:
    return value


def _flag(value: str, name: str) -> bool:
    return True


_Readers = Mapping[str, Callable[[str, str], Any]]
_KINDS: dict[str, tuple[type[Any], _Readers, str | None]] = {
    "steer": (Steer, {"vector": _file, "scale": _number, "renormalise": _flag}, "vector"),
    "ablate": (Ablate, {"method": _text, "reference": _file, "seed": _whole}, None),
    "knockout": (Knockout, {"queries": _positions, "keys": _positions}, None),
    "patch": (Patch, {"source": _file, "source_positions": _positions}, "source"),
    "scale": (Scale, {"factor": _number, "keys": _positions, "renormalise": _flag}, "factor"),
    "project": (Project, {"directions": _file, "onto": _flag}, "directions"),
    "replace": (Replace, {"value": _number_or_file}, "value"),
}
"""By kind: its class, the options it takes, and the one that it needs."""
