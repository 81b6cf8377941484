"""Rows of a comparison about the output: perplexity, KL divergence, top tokens."""

from __future__ import annotations

from trilens.analysis.comparison.rows import Place, Row
from trilens.evaluation.loop import perplexity_of
from trilens.evaluation.output import OutputResult

__all__ = ["output_rows"]

_AT = Place("output")


def output_rows(result: OutputResult) -> list[Row]:
    """The result as rows of the table."""
    rows = []
    for metric, name in (
        ("perplexity", "perplexity"),
        ("nll_nats", "nll_nats"),
        ("right_probability", "target_probability"),
    ):
        pair = (getattr(result, f"{name}_before"), getattr(result, f"{name}_after"))
        if None not in pair:
            rows.append(_AT.change(metric, *pair))
    before, after = result.nll_interval_before, result.nll_interval_after
    moved = result.nll_interval_change
    if before is not None and after is not None and moved is not None:
        for end in ("low", "high"):
            pair = getattr(before, end), getattr(after, end)
            both = [perplexity_of(value) for value in pair]
            rows += [
                _AT.change(f"perplexity_ci95_{end}", *both),
                _AT.change(f"nll_nats_ci95_{end}", *pair),
                _AT.against_itself(f"nll_nats_change_ci95_{end}", getattr(moved, end)),
            ]
    if result.target_probability_rms_change is not None:
        value = result.target_probability_rms_change
        rows.append(_AT.against_itself("right_probability_rms_change", value))
    for metric in ("kl_nats_mean", "kl_nats_median", "kl_nats_p99", "kl_nats_max"):
        rows.append(_AT.against_itself(metric, getattr(result, metric)))
    for metric in ("same_top1", "same_top5"):
        rows.append(_AT.against_itself(metric, getattr(result, metric), 1.0))
    return rows
