"""A logit lens as text for a terminal."""

from __future__ import annotations

from rich.console import Console

from trilens.analysis.lenses.logit_lens import LogitLens
from trilens.report.text.inspection import visible
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_logit_lens"]


def print_logit_lens(found: LogitLens, console: Console) -> None:
    """Draw one table per position: the most probable next tokens of each layer."""
    columns: list[Column | str] = [
        "layer",
        Column("would say next", left=True, fold=20),
        "entropy",
        "KL",
    ]
    if found.target is not None:
        columns += ["probability of target", "rank"]
    rows = found.table()
    for j, position in enumerate(found.positions):
        if j:
            console.print()
        print_line(console, f"after token {position}, {visible(found.tokens[j])}")
        cells = []
        for layer, row in zip(found.layers, rows[j :: len(found.positions)], strict=True):
            tops = (
                f"{visible(text)} {share:.2f}" for text, share in found.top_tokens(layer, position)
            )
            cell = [str(layer), "  ".join(tops), f"{row['entropy_nats']:.2f}"]
            cell.append("–" if row["kl_nats"] is None else f"{row['kl_nats']:.2f}")
            if found.target is not None:
                cell += [f"{row['target_probability']:.3f}", f"{row['target_rank']:,}"]
            cells.append(cell)
        print_table(console, columns, cells)
    words = ["entropy and KL(last layer ‖ layer) in nats"]
    if found.target is not None:
        words.insert(0, f"target: {visible(found.texts[found.target])} (rank 0 is the top token)")
    for text in words:
        print_line(console, f"note: {text}", style="dim")
