"""A logit lens as tables."""

from __future__ import annotations

from collections.abc import Callable

from trilens.analysis.lenses.logit_lens import LogitLens
from trilens.report.tables import Column, Table
from trilens.report.words import token_text, visible

__all__ = ["lens_notes", "lens_position", "lens_rows"]

_TWO = "{:.2f}".format
_KL = Column(
    "KL",
    words="KL from the last layer",
    key="kl_nats",
    unit="nats",
    better="smaller",
    spell=_TWO,
)


def lens_position(found: LogitLens, j: int, spell: Callable[[str], str] = visible) -> Table:
    """One row per layer after the j-th position: the most probable next tokens."""
    columns = [
        Column("layer"),
        Column("would say next", left=True, fold=20, key="next"),
        Column("entropy", unit="nats", key="entropy_nats", spell=_TWO),
        _KL,
    ]
    if found.target is not None:
        columns += [
            Column("probability of target", key="target_probability", spell="{:.3f}".format),
            Column("rank", key="target_rank", note="0 is the top token", spell="{:,}".format),
        ]
    rows = []
    table = found.table()[j :: len(found.positions)]
    for layer, row in zip(found.layers, table, strict=True):
        tops = found.top_tokens(layer, found.positions[j])
        words = "  ".join(f"{spell(text)} {share:.2f}" for text, share in tops)
        cell = [layer, words, row["entropy_nats"], row["kl_nats"]]
        if found.target is not None:
            cell += [row["target_probability"], row["target_rank"]]
        rows.append(tuple(cell))
    title = f"after token {found.positions[j]}, {spell(found.tokens[j])}"
    return Table(tuple(columns), tuple(rows), title=title)


def lens_notes(found: LogitLens) -> list[str]:
    """What the numbers are, and which token was followed."""
    words = ["entropy and KL(last layer ‖ layer) in nats"]
    if found.target is not None:
        words.insert(0, f"target: {visible(found.texts[found.target])} (rank 0 is the top token)")
    return words


def lens_rows(found: LogitLens) -> Table:
    """One row per layer and position."""
    target = found.target is not None
    columns = [
        Column("layer"),
        Column("position"),
        Column("token", left=True),
        Column("top token", left=True, key="top_token"),
        Column("probability", key="top_probability", spell="{:.3f}".format),
        Column("entropy", key="entropy_nats", unit="nats", spell=_TWO),
        _KL,
    ]
    if target:
        columns.append(
            Column("target's probability", key="target_probability", spell="{:.3f}".format)
        )
        columns.append(Column("target's rank", key="target_rank"))
    rows = []
    for row in found.table():
        cell = [
            row["layer"],
            row["position"],
            token_text(row["token"]),
            token_text(row["top_token"]),
        ]
        cell += [row["top_probability"], row["entropy_nats"], row["kl_nats"]]
        rows.append((*cell, *((row["target_probability"], row["target_rank"]) if target else ())))
    return Table(tuple(columns), tuple(rows), title="logit lens", keys=3)
