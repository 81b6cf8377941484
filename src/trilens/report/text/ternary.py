"""What `ternarize` and `validate` found, as text for a terminal."""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType

from rich.console import Console

from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.gguf.report import GgufReport
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["GGUF_HEAD", "REPORT_HEAD", "gguf_sentence", "print_report"]

REPORT_HEAD = MappingProxyType({"format": "trilens.ternary_report", "version": 1})
"""What the JSON of a `TernaryReport` begins with."""

GGUF_HEAD = MappingProxyType({"format": "trilens.gguf_report", "version": 1})
"""What the JSON of a `GgufReport` begins with."""


def print_report(report: TernaryReport, console: Console) -> None:
    """Draw a row for each matrix, the sizes and the verdict."""
    calibrated = report.damage is not None
    columns: list[Column | str] = [
        Column("matrix", left=True, fold=32),
        "shape",
        "bits/weight",
        "relative error",
    ]
    columns += ["output error", "held out"] if calibrated else []
    columns += ["zeros", Column("outcome", left=True, fold=24)]
    print_table(console, columns, [_cells(tensor, calibrated) for tensor in report.matrices])
    absent = sum(tensor.outcome == "left out" for tensor in report.tensors)
    rest = len(report.tensors) - len(report.coded) - absent
    console.print()
    print_line(
        console,
        f"{len(report.coded)} matrices ternarized, {rest} tensors not quantized "
        f"({len(report.fallbacks)} of them matrices), {absent} left out; "
        f"{report.size_bytes_before:,} → {report.size_bytes:,} bytes, "
        f"{report.bits_per_weight:.2f} bits per weight over all tensors, "
        f"{report.matrix_bits_per_weight:.2f} over the matrices of the blocks.",
    )
    print_line(console, report.verdict)


def _cells(tensor: TensorReport, calibrated: bool) -> tuple[str, ...]:
    zeros = tensor.sparsity
    errors = (tensor.output_error, tensor.output_error_held_out)
    return (
        tensor.name,
        "×".join(map(str, tensor.shape)),
        f"{tensor.bits_per_weight:.3f}",
        _share(tensor.relative_error),
        *(map(_share, errors) if calibrated else ()),
        "–" if zeros is None else f"{zeros:.1%}",
        tensor.outcome + (f": {tensor.reason}" if tensor.reason else ""),
    )


def _share(error: float | None) -> str:
    return "–" if error is None else f"{error:.4f}"


def gguf_sentence(report: GgufReport) -> str:
    """What is in an undamaged GGUF file."""
    hashed = "all bytes have the hashes that the file names"
    if not report.whole_checked:
        hashed = (
            "the tensors have the hash that the file names; it names none of its metadata, where "
            "damage would not show"
        )
    if not report.hash_checked:
        hashed = (
            "the file names no hash of its tensors, so that damage to tensors that are not "
            "quantized would not show"
        )
    four = sum(tensor.levels == 4 for tensor in report.coded)
    levels = f" ({four} of them the level 2 too, so not ternary)" if four else ""
    counts = Counter(tensor.type for tensor in report.tensors)
    types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return (
        f"Architecture {report.architecture}; {len(report.coded)} of {len(report.tensors)} tensors "
        f"hold trits{levels}, with legal codes and finite scales; {report.bits_per_weight:.2f} "
        f"bits per weight over all tensors ({types}); {hashed}."
    )
