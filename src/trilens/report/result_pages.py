"""Pages of results, by their kind."""

from __future__ import annotations

from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.series import ComparisonSeries
from trilens.analysis.direct_attribution import Attribution
from trilens.analysis.edit_effects import EditEffect
from trilens.analysis.effect_sweep import EffectSweep
from trilens.analysis.heads import HeadScores
from trilens.analysis.inspection import Inspection
from trilens.analysis.lenses.logit_lens import LogitLens
from trilens.analysis.patch_result import PatchSweep
from trilens.caches.gates import GateCache
from trilens.checkpoint.format.report import TernaryReport
from trilens.checkpoint.gguf.report import GgufReport
from trilens.corpus.store import Store
from trilens.errors import UsageError
from trilens.lens.parts import ModelInfo
from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity
from trilens.report.dispatch import page_of, short_name
from trilens.report.page import Page, Section
from trilens.report.text.comparison import comparison_sentence, counted
from trilens.report.text.store import store_sentences
from trilens.report.views.absent import absent_matrices, absent_parts
from trilens.report.views.capture import lens_section
from trilens.report.views.changes import comparison_sections, series_sections, what_broke_first
from trilens.report.views.edits import edit_sections
from trilens.report.views.gates import gate_section
from trilens.report.views.heads import score_sections
from trilens.report.views.inspection import inspection_blocks
from trilens.report.views.plain import plain_table
from trilens.report.views.planning import plan_sentence, sensitivity_title
from trilens.report.views.store import store_sections
from trilens.report.views.sweeps import attribution_sections, effect_sections, patch_sections
from trilens.report.views.ternary import gguf_sentence, ternary_sentence
from trilens.report.views.weights import (
    gguf_sections,
    plan_sections,
    sensitivity_sections,
    ternary_sections,
)
from trilens.results import Tabular

__all__: list[str] = []


@page_of.register
def _inspection(found: Inspection) -> Page:
    return Page(
        title=found.model or found.model_class,
        sections=(Section("Layer by layer", inspection_blocks(found), name="layers"),),
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
        title=f"{short_name(before.name) or before.model_class} → "
        f"{short_name(after.name) or after.model_class}",
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
    name = short_name(model.name)
    words = f"{model.model_class} · {model.n_layers} layers · {model.dtype}"
    return f"{name} · {words}" if name else words


@page_of.register
def _series(found: ComparisonSeries) -> Page:
    first = found.comparisons[0]
    notes = dict.fromkeys(note for each in found.comparisons for note in each.notes)
    return Page(
        title=f"{len(found.comparisons)} checkpoints against {short_name(first.before.name)}",
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
        notes=tuple(absent_parts(report)),
    )


@page_of.register
def _gguf(report: GgufReport) -> Page:
    return Page(
        title="GGUF file", sections=tuple(gguf_sections(report)), lead=gguf_sentence(report)
    )


@page_of.register
def _sensitivity(found: Sensitivity) -> Page:
    return Page(
        title="sensitivity to ternary weights",
        sections=tuple(sensitivity_sections(found)),
        lead=sensitivity_title(found),
        notes=(
            *absent_matrices(found),
            f"weights restored, SHA-256 {found.checksum[:16]}…",
        ),
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
    section = Section("Table", (plain_table(found),))
    return Page(title=type(found).__name__, sections=(section,))
