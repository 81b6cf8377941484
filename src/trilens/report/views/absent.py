"""What a page does not show, and how to get it: a sentence for each view."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from trilens.analysis.lenses.logit_lens import LogitLens
from trilens.caches.activation import FullActivationCache
from trilens.caches.storage import spell_layers
from trilens.checkpoint.format.report import TernaryReport
from trilens.io.messages import listed
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.planning.sensitivity import Sensitivity
from trilens.report.views.capture import drawn_layers

__all__ = ["absent_matrices", "absent_parts", "absent_views"]


@dataclass(frozen=True, slots=True)
class _View:
    """A view, and what it needs: the part of a capture, its argument, its option."""

    title: str
    part: str
    argument: str
    option: str

    @property
    def how(self) -> str:
        return f"capture with {self.argument} (trilens capture {self.option})"


_VIEWS = (
    _View("next tokens", "logits", "logits='last'", "--logits last"),
    _View(
        "residual norms and logit lens", "residual", "residual='all'", "--residual all"
    ),
    _View("attention", "attention", "attention=True", "--attention"),
    _View(
        "effective attention of recurrent layers", "effective", "effective=True", "--effective"
    ),
    _View("gates", "gates", "gates=True", "--gates"),
    _View("recurrent states", "states", "states=True", "--states"),
)  # fmt: skip


def absent_views(
    capture: Capture, lens: Lens | None, found: LogitLens | None, shown: Collection[str]
) -> list[str]:
    """A sentence for each view that is not there, or not whole, and could be.

    Args:
        capture: what the page is of.
        lens: the model, where it is there: of what it has not, nothing is said.
        found: its logit lens, where there is one.
        shown: parts that have a view on the page.
    """
    notes = [
        f"no {view.title}: {view.how}"
        for view in _VIEWS
        if not _holds(capture, view.part) and _may_have(view.part, capture, lens)
    ]
    return [*notes, *_partly(capture, lens, found), *_undrawn(capture, shown)]


def absent_parts(report: TernaryReport) -> list[str]:
    """Likewise of a ternary report: what was not measured, or is in no file."""
    notes = []
    if report.coded and report.damage is None and not report.dry_run:
        notes.append(
            "no output errors: they are measured with a calibration (calibration=Calibration(…), "
            "trilens ternarize --calibrate TEXT)"
        )
    if report.coded and all(tensor.histogram is None for tensor in report.coded):
        why = "a dry run sees no weights" if report.dry_run else "files hold none"
        notes.append(
            f"no scales and no weights by level: {why}; they are in the report of the run that "
            "writes (trilens ternarize --report FILE.html)"
        )
    return notes


def absent_matrices(found: Sensitivity) -> list[str]:
    """Likewise of a sensitivity: which parts were not measured alone, and predictions."""
    notes = []
    if not found.of("matrix"):
        notes.append(
            "no matrices alone: measure with each_matrix=True (trilens sensitivity --each-matrix)"
        )
    if all(row.predicted_kl_nats is None for row in found.rows):
        notes.append("no predictions beside what was measured: measure with predict=True")
    return notes


def _may_have(part: str, capture: Capture, lens: Lens | None) -> bool:
    """Whether a model has a part; without it: a recurrence has what attention has not."""
    if lens is not None:
        layers = {
            "logits": lens.anatomy.unembedding,
            "attention": lens.anatomy.attention,
            "effective": lens.effective_layers,
            "states": lens.state_layers,
            "gates": lens.gate_layers,
        }
        return part not in layers or bool(layers[part])
    other = {"attention": "effective", "effective": "attention", "states": "attention"}
    return part not in other or not _holds(capture, other[part])


def _holds(capture: Capture, part: str) -> bool:
    """Whether it was captured: attention that answers for the effective attention was not."""
    if part != "attention" or not capture.has(part):
        return capture.has(part)
    return any(not capture.shares_pattern(layer) for layer in capture.attention.layers)


def _partly(capture: Capture, lens: Lens | None, found: LogitLens | None) -> list[str]:
    """Views that are there for some tokens alone, or lack the model."""
    residual, notes = capture.parts.residual, []
    alone = residual is not None and not isinstance(residual, FullActivationCache)
    if alone and len(capture.tokens) > 1:
        view = next(each for each in _VIEWS if each.part == "residual")
        notes.append(f"{view.title} of the last token alone: for every token, {view.how}")
    if lens is None:
        notes.append(
            "no logit lens: it needs the model, too: trilens.make_report(capture, lens=lens), or "
            "trilens inspect MODEL -p PROMPT -o report.html"
        )
    elif not lens.anatomy.unembedding:
        notes.append("no logit lens: this model has no unembedding")
    elif found is not None and found.kl_nats is None:
        last = capture.model.n_layers - 1
        notes.append(
            f"no KL from the last layer: the capture lacks layer {last}; capture without layers= "
            "(trilens capture without --layers)"
        )
    return notes


def _undrawn(capture: Capture, shown: Collection[str]) -> list[str]:
    """Parts that were captured, and have no view."""
    notes = []
    for part in ("attention", "effective"):
        if capture.has(part):
            cache = getattr(capture, part)
            drawn = drawn_layers(capture, part)
            rest = [i for i in cache.layers if i not in drawn and not capture.shares_pattern(i)]
            if rest:
                notes.append(
                    f"{part} of {spell_layers(rest)} is not drawn: queries and keys are not the "
                    f"prompt's tokens; ask cap.{part} for its weights"
                )
    if capture.has("gates") and "gates" not in shown:
        notes.append(
            f"no view of {listed(capture.gates.names)}: these gates have no openness; ask "
            "cap.gates.get(name, layer) for their values"
        )
    notes += [
        f"{part.replace('_', ' ')}: captured and not drawn; ask cap.{part} for the values"
        for part in ("sites", "cross_attention")
        if capture.has(part)
    ]
    return notes
