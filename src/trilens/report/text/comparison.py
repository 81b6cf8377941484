"""A comparison as text for a terminal: what is said, layer by layer, gates, roles of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trilens.analysis.comparison.heads import RoleChange
from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.rows import Row

__all__ = ["print_comparison", "render_comparison"]

_SHOWN_ROLES = 20
_NONE = "–"

Pick = Callable[[Sequence[Row]], float]


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
        console.print(Text(f"{side:<7}{words}"))
    console.print(Text(f"{comparison.n_prompts} prompts, {comparison.n_tokens:,} tokens\n"))
    index = _Index(comparison.rows)
    for line in _outside(index):
        console.print(Text(line))
    console.print()
    console.print(_layers(index))
    gates = _gates(index)
    if gates is not None:
        console.print()
        console.print(gates)
    if comparison.role_changes:
        console.print()
        console.print(_roles(comparison.role_changes))
        more = len(comparison.role_changes) - _SHOWN_ROLES
        if more > 0:
            console.print(Text(f"… and {more} more heads"))
    for note in comparison.notes:
        console.print(Text(f"note: {note}", style="dim"))


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


def _outside(index: _Index) -> list[str]:
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
    right = index.one("right_probability_rms_change")
    if right is not None:
        lines.append(f"right token       probability changes by {_number(right.after)} (RMS)")
    settle = index.one("settle_layer")
    if settle is not None:
        lines.append(
            f"logit lens        final top token stays from layer {settle.before:.2f} → "
            f"{settle.after:.2f} on (mean)"
        )
    return lines


def _layers(index: _Index) -> Table:
    """One row per layer; columns of what no layer has are left out."""
    columns: tuple[tuple[str, str, Pick], ...] = (
        ("cos", "cosine", _mean_after),
        ("cos last", "cosine_last", _mean_after),
        ("rel. error", "relative_error", _mean_after),
        ("attn JS", "js_nats", _mean_after),
        ("worst", "js_nats", _max_after),
        ("Δ entropy", "entropy_nats", _mean_delta),
        ("Δ distance", "distance_tokens", _mean_delta),
        ("Δ first", "first_token_mass", _mean_delta),
        ("settled", "settled", _mean_after),
        ("Δ settled", "settled", _mean_delta),
        ("W error", "weight_relative_error", _mean_after),
        ("zeros", "weight_sparsity", _mean_after),
    )
    there = [each for each in columns if any(index.of(each[1], i) for i in index.layers)]
    table = _table(["layer", *(heading for heading, _, _ in there)])
    for layer in index.layers:
        cells = [str(layer)]
        for _, metric, pick in there:
            rows = index.of(metric, layer)
            cells.append(_number(pick(rows)) if rows else _NONE)
        table.add_row(*cells)
    return table


def _gates(index: _Index) -> Table | None:
    places = [(row.layer, row.module) for row in index.rows if row.metric == "openness"]
    if not places:
        return None
    by_place = {(row.layer, row.module, row.metric): row for row in index.rows}
    table = _table(
        ["layer", "gate", "open", "→", "|Δ unit|", "newly dead", "newly sat.", "horizon", "→"]
    )
    for layer, module in places:
        opened = by_place[layer, module, "openness"]
        horizon = by_place.get((layer, module, "horizon_tokens"))
        table.add_row(
            str(layer),
            module,
            f"{opened.before:.3f}",
            f"{opened.after:.3f}",
            _number(by_place[layer, module, "openness_abs_change"].after),
            f"{by_place[layer, module, 'newly_dead'].after:.0f}",
            f"{by_place[layer, module, 'newly_saturated'].after:.0f}",
            _NONE if horizon is None else _number(horizon.before),
            _NONE if horizon is None else _number(horizon.after),
        )
    return table


def _roles(changes: Sequence[RoleChange]) -> Table:
    table = _table(["layer", "head", "role", "before", "after", "outcome"])
    ranked = sorted(changes, key=lambda each: -abs(each.after - each.before))
    for each in ranked[:_SHOWN_ROLES]:
        table.add_row(
            str(each.layer),
            str(each.head),
            each.role.replace("_", "-"),
            f"{each.before:.3f}",
            f"{each.after:.3f}",
            "lost" if each.lost else "gained",
        )
    return table


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    words = {"gate", "role", "outcome"}
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=True)
    return table


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
