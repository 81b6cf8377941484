"""Sensitivity and plans as tables."""

from __future__ import annotations

from collections.abc import Sequence

from trilens.io.messages import in_blocks
from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity, SensitivityRow, Subject
from trilens.report.tables import Column, Table

__all__ = ["plan_sentence", "plan_table", "sensitivity_tables", "sensitivity_title"]

_TITLES: dict[Subject, str] = {
    "block": "blocks alone, the most sensitive first",
    "kind": "kinds of matrices in all blocks, the most sensitive first",
    "matrix": "matrices alone, the most sensitive first",
    "blocks": "blocks 0 … i together",
}
_BITS = Column(
    "bits/weight",
    words="bits per weight",
    better="smaller",
    note="everything that is stored for the weights",
    spell="{:.3f}".format,
)
_ERROR = Column(
    "output error",
    better="smaller",
    note="Σ‖Ŵx − y‖² / Σ‖y‖² of the matrices' outputs",
    spell="{:.4f}".format,
)


def sensitivity_title(found: Sensitivity) -> str:
    """The rule, the text and the loss before any change."""
    return (
        f"{found.rule} · {found.n_tokens} tokens{in_blocks(found.block_length)} · "
        f"loss {found.nll_nats:.4f} nats before any change"
    )


def sensitivity_tables(found: Sensitivity) -> dict[Subject, Table]:
    """A table for each kind of part that was measured, with what its predictions are worth."""
    tables = {}
    for subject, title in _TITLES.items():
        rows = found.of(subject) if subject == "blocks" else found.ranked(subject)
        if rows:
            correlation = found.rank_correlation(subject)
            words = "rank correlation of predicted and measured KL"
            notes = () if correlation is None else (f"{words}: {correlation:.2f}",)
            tables[subject] = _parts(rows, title, notes)
    return tables


def _parts(rows: Sequence[SensitivityRow], title: str, notes: tuple[str, ...]) -> Table:
    columns = [
        Column("part", left=True, fold=36),
        Column("matrices", note="how many are changed"),
        _BITS,
        _ERROR,
        Column(
            "Δ loss (nats)",
            words="change of the loss",
            key="nll_nats",
            unit="nats",
            better="smaller",
            note="measured change of the mean negative log-likelihood",
            spell="{:+.4f}".format,
        ),
        Column(
            "KL (nats)",
            words="KL divergence",
            key="kl_nats",
            unit="nats",
            better="smaller",
            note="measured KL(unchanged ‖ changed)",
            spell="{:.4f}".format,
        ),
    ]
    predicted = any(row.predicted_kl_nats is not None for row in rows)
    if predicted:
        columns.append(
            Column("predicted KL", key="predicted_kl_nats", unit="nats", spell="{:.4f}".format)
        )
    cells = []
    for row in rows:
        prefix = {"block": "block ", "blocks": "blocks 0–"}.get(row.subject, "")
        cell: tuple[object, ...] = (
            prefix + row.name,
            row.n_matrices,
            row.bits_per_weight,
            row.output_error,
        )
        cell += (row.nll_nats, row.kl_nats)
        cells.append((*cell, row.predicted_kl_nats) if predicted else cell)
    return Table(tuple(columns), tuple(cells), title=title, notes=notes)


def plan_table(planned: Planned) -> Table:
    """What each matrix becomes."""
    return Table(
        (
            Column("matrix", left=True, fold=32),
            Column("becomes", left=True),
            _BITS,
            _ERROR,
            Column(
                "KL alone (nats)",
                words="KL alone",
                key="cost_kl_nats",
                unit="nats",
                better="smaller",
                note="the KL that this matrix was reckoned at, alone",
                spell="{:.4f}".format,
            ),
        ),
        tuple(
            (
                choice.name,
                choice.choice,
                choice.bits_per_weight,
                choice.output_error,
                choice.cost_kl_nats,
            )
            for choice in planned.choices
        ),
        title="what each matrix becomes",
    )


def plan_sentence(planned: Planned) -> str:
    """What the whole plan takes, and what it was measured to do."""
    damage = planned.damage
    return (
        f"{planned.bits_per_weight:.3f} bits per weight over the matrices of the blocks; "
        f"measured on {damage.n_tokens} held-out tokens{in_blocks(damage.block_length)}: "
        f"perplexity × {damage.perplexity_ratio:.3f}, KL {damage.kl_nats:.4f} nats "
        f"({planned.options.costs} costs)."
    )
