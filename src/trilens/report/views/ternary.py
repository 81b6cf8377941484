"""What `ternarize` and `validate` found, as tables and sentences."""

from __future__ import annotations

from collections import Counter

from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.gguf.report import GgufReport
from trilens.report.tables import Column, Table
from trilens.report.words import four_digits

__all__ = ["gguf_sentence", "gguf_table", "ternary_sentence", "ternary_table"]

_BITS = Column(
    "bits/weight",
    words="bits per weight",
    better="smaller",
    note="codes, scales and offsets",
    spell="{:.3f}".format,
)
_ZEROS = Column("zeros", note="share of zeros among the trits", spell="{:.1%}".format)


_SCALE = Column(
    "scale",
    note="magnitude of the scales, the median over their units",
    spell=four_digits,
)


def ternary_table(report: TernaryReport, *, scales: bool = False) -> Table:
    """One row per matrix; with their scales, where weights were seen."""
    calibrated = report.damage is not None
    scales = scales and any(tensor.histogram is not None for tensor in report.matrices)
    columns = [
        Column("matrix", left=True, fold=32),
        Column("shape"),
        _BITS,
        Column(
            "relative error",
            better="smaller",
            note="‖W − Ŵ‖² / ‖W‖² of the weights",
            spell="{:.4f}".format,
        ),
    ]
    if calibrated:
        columns.append(
            Column(
                "output error",
                better="smaller",
                note="Σ‖Ŵx − y‖² / Σ‖y‖² on the text that it was fitted to",
                spell="{:.4f}".format,
            )
        )
        columns.append(
            Column(
                "held out",
                words="output error on held-out text",
                key="output_error_held_out",
                better="smaller",
                spell="{:.4f}".format,
            )
        )
    columns += [*([_SCALE] if scales else []), _ZEROS, Column("outcome", left=True, fold=24)]
    rows = tuple(_row(tensor, calibrated, scales) for tensor in report.matrices)
    return Table(tuple(columns), rows, title="matrices")


def _row(tensor: TensorReport, calibrated: bool, scales: bool) -> tuple[object, ...]:
    return (
        tensor.name,
        "×".join(map(str, tensor.shape)),
        tensor.bits_per_weight,
        tensor.relative_error,
        *((tensor.output_error, tensor.output_error_held_out) if calibrated else ()),
        *((None if tensor.histogram is None else tensor.histogram.scale[1],) if scales else ()),
        tensor.sparsity,
        tensor.outcome + (f": {tensor.reason}" if tensor.reason else ""),
    )


def ternary_sentence(report: TernaryReport) -> str:
    """Counts and sizes."""
    absent = sum(tensor.outcome == "left out" for tensor in report.tensors)
    rest = len(report.tensors) - len(report.coded) - absent
    return (
        f"{len(report.coded)} matrices ternarized, {rest} tensors not quantized "
        f"({len(report.fallbacks)} of them matrices), {absent} left out; "
        f"{report.size_bytes_before:,} → {report.size_bytes:,} bytes, "
        f"{report.bits_per_weight:.2f} bits per weight over all tensors, "
        f"{report.matrix_bits_per_weight:.2f} over the matrices of the blocks."
    )


def gguf_table(report: GgufReport) -> Table:
    """One row per tensor."""
    return Table(
        (
            Column("tensor", left=True, fold=32),
            Column("type", left=True),
            Column("shape"),
            _BITS,
            _ZEROS,
        ),
        tuple(
            (
                each.name,
                each.type,
                "×".join(map(str, each.shape)),
                each.bits_per_weight,
                each.sparsity,
            )
            for each in report.tensors
        ),
        title="tensors",
    )


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
