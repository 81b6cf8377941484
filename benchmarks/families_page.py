"""Write docs/families.md from the table that ships with the package.

python -m benchmarks.families_page
"""

from __future__ import annotations

from pathlib import Path

from trilens.families import FamilyRow, load_families

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def _line(row: FamilyRow) -> str:
    reason = row.reason.split("; ")[0].replace("|", "\\|")
    return f"| {row.model_type} | {row.n_layers or '–'} | {reason} |"


def page() -> str:
    """The page as Markdown."""
    table = load_families()
    counts = table.count()
    groups = {
        key: [row for row in table.rows if row.outcome == key]
        for key in ("full", "residual", "refused")
    }
    gated = sum(1 for row in table.rows if row.gates)
    lines = [
        "# Families",
        "",
        f"All {len(table.rows)} causal-LM types of transformers {table.transformers}, a tiny random"
        " model each, prompts longer",
        "than its sliding window, attention chunk and sparse top-k (`make sweep`; the table is",
        "`trilens families`). Captured means: logits bit-identical to a plain run, every residual",
        "bit-identical to an independent hook, attention within 1e-5 of eager `output_attentions`",
        "where the family offers it, and `capture_many` within 1e-5 of `capture`.",
        "",
        f"- **{counts['full']} in full**: the residual stream of every block and every softmax "
        "attention layer",
        f"- **{counts['residual']} without attention**: recurrent, or attention that does not go "
        "through transformers' registry",
        f"- **{counts['refused']} refused** by an error that names the reason",
        f"- {gated} have a proven gate",
        "",
        "## In full",
        "",
        ", ".join(row.model_type for row in groups["full"]),
        "",
    ]
    for key, title in (("residual", "Without attention"), ("refused", "Refused")):
        lines += [f"## {title}", "", "| type | layers | why |", "|---|---|---|"]
        lines += [*map(_line, groups[key]), ""]
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
