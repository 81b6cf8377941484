"""What a run is: a prompt, captured with its edits and without, and the text that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trilens.analysis.edit_effects import effect_between
from trilens.analysis.whole_capture import whole_capture
from trilens.edits import Edit
from trilens.errors import GenerationError, PromptTooLongError
from trilens.explorer.state import State
from trilens.lens.capture import Capture
from trilens.lens.generation import Generation
from trilens.lens.lens import Lens
from trilens.lens.parts import Parts
from trilens.models.tokens import token_ids_of, vocab_size_of
from trilens.progress import Progress, Step
from trilens.report.making import capture_page
from trilens.report.page import Page
from trilens.report.views.edits import edit_sections
from trilens.taps.watching import watched

__all__ = ["MAX_PROMPT_TOKENS", "Explored", "Explorer", "Written"]

MAX_PROMPT_TOKENS = 2048
"""The logits of every token are held, of the run with edits and of the one without."""

Piece = Callable[[str, str], None]
_NAMES = ("without edits", "with edits")


@dataclass(frozen=True, slots=True)
class Written:
    """The text that a model goes on with.

    Attributes:
        name: "without edits", or "with edits".
        text: of the new tokens.
        same: characters at its beginning that it shares with the text without edits.
    """

    name: str
    text: str
    same: int


@dataclass(frozen=True, slots=True)
class Explored:
    """What a run found.

    Attributes:
        page: the report of the capture, with the edits.
        written: the texts, that without edits first; none where the model does not generate.
    """

    page: Page
    written: tuple[Written, ...]


@dataclass(frozen=True, slots=True)
class _Plain:
    capture: Capture
    written: Generation | str  # or why there is none


class Explorer:
    """A model that is loaded once, and what was run last without edits.

    Args:
        lens: the model.
        name: what pages call it.
    """

    def __init__(self, lens: Lens, name: str) -> None:
        self.lens = lens
        self.name = name
        self._plain: tuple[tuple[str, int], _Plain] | None = None

    def explore(self, state: State, report: Progress, piece: Piece) -> Explored:
        """Run a state.

        Args:
            state: what to run; what of it is looked at changes nothing.
            report: called before each block of each pass; what it raises ends the run.
            piece: called with the name of a text and each new piece of it.

        Raises:
            TrilensError: as `Lens.capture`; an edit that can't be read.
            PromptTooLongError: more than `MAX_PROMPT_TOKENS`.
        """
        edits = state.read_edits()
        self._check_length(state.prompt)
        steps = _Steps(report, 4 if edits else 2, self.lens.n_layers)
        blocks = [block.module for block in self.lens.anatomy.blocks]
        with watched(blocks, steps.inside):
            # First: an edit that does not fit should not cost the time of a run without it.
            steps.stage("capturing with the edits" if edits else "capturing", 1)
            capture, notes = whole_capture(self.lens, state.prompt, edits=edits)
            if edits:
                plain = self._unedited(state, steps, piece)
            written = self._write(state, edits, steps, _NAMES[bool(edits)], piece)
            if not edits:
                plain = self._keep(state, capture, written)
            steps.drawing()
            page = capture_page(capture, lens=self.lens)
        if isinstance(written, str):
            notes.append(written)
        if edits and capture.logits is not None:
            effect = effect_between(self.lens, plain.capture, capture, edits)
            page = replace(page, sections=(*edit_sections(effect), *page.sections))
        page = replace(
            page,
            title=self.name,
            notes=(*notes, *(f"edited: {edit}" for edit in edits)),
        )
        texts = [plain.written, *([written] if edits else [])]
        return Explored(page, _texts([each for each in texts if isinstance(each, Generation)]))

    def _check_length(self, prompt: str) -> None:
        ids = token_ids_of(
            prompt, tokenizer=self.lens.tokenizer, vocab_size=vocab_size_of(self.lens.model)
        )
        if len(ids) > MAX_PROMPT_TOKENS:
            raise PromptTooLongError(
                f"prompt has {len(ids)} tokens: the explorer takes at most {MAX_PROMPT_TOKENS}; "
                "use trilens inspect for a long text"
            )

    def _unedited(self, state: State, steps: _Steps, piece: Piece) -> _Plain:
        """The run without edits; that of the last prompt is still there."""
        if self._plain is not None and self._plain[0] == (state.prompt, state.new):
            steps.skip(2)
            found = self._plain[1]
            if isinstance(found.written, Generation):
                piece(_NAMES[0], found.written.text)
            return found
        steps.stage("capturing without edits", 1)
        capture = self.lens.capture(state.prompt, residual=None)
        return self._keep(state, capture, self._write(state, (), steps, _NAMES[0], piece))

    def _keep(self, state: State, capture: Capture, written: Generation | str) -> _Plain:
        # Logits alone: all else of a capture is as large again.
        small = replace(capture, parts=Parts(logits=capture.logits))
        found = _Plain(small, written)
        self._plain = (state.prompt, state.new), found
        return found

    def _write(
        self, state: State, edits: tuple[Edit, ...], steps: _Steps, name: str, piece: Piece
    ) -> Generation | str:
        steps.stage(f"writing {name}", max(state.new, 1))
        if not state.new:
            return "no text: no new tokens were asked for"

        def told(text: str, _token: int) -> None:
            steps.check()
            piece(name, text)

        try:
            return self.lens.generate(
                state.prompt, max_new_tokens=state.new, edits=edits, stream=told
            )
        except GenerationError as error:
            return f"no text: {error}"


class _Steps:
    """Where a run stands, in passes through all blocks."""

    def __init__(self, report: Progress, stages: int, layers: int) -> None:
        self._report, self._stages, self._layers = report, stages, layers
        self._stage, self._blocks, self._passes, self._what = -1, 0, 1, ""

    def stage(self, what: str, passes: int) -> None:
        """A new stage of so many passes, about."""
        self._stage, self._blocks, self._passes, self._what = self._stage + 1, 0, passes, what
        self.check()

    def skip(self, stages: int) -> None:
        """Stages that are there already."""
        self._stage += stages

    def inside(self) -> None:
        """A block is about to run."""
        self._blocks += 1
        self.check()

    def drawing(self) -> None:
        """The passes are done."""
        self._stage, self._blocks, self._what = self._stages - 1, 10**9, "drawing the report"
        self.check()

    def check(self) -> None:
        """Report; raises where the run is to end."""
        share = min(1.0, self._blocks / (self._layers * self._passes))
        done = round(100 * (self._stage + share))
        layer = (self._blocks - 1) % self._layers
        inside = 0 < self._blocks < 10**9
        what = f"{self._what}: layer {layer}" if inside else self._what
        self._report(Step(done, 100 * self._stages, what))


def _texts(found: list[Generation]) -> tuple[Written, ...]:
    first = found[0].text if found else ""
    return tuple(
        Written(name, each.text, _shared(first, each.text))
        for name, each in zip(_NAMES, found, strict=False)
    )


def _shared(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    differ = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(differ, min(len(one), len(other)))
