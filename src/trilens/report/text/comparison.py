"""A comparison as text for a terminal: output, layer by layer, gates, roles of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from trilens.analysis.comparison.heads import RoleChange
from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.rows import Row
from trilens.evaluation.loop import perplexity_of
from trilens.io.messages import in_blocks
from trilens.report.text.inspection import gate_headings, print_decay_note
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["comparison_sentence", "counted", "four_digits", "print_comparison", "render_comparison"]

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


def counted(comparison: Comparison) -> str:
    """Of how much text it is, and how it was cut, which a perplexity depends on."""
    blocks = in_blocks(comparison.block_length)
    return f"{comparison.n_prompts} prompts, {comparison.n_tokens:,} tokens{blocks}"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print summary, layers, gates, role changes and weights; what was not measured is left out."""
    for side, model in (("before", comparison.before), ("after", comparison.after)):
        # A directory by its last name, as in inspect; a hub id whole.
        called = Path(model.name).name if Path(model.name).is_absolute() else model.name
        name = f"{called} · " if called else ""
        words = f"{name}{model.model_class} · {model.n_layers} layers · {model.dtype}"
        print_line(console, f"{side:<7}{words}")
    print_line(console, counted(comparison))
    console.print()
    print_line(console, comparison_sentence(comparison))
    console.print()
    index = _Index(comparison.rows)
    for line in _output(index):
        print_line(console, line)
    console.print()
    _print_layers(index, console)
    _print_gates(index, console, comparison.options["gate_threshold"])
    if comparison.role_changes:
        console.print()
        _print_roles(comparison.role_changes, console)
        more = len(comparison.role_changes) - _SHOWN_ROLES
        if more > 0:
            print_line(console, f"… and {more} more heads")
    for note in comparison.notes:
        print_line(console, f"note: {note}", style="dim")


def comparison_sentence(comparison: Comparison) -> str:
    """What differs, in a sentence or two: output, residual stream, heads."""
    rows = comparison.rows
    if not any(row.delta for row in rows):
        return "No difference: every delta is exactly 0."
    index = _Index(rows)
    words = [*_output_words(index), *_inside_words(index)]
    lost = sum(change.lost for change in comparison.role_changes)
    gained = len(comparison.role_changes) - lost
    if lost or gained:
        words.append(f"roles of heads: {lost} lost, {gained} gained")
    return f"{'; '.join(words)}."


def _output_words(index: _Index) -> list[str]:
    words = []
    perplexity = index.one("perplexity")
    if perplexity is not None:
        ends = [index.one(f"nll_nats_change_ci95_{end}") for end in ("low", "high")]
        found = [perplexity_of(end.after) for end in ends if end is not None]
        interval = f" (95 % interval {' … '.join(map(four_digits, found))})" if found else ""
        ratio = _ratio(perplexity.after, perplexity.before)
        words.append(f"Perplexity × {four_digits(ratio)}{interval}")
    kl, top1 = index.one("kl_nats_mean"), index.one("same_top1")
    if kl is not None and top1 is not None:
        words.append(f"KL {four_digits(kl.after)} nats, same top token {top1.after:.1%}")
    return words


def _inside_words(index: _Index) -> list[str]:
    cosines = {layer: index.of("cosine", layer) for layer in index.layers}
    means = {layer: _mean_after(rows) for layer, rows in cosines.items() if rows}
    if not means:
        return []
    layer = min(means, key=lambda each: means[each])
    return [f"residual stream least alike after layer {layer} (cosine {four_digits(means[layer])})"]


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
            values = [four_digits(getattr(end, side)) for end in ends if end is not None]
            interval = f" [{', '.join(values)}]" if values else ""
            shown.append(f"{four_digits(getattr(perplexity, side))}{interval}")
        ratio = _ratio(perplexity.after, perplexity.before)
        lines.append(f"perplexity        {shown[0]} → {shown[1]}   × {four_digits(ratio)}")
    kl = [index.one(f"kl_nats_{name}") for name in ("mean", "median", "p99", "max")]
    if all(kl):
        values = [four_digits(row.after) for row in kl if row is not None]
        words = zip(("mean", "median", "p99", "max"), values, strict=True)
        lines.append("KL (nats)         " + "   ".join(f"{name} {value}" for name, value in words))
    top1, top5 = index.one("same_top1"), index.one("same_top5")
    if top1 is not None and top5 is not None:
        lines.append(f"same top token    {top1.after:.1%}   of the top five {top5.after:.1%}")
    target = index.one("right_probability_rms_change")
    if target is not None:
        lines.append(f"target token      probability changes by {four_digits(target.after)} (RMS)")
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
        ("cos", "cosine", _mean_after, four_digits),
        ("cos last", "cosine_last", _mean_after, four_digits),
        ("rel. error", "relative_error", _mean_after, four_digits),
        ("state cos", "state_cosine", _mean_after, four_digits),
        ("state error", "state_relative_error", _mean_after, four_digits),
        ("attn JS", "js_nats", _mean_after, four_digits),
        ("worst", "js_nats", _max_after, four_digits),
        ("Δ entropy", "entropy_nats", _mean_delta, four_digits),
        ("Δ distance", "distance_tokens", _mean_delta, four_digits),
        ("Δ first", "first_token_mass", _mean_delta, four_digits),
        ("converged", "settled", _mean_after, "{:.1%}".format),
        ("Δ converged", "settled", _mean_delta, "{:+.1%}".format),
        ("W error", "weight_relative_error", _mean_after, four_digits),
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


def _print_gates(index: _Index, console: Console, threshold: float) -> None:
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
            four_digits(by_place[layer, module, "openness_abs_change"].after),
            f"{by_place[layer, module, 'newly_dead'].after:.0f}",
            f"{by_place[layer, module, 'newly_saturated'].after:.0f}",
        ]
        if horizons:
            sides = () if horizon is None else (horizon.before, horizon.after)
            row += map(four_digits, sides) if sides else [_NONE, _NONE]
        cells.append(row)
    columns: list[Column | str] = [
        "layer", Column("gate", left=True), "open before", "open after", "|Δ unit|",
        *gate_headings(threshold, "newly "),
        *(["horizon before", "horizon after"] if horizons else []),
    ]  # fmt: skip
    console.print()
    print_table(console, columns, cells, keys=2)
    print_decay_note((name for _, name in places), console)


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


def four_digits(value: float) -> str:
    """Four digits, in the form that reads best."""
    if value == 0 or not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "0" if value == 0 else "NaN")
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
