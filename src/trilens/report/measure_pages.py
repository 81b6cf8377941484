"""Pages of measures: a gate's units, alignments, tuned lenses, evaluations, sweeps of types."""

from __future__ import annotations

from trilens.analysis.lenses.tuned_lens import TunedLens
from trilens.analysis.model_evaluation import ModelEvaluation
from trilens.analysis.path_patching import PathPatch
from trilens.checkpoint.calibration.cost import CalibrationCost
from trilens.errors import UsageError
from trilens.models.families import FamilyTable
from trilens.models.mappings import MappingTable
from trilens.report.dispatch import page_of
from trilens.report.page import Page
from trilens.report.views.measures import (
    alignment_sections,
    cost_sections,
    evaluation_sections,
    family_sections,
    gating_sections,
    mapping_sections,
    path_sections,
    tuned_lens_sections,
)
from trilens.statistics.gating import GatingStatistics
from trilens.text.alignment import Alignment

__all__: list[str] = []


@page_of.register
def _gating(found: GatingStatistics) -> Page:
    return Page(
        title="gate",
        sections=tuple(gating_sections(found)),
        facts={
            "units": f"{found.n_units:,}",
            "dead": f"{len(found.dead_gates):,}",
            "saturated": f"{len(found.saturated_gates):,}",
            "effective capacity": f"{found.effective_capacity():.1%}",
        },
    )


@page_of.register
def _alignment(found: Alignment) -> Page:
    return Page(title="alignment", sections=tuple(alignment_sections(found)), tokens=found.tokens)


@page_of.register
def _tuned_lens(found: TunedLens) -> Page:
    return Page(
        title="tuned lens",
        sections=tuple(tuned_lens_sections(found)),
        facts={"class": found.model.model_class, "ridge": f"{found.ridge:g}"},
    )


@page_of.register
def _path(found: PathPatch) -> Page:
    return Page(
        title="path patching",
        sections=tuple(path_sections(found)),
        lead=f"The path carries {found.effect:.1%} of the difference between the two runs.",
    )


@page_of.register
def _evaluation(found: ModelEvaluation) -> Page:
    sections = tuple(evaluation_sections(found))
    if not sections:
        raise UsageError("this evaluation has no text and no task: there is nothing to show")
    against = {} if found.against is None else {"beside": found.against}
    return Page(title=found.model, sections=sections, facts=against)


@page_of.register
def _families(found: FamilyTable) -> Page:
    return Page(
        title="types of models",
        sections=tuple(family_sections(found)),
        facts={"transformers": found.transformers, "torch": found.torch},
    )


@page_of.register
def _mappings(found: MappingTable) -> Page:
    return Page(
        title="types of models, by mapping",
        sections=tuple(mapping_sections(found)),
        facts={"transformers": found.transformers, "torch": found.torch},
    )


@page_of.register
def _cost(found: CalibrationCost) -> Page:
    return Page(title="calibration", sections=tuple(cost_sections(found)), lead=found.sentence)
