"""Sensitivity and plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity, SensitivityRow, Subject

__all__ = ["print_plan", "print_sensitivity"]

_TITLES: dict[Subject, str] = {
    "block": "blocks alone, the most damaging first",
    "kind": "kinds of matrices in all blocks, the most damaging first",
    "matrix": "matrices alone, the most damaging first",
    "blocks": "blocks 0 … i together",
}


def print_sensitivity(found: Sensitivity, console: Console) -> None:
    """Draw a table for each kind of part that was measured."""
    console.print(
        Text(
            f"{found.rule} · {found.n_tokens} tokens · loss {found.nll_nats:.4f} nats "
            "before any change"
        )
    )
    for subject, title in _TITLES.items():
        rows = found.of(subject) if subject == "blocks" else found.ranked(subject)
        if not rows:
            continue
        console.print(Text(f"\n{title}", style="bold"))
        console.print(_table(rows))
        correlation = found.rank_correlation(subject)
        if correlation is not None:
            console.print(Text(f"rank correlation of predicted and measured KL: {correlation:.2f}"))
    console.print(Text(f"\nweights restored, SHA-256 {found.checksum[:16]}…", style="dim"))


def _table(rows: Sequence[SensitivityRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("part", overflow="fold")
    for name in ("matrices", "bits/weight", "output error", "Δ loss (nats)", "KL (nats)"):
        table.add_column(name, justify="right", no_wrap=True)
    guessed = any(row.predicted_kl_nats is not None for row in rows)
    if guessed:
        table.add_column("predicted KL", justify="right", no_wrap=True)
    for row in rows:
        prefix = {"block": "block ", "blocks": "blocks 0–"}.get(row.subject, "")
        cells = [
            prefix + row.name,
            str(row.n_matrices),
            f"{row.bits_per_weight:.3f}",
            f"{row.output_error:.4f}",
            f"{row.nll_nats:+.4f}",
            f"{row.kl_nats:.4f}",
        ]
        if guessed:
            guess = row.predicted_kl_nats
            cells.append("–" if guess is None else f"{guess:.4f}")
        table.add_row(*(Text(cell) for cell in cells))
    return table


def print_plan(planned: Planned, console: Console) -> None:
    """Draw what each matrix becomes, and what the whole was measured to do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("matrix", overflow="fold")
    table.add_column("becomes", no_wrap=True)
    for name in ("bits/weight", "output error", "KL alone (nats)"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in planned.choices:
        cells = (
            choice.name,
            choice.choice,
            f"{choice.bits_per_weight:.3f}",
            f"{choice.output_error:.4f}",
            f"{choice.cost_kl_nats:.4f}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    damage = planned.damage
    console.print(
        Text(
            f"\n{planned.bits_per_weight:.3f} bits per weight over the matrices of the blocks; "
            f"measured on {damage.n_tokens} held-out tokens: perplexity × "
            f"{damage.perplexity_ratio:.3f}, KL {damage.kl_nats:.4f} nats "
            f"({planned.options.costs} costs)."
        )
    )
