"""Edits that another edit of the same run would overwrite, so that they would do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilens.edits.edit import Ablate, Edit, Patch, Replace, Scale
from trilens.errors import EditConflictError
from trilens.taps.edit_targets import Target

__all__ = ["check_conflicts"]

# What is made, token by token, of nothing but the site and weights.
_MADE_OF: dict[str, tuple[str, ...]] = {
    "attn.z": ("attn.head_out", "attn.out", "attn.add"),
    "attn.head_out": ("attn.out", "attn.add"),
    "attn.out": ("attn.add",),
    "mlp.in": ("mlp.post", "mlp.out", "mlp.add"),
    "mlp.gate": ("mlp.post", "mlp.out", "mlp.add"),
    "mlp.up": ("mlp.post", "mlp.out", "mlp.add"),
    "mlp.post": ("mlp.out", "mlp.add"),
    "mlp.out": ("mlp.add",),
    "cross.in": ("cross.out", "cross.add"),
    "cross.out": ("cross.add",),
    "mixer.out": ("mixer.add",),
}
# What reaches nothing but those sites, but those of later tokens as well.
_MIXED_INTO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("attn.q", "attn.k", "attn.q_rot", "attn.k_rot", "attn.v", "attn.scores", "attn.pattern"),
        ("attn.z", "attn.head_out", "attn.out", "attn.add"),
    ),
    "mixer.in": ("mixer.out", "mixer.add"),
}


@dataclass(frozen=True, slots=True)
class _Claim:
    """One target with the tokens that it names."""

    target: Target
    overwrites: bool
    tokens: NDArray[np.bool_]


def check_conflicts(edits: Sequence[Edit], targets: Sequence[Target]) -> None:
    """Refuse edits whose values a later one overwrites.

    Raises:
        EditConflictError: names both.
    """
    claims = [
        _Claim(target, _overwrites(edits[target.number]), target.tokens()) for target in targets
    ]
    last = [claim for claim in claims if claim.overwrites]
    for late in last:
        for early in claims:
            if early.target.number != late.target.number and _is_lost(early, late):
                _refuse(edits, early.target, late.target)


def _overwrites(edit: Edit) -> bool:
    return isinstance(edit, Replace | Patch | Ablate) or (
        isinstance(edit, Scale) and edit.factor == 0 and edit.keys is None
    )


def _is_lost(early: _Claim, late: _Claim) -> bool:
    """Whether what one edit writes is overwritten by another, in part at least."""
    first, second = early.target, late.target
    (name, layer), (after, where) = first.site.key, second.site.key
    tokens = bool((early.tokens & late.tokens).any())
    if (name, layer) == (after, where):
        return (
            first.number < second.number
            and tokens
            and _meet(first.heads, second.heads)
            and _meet(first.units, second.units)
        )
    if layer is None or where is None:
        return False
    if name == "resid_post" and (after, where) == ("resid_pre", layer + 1):
        same = _meet(first.heads, second.heads) and _meet(first.units, second.units)
        return tokens and same
    if layer != where or second.heads is not None or second.units is not None:
        return False
    if after in _MADE_OF.get(name, ()):
        return bool((early.tokens <= late.tokens).all())
    return after in _MIXED_INTO.get(name, ()) and bool(
        (late.tokens | ~early.tokens.any(1, keepdims=True)).all()
    )


def _meet(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> bool:
    return first is None or second is None or not set(first).isdisjoint(second)


def _refuse(edits: Sequence[Edit], early: Target, late: Target) -> None:
    first, second = early.number, late.number
    where = "" if late.site.layer is None else f" at layer {late.site.layer}"
    raise EditConflictError(
        f"edit {first} ({edits[first]}) would be overwritten by edit {second} ({edits[second]})"
        f"{where}: leave one out, or let them name different tokens, heads, streams or units"
    )
