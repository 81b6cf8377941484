"""The model card of a ternary checkpoint."""

from __future__ import annotations

from collections import Counter

from trilens.checkpoint.format.report import TernaryReport

__all__ = ["model_card"]


def model_card(report: TernaryReport) -> str:
    """README.md: what was done, what it costs, and a row for each matrix."""
    plan = report.plan
    scales = "matrix" if plan.per == "tensor" else str(plan.per)
    if plan.group_size is not None:
        scales = f"group of {plan.group_size} weights"
    kept = Counter(
        tensor.reason
        for tensor in report.tensors
        if tensor.outcome == "kept" and not tensor.is_matrix
    )
    mixed = "" if not plan.matrices else f", {len(plan.matrices)} matrices by entries of their own"
    bits = "1.6 bits each, five to a byte" if plan.storage == "compact" else "two bits each"
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- ternary",
        "- trilens",
        "---",
        "",
        "# Ternary weights",
        "",
        report.verdict,
        "",
        f"- Rule: `{plan.rule}`, one scale per {scales}, scales rounded to {plan.scale_dtype}"
        f"{mixed}.",
        f"- {len(report.coded)} matrices are stored as trits −1, 0, +1, in {bits} "
        "(`planes`: two trits), every one decoded from the file and compared bit for bit.",
        f"- Tensors: {report.size_bytes:,} bytes, {report.size_bytes_before:,} before; "
        f"{report.bits_per_weight:.2f} bits per weight over all tensors, "
        f"{report.matrix_bits_per_weight:.2f} over the matrices of the blocks.",
        "",
        "```python",
        "import trilens  # teaches transformers to read this checkpoint",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this directory")',
        "```",
        "",
        "`trilens validate DIRECTORY` reads every byte back and checks it.",
        "",
        "## Matrices",
        "",
        "Relative error is ‖W−Ŵ‖²/‖W‖²; bits per weight count codes, scales and offsets.",
        "",
        "| matrix | shape | bits per weight | relative error | zeros | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.table():
        error, zeros = row["relative_error"], row["sparsity"]
        lines.append(
            f"| `{row['name']}` | {row['shape']} | {row['bits_per_weight']:.3f} "
            f"| {'–' if error is None else f'{error:.4f}'} "
            f"| {'–' if zeros is None else f'{zeros:.1%}'} | {row['outcome']} |"
        )
    lines += ["", "## Kept as they are", ""]
    lines += [f"- {count} × {why}" for why, count in sorted(kept.items())] or ["- nothing"]
    return "\n".join(lines) + "\n"
