"""A capture that lacks what a view needs: its report says what to capture; that then shows it."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import tinymodels
import trilens
from page_cases import Parsed
from trilens.cli.commands.capture import capture as capture_command
from trilens.report.html.report import make_report

PROMPT = "def area(r):\n    return r"
WHOLE = {
    "residual": "all",
    "logits": "last",
    "attention": True,
    "effective": True,
    "gates": True,
    "states": True,
}
NONE = {"residual": None, "logits": None}
SECTIONS = {
    "logits": "next",
    "residual": "logit-lens",
    "attention": "heads-softmax",
    "effective": "heads-effective",
    "gates": "gates",
    "states": "states",
}


@pytest.fixture(scope="module")
def hybrid():
    """A model with softmax attention, a recurrence, and gates of both."""
    return trilens.Lens(tinymodels.build("falcon_h1"))


@pytest.fixture(scope="module")
def ids():
    return tinymodels.prompt_ids("falcon_h1", 12)


def anchors(report) -> set[str]:
    return {section.anchor for section in report.page.sections}


@pytest.mark.parametrize("part", SECTIONS)
@pytest.mark.parametrize("with_lens", [True, False])
def test_each_view_says_how_it_is_captured_and_then_is_there(
    hybrid, ids, part: str, with_lens: bool
) -> None:
    lens = hybrid if with_lens else None
    asked = {**WHOLE, part: NONE.get(part, False)}
    report = make_report(hybrid.capture(ids, **asked), lens=lens)
    section = SECTIONS[part] if with_lens or part != "residual" else "layers"
    own = [note for note in report.page.notes if f"capture with {part}=" in note]
    if with_lens or part not in ("effective", "attention", "states"):
        (note,) = own
    else:  # whether the model has it is not known
        assert len(own) <= 1
        return
    # It stands on the page, and what it says is a call and an option that there are.
    assert note in "".join(Parsed(report.html).text)
    argument, option = re.search(r"with (\w+=\S+) \(trilens capture (--\w+)", note).groups()
    name = option.removeprefix("--")
    assert name in inspect.signature(capture_command).parameters
    if section != "layers":
        assert section not in anchors(report)
    again = {**asked, **eval(f"dict({argument})")}
    whole = make_report(hybrid.capture(ids, **again), lens=lens)
    assert section in anchors(whole)
    assert not [each for each in whole.page.notes if f"capture with {part}=" in each]


def test_a_whole_capture_lacks_nothing(hybrid, ids) -> None:
    assert make_report(hybrid.capture(ids, **WHOLE), lens=hybrid).page.notes == ()


def test_views_of_some_tokens_or_without_the_model() -> None:
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    cap = lens.capture(PROMPT, residual="last", attention=True, gates=True)
    (note,) = make_report(cap, lens=lens).page.notes
    assert "of the last token alone" in note and "residual='all'" in note
    (_, note) = make_report(cap).page.notes
    assert "make_report(capture, lens=lens)" in note and "trilens inspect MODEL" in note
    cap = lens.capture(PROMPT, residual="all", attention=True, gates=True, layers=[0, 1])
    (note,) = make_report(cap, lens=lens).page.notes
    assert "lacks layer 3" in note and "without --layers" in note


def test_what_is_captured_and_not_drawn_is_said() -> None:
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    cap = lens.capture(PROMPT, residual="all", attention=True, gates=True, sites=["resid_mid"])
    (note,) = make_report(cap, lens=lens).page.notes
    assert note == "sites: captured and not drawn; ask cap.sites for the values"


def test_reports_of_weights_say_what_was_not_measured(tmp_path) -> None:
    model = trilens.demo_path("transformer")
    plan = trilens.TernaryPlan(rule="absmean", group_size=128)
    written = trilens.ternarize(model, tmp_path / "ternary", plan=plan)
    (note,) = make_report(written).page.notes
    assert note.startswith("no output errors:") and "--calibrate" in note
    _, note = make_report(type(written).from_dict(written.to_dict())).page.notes
    assert "no scales and no weights by level: files hold none" in note and "--report" in note
    (note,) = make_report(trilens.ternarize(model, tmp_path / "x", dry_run=True)).page.notes
    assert "a dry run sees no weights" in note

    lens = trilens.Lens(tinymodels.build("llama"))
    blocks = [torch.arange(20) % 50]
    found = trilens.measure_sensitivity(lens, blocks, predict=False)
    first, second, _ = make_report(found).page.notes
    assert "each_matrix=True (trilens sensitivity --each-matrix)" in first
    assert "predict=True" in second
    whole = trilens.measure_sensitivity(lens, blocks, each_matrix=True)
    assert len(make_report(whole).page.notes) == 1


def test_nothing_is_said_of_what_a_model_has_not() -> None:
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    notes = make_report(lens.capture(PROMPT, residual=None), lens=lens).page.notes
    assert not [note for note in notes if "recurrent" in note or "effective" in note]
    assert len(notes) == 3  # residual, attention, gates
