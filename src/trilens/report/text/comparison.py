"""A comparison as text for a terminal: output, layer by layer, gates, roles of heads."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trilens.analysis.comparison.result import Comparison
from trilens.evaluation.loop import perplexity_of
from trilens.io.messages import in_blocks
from trilens.report.text.inspection import print_decay_note
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.comparison import (
    RowIndex,
    change_gates,
    change_layers,
    mean_after,
    ratio,
    role_table,
)
from trilens.report.words import four_digits

__all__ = ["comparison_sentence", "counted", "print_comparison", "render_comparison"]

_SHOWN_ROLES = 20


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
    index = RowIndex(comparison.rows)
    for line in _output(index):
        print_line(console, line)
    console.print()
    print_rows(console, change_layers(index))
    gates = change_gates(index, comparison.options["gate_threshold"])
    if gates is not None:
        console.print()
        print_rows(console, gates)
        print_decay_note((row[1] for row in gates.rows), console)
    if comparison.role_changes:
        console.print()
        print_rows(console, role_table(comparison.role_changes, _SHOWN_ROLES))
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
    index = RowIndex(rows)
    words = [*_output_words(index), *_inside_words(index)]
    lost = sum(change.lost for change in comparison.role_changes)
    gained = len(comparison.role_changes) - lost
    if lost or gained:
        words.append(f"roles of heads: {lost} lost, {gained} gained")
    return f"{'; '.join(words)}."


def _output_words(index: RowIndex) -> list[str]:
    words = []
    perplexity = index.one("perplexity")
    if perplexity is not None:
        ends = [index.one(f"nll_nats_change_ci95_{end}") for end in ("low", "high")]
        found = [perplexity_of(end.after) for end in ends if end is not None]
        interval = f" (95 % interval {' … '.join(map(four_digits, found))})" if found else ""
        times = ratio(perplexity.after, perplexity.before)
        words.append(f"Perplexity × {four_digits(times)}{interval}")
    kl, top1 = index.one("kl_nats_mean"), index.one("same_top1")
    if kl is not None and top1 is not None:
        words.append(f"KL {four_digits(kl.after)} nats, same top token {top1.after:.1%}")
    return words


def _inside_words(index: RowIndex) -> list[str]:
    cosines = {layer: index.of("cosine", layer) for layer in index.layers}
    means = {layer: mean_after(rows) for layer, rows in cosines.items() if rows}
    if not means:
        return []
    layer = min(means, key=lambda each: means[each])
    return [f"residual stream least alike after layer {layer} (cosine {four_digits(means[layer])})"]


def _output(index: RowIndex) -> list[str]:
    lines = []
    perplexity = index.one("perplexity")
    if perplexity is not None:
        ends = index.one("perplexity_ci95_low"), index.one("perplexity_ci95_high")
        shown = []
        for side in ("before", "after"):
            values = [four_digits(getattr(end, side)) for end in ends if end is not None]
            interval = f" [{', '.join(values)}]" if values else ""
            shown.append(f"{four_digits(getattr(perplexity, side))}{interval}")
        times = ratio(perplexity.after, perplexity.before)
        lines.append(f"perplexity        {shown[0]} → {shown[1]}   × {four_digits(times)}")
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
