"""What edits do to predictions, as charts."""

from __future__ import annotations

from trilens.analysis.edit_effects import EditEffect
from trilens.report.page import Chart, Section
from trilens.report.tables import Column, Table
from trilens.report.words import four_digits, signed, token_text

__all__ = ["edit_sections"]


def edit_sections(found: EditEffect) -> list[Section]:
    """The next tokens that move most, and the divergence after each token."""
    rows = tuple(
        (token_text(each.token), each.before, each.after, each.after - each.before)
        for each in found.moved
    )
    note = f"probability of the next token after position {found.position}"
    moved = Table(
        (
            Column("token", left=True),
            Column("without edits", note=note, spell=four_digits),
            Column("with edits", note=note, spell=four_digits),
            Column("change", spell=signed),
        ),
        rows,
        title="next tokens whose probability changes most",
    )
    by_position = Table(
        (
            Column("position"),
            Column("token", left=True),
            Column(
                "KL",
                words="KL divergence",
                key="kl_nats",
                unit="nats",
                note="KL(without ‖ with) of the next token after this one",
                spell=four_digits,
            ),
        ),
        tuple((row["position"], token_text(row["token"]), row["kl_nats"]) for row in found.table()),
        title="KL divergence after each token",
        keys=2,
    )
    words = [f"Edits: {', '.join(found.edits)}."]
    if found.before is not None and found.after is not None:
        words.append(
            f"Logit difference {found.before:.4f} without edits, {found.after:.4f} with them."
        )
    blocks = (
        Chart(kind="bars", table=moved, x="token", y=("change",)),
        Chart(kind="lines", table=by_position, x="position", y=("kl_nats",)),
    )
    return [Section("What the edits change", blocks, tuple(words), name="edits")]
