"""What `evaluate` found, as text for a terminal."""

from __future__ import annotations

from rich.console import Console

from trilens.analysis.model_evaluation import ModelEvaluation
from trilens.io.messages import in_blocks
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_evaluation"]


def print_evaluation(found: ModelEvaluation, console: Console) -> None:
    """Draw a row for each text, and one for each metric of each task."""
    if found.texts:
        longest = max(text.block_length for text in found.texts)
        beside = "" if found.against is None else f" beside {found.against}"
        print_line(console, f"{found.model}{beside}{in_blocks(longest)} tokens")
        columns: list[Column | str] = [
            Column("text", left=True, fold=32), "tokens", "perplexity", "loops",
        ]  # fmt: skip
        if found.against is not None:
            columns += ["ratio", "KL (nats)", "same top token", "same greedy text"]
        rows = []
        for row in found.table():
            cells = [
                str(row["text"]),
                str(row["tokens"]),
                f"{row['perplexity']:.4g}",
                _share(row["loops"]),
            ]
            if found.against is not None:
                cells += [
                    f"{row['ratio']:.4f}",
                    "–" if row["kl_nats"] is None else f"{row['kl_nats']:.4f}",
                    _share(row["same_top1"]),
                    _share(row["agreement"]),
                ]
            rows.append(tuple(cells))
        print_table(console, columns, rows)
    if found.tasks:
        console.print()
        print_table(
            console,
            [Column("task", left=True, fold=32), Column("metric", left=True), "value"],
            [
                (task, name, f"{value:.4f}")
                for task, metrics in found.tasks.items()
                for name, value in metrics.items()
            ],
        )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
