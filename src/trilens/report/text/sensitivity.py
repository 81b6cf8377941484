"""Sensitivity and plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from trilens.io.messages import in_blocks
from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity, SensitivityRow, Subject
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_plan", "print_sensitivity"]

_TITLES: dict[Subject, str] = {
    "block": "blocks alone, the most sensitive first",
    "kind": "kinds of matrices in all blocks, the most sensitive first",
    "matrix": "matrices alone, the most sensitive first",
    "blocks": "blocks 0 … i together",
}


def print_sensitivity(found: Sensitivity, console: Console) -> None:
    """Draw a table for each kind of part that was measured."""
    print_line(
        console,
        f"{found.rule} · {found.n_tokens} tokens{in_blocks(found.block_length)} · "
        f"loss {found.nll_nats:.4f} nats before any change",
    )
    for subject, title in _TITLES.items():
        rows = found.of(subject) if subject == "blocks" else found.ranked(subject)
        if not rows:
            continue
        console.print()
        print_line(console, head=title)
        _print_rows(rows, console)
        correlation = found.rank_correlation(subject)
        if correlation is not None:
            print_line(console, f"rank correlation of predicted and measured KL: {correlation:.2f}")
    console.print()
    print_line(console, f"weights restored, SHA-256 {found.checksum[:16]}…", style="dim")


def _print_rows(rows: Sequence[SensitivityRow], console: Console) -> None:
    columns: list[Column | str] = [
        Column("part", left=True, fold=36),
        "matrices", "bits/weight", "output error", "Δ loss (nats)", "KL (nats)",
    ]  # fmt: skip
    predicted = any(row.predicted_kl_nats is not None for row in rows)
    if predicted:
        columns.append("predicted KL")
    cells = []
    for row in rows:
        prefix = {"block": "block ", "blocks": "blocks 0–"}.get(row.subject, "")
        cells.append(
            [
                prefix + row.name,
                str(row.n_matrices),
                f"{row.bits_per_weight:.3f}",
                f"{row.output_error:.4f}",
                f"{row.nll_nats:+.4f}",
                f"{row.kl_nats:.4f}",
            ]
        )
        if predicted:
            kl = row.predicted_kl_nats
            cells[-1].append("–" if kl is None else f"{kl:.4f}")
    print_table(console, columns, cells)


def print_plan(planned: Planned, console: Console) -> None:
    """Draw what each matrix becomes, and what the whole was measured to do."""
    columns: list[Column | str] = [
        Column("matrix", left=True, fold=32), Column("becomes", left=True),
        "bits/weight", "output error", "KL alone (nats)",
    ]  # fmt: skip
    cells = [
        (
            choice.name,
            choice.choice,
            f"{choice.bits_per_weight:.3f}",
            f"{choice.output_error:.4f}",
            f"{choice.cost_kl_nats:.4f}",
        )
        for choice in planned.choices
    ]
    print_table(console, columns, cells)
    damage = planned.damage
    console.print()
    print_line(
        console,
        f"{planned.bits_per_weight:.3f} bits per weight over the matrices of the blocks; "
        f"measured on {damage.n_tokens} held-out tokens{in_blocks(damage.block_length)}: "
        "perplexity × "
        f"{damage.perplexity_ratio:.3f}, KL {damage.kl_nats:.4f} nats "
        f"({planned.options.costs} costs).",
    )
