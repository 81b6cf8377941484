"""From results to a page: which sections each kind of result has."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import singledispatch
from importlib.metadata import version
from typing import Any

from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.series import ComparisonSeries
from trilens.analysis.direct_attribution import Attribution
from trilens.analysis.edit_effects import EditEffect
from trilens.analysis.effect_sweep import EffectSweep
from trilens.analysis.heads import HeadScores
from trilens.analysis.inspection import Inspection, inspect_capture
from trilens.analysis.lenses.logit_lens import LogitLens, logit_lens, same_model
from trilens.analysis.patch_result import PatchSweep
from trilens.caches.activation import FullActivationCache
from trilens.caches.gates import GateCache
from trilens.checkpoint.format.report import TernaryReport
from trilens.checkpoint.gguf.report import GgufReport
from trilens.corpus.store import Store
from trilens.errors import UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.lens.parts import ModelInfo
from trilens.models.token_strings import token_strings
from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity
from trilens.report.page import Chart, Page, Section
from trilens.report.tables import Column, Table
from trilens.report.text.comparison import comparison_sentence, counted
from trilens.report.text.store import store_sentences
from trilens.report.views.capture import (
    head_section,
    layer_section,
    lens_section,
    state_section,
)
from trilens.report.views.changes import comparison_sections, series_sections, what_broke_first
from trilens.report.views.edits import edit_sections
from trilens.report.views.gates import gate_section
from trilens.report.views.heads import score_sections
from trilens.report.views.inspection import gate_table, layer_table, next_table, state_table
from trilens.report.views.planning import plan_sentence, sensitivity_title
from trilens.report.views.store import store_sections
from trilens.report.views.sweeps import attribution_sections, effect_sections, patch_sections
from trilens.report.views.ternary import gguf_sentence, gguf_table, ternary_sentence
from trilens.report.views.weights import plan_sections, sensitivity_sections, ternary_sections
from trilens.results import Tabular
from trilens.version import __version__

__all__ = ["LENS_TOKENS", "capture_page", "joined", "page_of", "versions"]

LENS_TOKENS = 512
"""Tokens of a long prompt, its last ones, whose logit lens a page holds."""

_NEXT = 8


def versions() -> dict[str, str]:
    """What a report was made with."""
    return {
        "trilens": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "Python": platform.python_version(),
    }


@singledispatch
def page_of(result: object) -> Page:
    """The page of a result.

    Raises:
        UsageError: nothing that a report is made of.
    """
    raise UsageError(
        f"{type(result).__name__} is nothing that a report is made of: give a Capture, or a result "
        "with a table"
    )


def capture_page(capture: Capture, *, lens: Lens | None = None, top_k: int = 5) -> Page:
    """The page of a capture; with its lens also what each layer would predict.

    Raises:
        UsageError: it holds nothing to show; says what to capture.
        IncomparableError: the lens is of another model.
    """
    found = None
    notes = []
    if lens is None:
        notes.append("no logit lens: it needs the model, too")
    elif not lens.anatomy.unembedding:
        same_model(capture.model, lens, "capture")
        notes.append("no logit lens: this model has no unembedding")
    elif capture.has("residual"):
        seq = len(capture.tokens)
        is_long = isinstance(capture.residual, FullActivationCache) and seq > LENS_TOKENS
        last = range(seq - LENS_TOKENS, seq) if is_long else None
        found = logit_lens(capture, lens, k=top_k, positions=last)
        if is_long:
            notes.append(f"the logit lens is of the last {LENS_TOKENS} tokens")
    sections = [
        _next_section(capture, lens),
        head_section(capture, "softmax"),
        head_section(capture, "effective"),
        layer_section(capture, found),
        None if found is None else lens_section(found),
        None if capture.parts.gates is None else gate_section(capture.gates),
        state_section(capture),
    ]
    there = tuple(section for section in sections if section is not None)
    if not there:
        parts = ", ".join(capture.parts.names) or "nothing"
        raise UsageError(
            f"this capture holds {parts}, of which nothing can be shown: capture with "
            "residual='all', attention=True, gates=True"
        )
    notes += [
        f"no {part}: capture with {how}"
        for part, how in _HOW.items()
        if not capture.has(part) and _may_have(part, capture, lens)
    ]
    tokens = len(capture.tokens)
    return Page(
        title=_short(capture.model.name) or capture.model.model_class,
        sections=there,
        facts={**_model_facts(capture.model), "tokens": f"{tokens:,}"},
        tokens=tuple(capture.tokens),
        notes=tuple(notes),
    )


def joined(title: str, pages: Mapping[str, Page], *first: Section) -> Page:
    """One page of several models that read the same prompt, by their names.

    Their parts stand in one order of sections; tokens are those of the first.
    """
    sections = [
        replace(section, title=f"{name}: {section.title}", name=f"{name}-{section.anchor}")
        for name, page in pages.items()
        for section in page.sections
    ]
    some = next(iter(pages.values()))
    notes = [f"{name}: {note}" for name, page in pages.items() for note in page.notes]
    return Page(
        title=title,
        sections=(*first, *sections),
        facts={"models": ", ".join(pages), "tokens": f"{len(some.tokens):,}"},
        tokens=some.tokens,
        notes=tuple(notes),
    )


def _may_have(part: str, capture: Capture, lens: Lens | None) -> bool:
    """Whether a model has a part; without it: a recurrence has what attention has not."""
    if lens is not None:
        layers = {
            "attention": lens.anatomy.attention,
            "effective": lens.effective_layers,
            "states": lens.state_layers,
            "gates": lens.gate_layers,
        }
        return part not in layers or bool(layers[part])
    other = {"attention": "effective", "effective": "attention", "states": "attention"}
    return part not in other or not capture.has(other[part])


_HOW = {
    "residual": "residual='all'",
    "attention": "attention=True",
    "effective": "effective=True (recurrent layers)",
    "gates": "gates=True",
    "states": "states=True (recurrent layers)",
}


def _next_section(capture: Capture, lens: Lens | None) -> Section | None:
    if capture.logits is None:
        return None
    known = dict(zip(capture.token_ids.tolist(), capture.tokens, strict=True))

    def text(token: int) -> str:
        if lens is not None:
            return str(token_strings([token], lens.tokenizer)[0])
        return str(known.get(token, f"#{token}"))

    found = inspect_capture(capture, name="", top_k=_NEXT, token_text=text)
    table = next_table(found)
    chart = Chart(kind="bars", table=table, x="token", y=("probability",))
    return Section("Next token", (chart,), name="next")


page_of.register(Capture, capture_page)


def _model_facts(model: ModelInfo) -> dict[str, str]:
    return {
        "model": _short(model.name) or "–",
        "class": model.model_class,
        "size": f"{model.n_layers} layers, d_model {model.d_model}",
        "dtype": model.dtype,
    }


def _short(name: str) -> str:
    # A directory by its last name, a hub id whole.
    return name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name


@page_of.register
def _inspection(found: Inspection) -> Page:
    rows = found.layers
    blocks = [layer_table(rows, gates=False)]
    if any(row.gates for row in rows):
        blocks.append(gate_table(rows))
    if any(row.states for row in rows):
        blocks.append(state_table(rows))
    if found.next_tokens:
        blocks.append(next_table(found))
    return Page(
        title=found.model or found.model_class,
        sections=(Section("Layer by layer", tuple(blocks), name="layers"),),
        facts={
            "class": found.model_class,
            "size": f"{found.n_layers} layers, d_model {found.d_model}",
            "dtype": found.dtype,
            "tokens": f"{len(found.tokens):,}",
        },
        tokens=found.tokens,
        notes=found.notes,
    )


@page_of.register
def _gates(gates: GateCache) -> Page:
    section = gate_section(gates)
    if section is None:
        raise UsageError("none of these gates has an openness: ask get() for their values")
    return Page(title="gates", sections=(section,))


@page_of.register
def _lens(found: LogitLens) -> Page:
    return Page(
        title="logit lens", sections=(lens_section(found),), facts={}, tokens=_tokens_of(found)
    )


def _tokens_of(found: LogitLens) -> tuple[str, ...]:
    # The strip needs every token of the prompt; a lens on some positions has not all of them.
    whole = found.positions == tuple(range(len(found.positions)))
    return found.tokens if whole else ()


@page_of.register
def _comparison(found: Comparison) -> Page:
    before, after = found.before, found.after
    return Page(
        title=f"{_short(before.name) or before.model_class} → "
        f"{_short(after.name) or after.model_class}",
        sections=tuple(comparison_sections(found)),
        facts={
            "before": _side(before),
            "after": _side(after),
            "text": counted(found),
        },
        lead=" ".join([comparison_sentence(found), what_broke_first(found)]).strip(),
        notes=found.notes,
    )


def _side(model: ModelInfo) -> str:
    name = _short(model.name)
    words = f"{model.model_class} · {model.n_layers} layers · {model.dtype}"
    return f"{name} · {words}" if name else words


@page_of.register
def _series(found: ComparisonSeries) -> Page:
    first = found.comparisons[0]
    notes = dict.fromkeys(note for each in found.comparisons for note in each.notes)
    return Page(
        title=f"{len(found.comparisons)} checkpoints against {_short(first.before.name)}",
        sections=tuple(series_sections(found)),
        facts={"first": _side(first.before), "text": counted(first)},
        notes=tuple(notes),
    )


@page_of.register
def _ternary(report: TernaryReport) -> Page:
    return Page(
        title="ternary weights",
        sections=tuple(ternary_sections(report)),
        facts={"plan": "by matrix" if report.plan.matrices else str(report.plan.rule)},
        lead=f"{ternary_sentence(report)} {report.verdict}",
    )


@page_of.register
def _gguf(report: GgufReport) -> Page:
    section = Section("Tensors", (gguf_table(report),))
    return Page(title="GGUF file", sections=(section,), lead=gguf_sentence(report))


@page_of.register
def _sensitivity(found: Sensitivity) -> Page:
    return Page(
        title="sensitivity to ternary weights",
        sections=tuple(sensitivity_sections(found)),
        lead=sensitivity_title(found),
        notes=(f"weights restored, SHA-256 {found.checksum[:16]}…",),
    )


@page_of.register
def _plan(planned: Planned) -> Page:
    return Page(title="plan", sections=tuple(plan_sections(planned)), lead=plan_sentence(planned))


@page_of.register
def _patching(found: PatchSweep) -> Page:
    sections = patch_sections(found)
    words = "" if found.complete else "Interrupted: points that were not run have no value."
    return Page(title="patching", sections=tuple(sections), lead=words, tokens=found.tokens)


@page_of.register
def _effects(found: EffectSweep) -> Page:
    return Page(title=found.title, sections=tuple(effect_sections(found)))


@page_of.register
def _scores(found: HeadScores) -> Page:
    return Page(title="heads", sections=tuple(score_sections(found)), notes=found.notes)


@page_of.register
def _edit_effect(found: EditEffect) -> Page:
    return Page(
        title="what edits change", sections=tuple(edit_sections(found)), tokens=found.tokens
    )


@page_of.register
def _attribution(found: Attribution) -> Page:
    return Page(
        title="direct logit attribution",
        sections=tuple(attribution_sections(found)),
        notes=found.notes,
    )


@page_of.register
def _store(store: Store) -> Page:
    counts = store.manifest.counts
    return Page(
        title=store.folder.name,
        sections=tuple(store_sections(store)),
        facts={
            "model": store.manifest.model.model_class,
            "documents": f"{counts.documents:,}",
            "tokens": f"{counts.tokens:,}",
        },
        notes=tuple(store_sentences(store)),
    )


@page_of.register
def _tabular(found: Tabular) -> Page:
    """Any other result: its own table."""
    rows = found.table()
    names = list(rows[0]) if rows else []
    columns = tuple(Column(name.replace("_", " "), key=name, spell=_any) for name in names)
    values = tuple(tuple(_cell(row[name]) for name in names) for row in rows)
    table = Table(columns, values, title="table")
    return Page(title=type(found).__name__, sections=(Section("Table", (table,)),))


def _any(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> Any:
    plain = value is None or isinstance(value, str | int | float | bool)
    return value if plain else str(dict(value) if isinstance(value, Mapping) else value)
