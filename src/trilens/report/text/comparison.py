"""A comparison as text for a terminal: output, layer by layer, gates, roles of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from trilens.analysis.comparison.heads import RoleChange
from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.rows import Row
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_comparison", "render_comparison"]

_SHOWN_ROLES = 20
_NONE = "–"

Pick = Callable[[Sequence[Row]], float]
Spell = Callable[[float], str]


def render_comparison(comparison: Comparison, width: int = 120) -> str:
    """The text that `print_comparison` prints, without colours."""
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        print_comparison(comparison, console)
    return captured.get()


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print summary, layers, gates, role changes and weights; what was not measured is left out."""
    for side, model in (("before", comparison.before), ("after", comparison.after)):
        # A directory by its last name, as in inspect; a hub id whole.
        called = Path(model.name).name if Path(model.name).is_absolute() else model.name
        name = f"{called} · " if called else ""
        words = f"{name}{model.model_class} · {model.n_layers} layers · {model.dtype}"
        print_line(console, f"{side:<7}{words}")
    print_line(console, f"{comparison.n_prompts} prompts, {comparison.n_tokens:,} tokens")
    console.print()
    index = _Index(comparison.rows)
    for line in _output(index):
        print_line(console, line)
    console.print()
    _print_layers(index, console)
    _print_gates(index, console)
    if comparison.role_changes:
        console.print()
        _print_roles(comparison.role_changes, console)
        more = len(comparison.role_changes) - _SHOWN_ROLES
        if more > 0:
            print_line(console, f"… and {more} more heads")
    for note in comparison.notes:
        print_line(console, f"note: {note}", style="dim")


class _Index:
    """Rows by metric, then by layer."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)
        self.found: dict[tuple[str, int | None], list[Row]] = {}
        for row in self.rows:
            self.found.setdefault((row.metric, row.layer), []).append(row)
        self.layers = sorted({row.layer for row in self.rows if row.layer is not None})

    def of(self, metric: str, layer: int | None) -> list[Row]:
        return self.found.get((metric, layer), [])

    def one(self, metric: str) -> Row | None:
        rows = self.of(metric, None)
        return rows[0] if rows else None


def _output(index: _Index) -> list[str]:
    lines = []
    perplexity = index.one("perplexity")
    if perplexity is not None:
        ends = index.one("perplexity_ci95_low"), index.one("perplexity_ci95_high")
        shown = []
        for side in ("before", "after"):
            values = [_number(getattr(end, side)) for end in ends if end is not None]
            interval = f" [{', '.join(values)}]" if values else ""
            shown.append(f"{_number(getattr(perplexity, side))}{interval}")
        ratio = _ratio(perplexity.after, perplexity.before)
        lines.append(f"perplexity        {shown[0]} → {shown[1]}   × {_number(ratio)}")
    kl = [index.one(f"kl_nats_{name}") for name in ("mean", "median", "p99", "max")]
    if all(kl):
        values = [_number(row.after) for row in kl if row is not None]
        words = zip(("mean", "median", "p99", "max"), values, strict=True)
        lines.append("KL (nats)         " + "   ".join(f"{name} {value}" for name, value in words))
    top1, top5 = index.one("same_top1"), index.one("same_top5")
    if top1 is not None and top5 is not None:
        lines.append(f"same top token    {top1.after:.1%}   of the top five {top5.after:.1%}")
    target = index.one("right_probability_rms_change")
    if target is not None:
        lines.append(f"target token      probability changes by {_number(target.after)} (RMS)")
    convergence = index.one("settle_layer")
    if convergence is not None:
        lines.append(
            f"logit lens        convergence layer {convergence.before:.2f} → "
            f"{convergence.after:.2f} (mean)"
        )
    return lines


def _print_layers(index: _Index, console: Console) -> None:
    """One row per layer; columns of what no layer has are left out."""
    columns: tuple[tuple[str, str, Pick, Spell], ...] = (
        ("cos", "cosine", _mean_after, _number),
        ("cos last", "cosine_last", _mean_after, _number),
        ("rel. error", "relative_error", _mean_after, _number),
        ("attn JS", "js_nats", _mean_after, _number),
        ("worst", "js_nats", _max_after, _number),
        ("Δ entropy", "entropy_nats", _mean_delta, _number),
        ("Δ distance", "distance_tokens", _mean_delta, _number),
        ("Δ first", "first_token_mass", _mean_delta, _number),
        ("converged", "settled", _mean_after, "{:.1%}".format),
        ("Δ converged", "settled", _mean_delta, "{:+.1%}".format),
        ("W error", "weight_relative_error", _mean_after, _number),
        ("zeros", "weight_sparsity", _mean_after, "{:.1%}".format),
    )
    there = [each for each in columns if any(index.of(each[1], i) for i in index.layers)]
    cells = []
    for layer in index.layers:
        row = [str(layer)]
        for _, metric, pick, spell in there:
            rows = index.of(metric, layer)
            row.append(spell(pick(rows)) if rows else _NONE)
        cells.append(row)
    print_table(console, ["layer", *(each[0] for each in there)], cells)


def _print_gates(index: _Index, console: Console) -> None:
    places = [(row.layer, row.module) for row in index.rows if row.metric == "openness"]
    if not places:
        return
    by_place = {(row.layer, row.module, row.metric): row for row in index.rows}
    horizons = any((*place, "horizon_tokens") in by_place for place in places)
    cells = []
    for layer, module in places:
        opened = by_place[layer, module, "openness"]
        horizon = by_place.get((layer, module, "horizon_tokens"))
        row = [
            str(layer),
            module,
            f"{opened.before:.3f}",
            f"{opened.after:.3f}",
            _number(by_place[layer, module, "openness_abs_change"].after),
            f"{by_place[layer, module, 'newly_dead'].after:.0f}",
            f"{by_place[layer, module, 'newly_saturated'].after:.0f}",
        ]
        if horizons:
            sides = () if horizon is None else (horizon.before, horizon.after)
            row += map(_number, sides) if sides else [_NONE, _NONE]
        cells.append(row)
    columns: list[Column | str] = [
        "layer", Column("gate", left=True), "open before", "open after", "|Δ unit|", "newly dead",
        "newly saturated", *(["horizon before", "horizon after"] if horizons else []),
    ]  # fmt: skip
    console.print()
    print_table(console, columns, cells, keys=2)


def _print_roles(changes: Sequence[RoleChange], console: Console) -> None:
    ranked = sorted(changes, key=lambda each: -abs(each.after - each.before))
    cells = [
        (
            str(each.layer),
            str(each.head),
            each.role.replace("_", "-"),
            f"{each.before:.3f}",
            f"{each.after:.3f}",
            "lost" if each.lost else "gained",
        )
        for each in ranked[:_SHOWN_ROLES]
    ]
    columns: list[Column | str] = [
        "layer", "head", Column("role", left=True), "before", "after", Column("outcome", left=True)
    ]  # fmt: skip
    print_table(console, columns, cells, keys=2)


def _mean_after(rows: Sequence[Row]) -> float:
    return math.fsum(row.after for row in rows) / len(rows)


def _max_after(rows: Sequence[Row]) -> float:
    return max(row.after for row in rows)


def _mean_delta(rows: Sequence[Row]) -> float:
    return sum(row.delta for row in rows) / len(rows)


def _ratio(after: float, before: float) -> float:
    if after == before:
        return 1.0
    return after / before if before else math.inf


def _number(value: float) -> str:
    """Four digits, in the form that reads best."""
    if value == 0 or not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "0" if value == 0 else "NaN")
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
