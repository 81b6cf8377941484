"""Made-up texts on which the decoding steps of a model are measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trilens.lens.runner import Runner
from trilens.models.stack_probe import probe_of
from trilens.models.tokens import Prompt
from trilens.taps.mode import evaluating, forgetting

__all__ = ["StepTexts"]

_IDS, _TARGET_IDS = "input_ids", "decoder_input_ids"


class StepTexts:
    """Texts as a stack reads them: alone, after what its model was proven on, or for a source.

    Attributes:
        runner: of the model.
        before: tokens that stand before each text.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        given = runner.probe or {}
        self.before = int(given[_IDS].shape[1]) if _IDS in given else 0
        self._source: dict[str, Any] | None = None

    def of(self, ids: Tensor) -> Prompt:
        """A text of these ids [seq]."""
        if self.runner.stack.has_source:
            return Prompt(ids, (), None, {**self._made_source(), _TARGET_IDS: ids[None]})
        if self.before and self.runner.probe is not None:
            given = _grown(self.runner.probe, ids)
            return Prompt(given[_IDS][0].cpu(), (), None, given)
        return Prompt(ids, ())

    def _made_source(self) -> dict[str, Any]:
        """Made once: which shapes an encoder takes is tried."""
        if self._source is None:
            runner, model = self.runner, self.runner.model
            # As every pass of the model: dropout would draw, and running statistics would move.
            with evaluating(model), forgetting(model), torch.inference_mode(False):
                made = probe_of(model, runner.stack, runner.reading).arguments
            self._source = {name: x for name, x in made.items() if isinstance(x, Tensor)}
        return self._source


def _grown(given: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """Inputs with more tokens after theirs; what is said of their last is said of these too."""
    seq = given[_IDS].shape[1]

    def longer(name: str, value: Any) -> Any:
        if name == _IDS:
            return torch.cat([value, ids[None].to(value)], dim=1)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != seq:
            return value
        last = value[:, -1:]
        return torch.cat([value, last.expand(-1, len(ids), *last.shape[2:])], dim=1)

    return {name: longer(name, value) for name, value in given.items()}
