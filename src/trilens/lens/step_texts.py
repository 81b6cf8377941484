"""Made-up texts on which the decoding steps of a model are measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trilens.lens.runner import Runner
from trilens.models.positions import configured_positions
from trilens.models.stack_probe import probe_of
from trilens.models.tokens import Prompt
from trilens.taps.mode import evaluating, forgetting

__all__ = ["StepTexts"]

_IDS, _TARGET_IDS = "input_ids", "decoder_input_ids"
_FEWEST = 2
"""Tokens of a text with a step in it."""
_MASK, _POSITIONS = "attention_mask", "position_ids"
_LIKE_THE_LAST = {_MASK, "token_type_ids", "cross_attention_mask", "image_attention_mask"}
"""What is said of the last token of a prompt is said of the new ones too."""
_ZERO = {"mm_token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask"}
"""New tokens are text."""


class StepTexts:
    """Texts as a stack reads them: alone, after what its model was proven on, or for a source.

    Attributes:
        runner: of the model.
        before: tokens that stand before each text.
        most: the most tokens of a text, None for any number.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        given = runner.probe or {}
        before = int(given[_IDS].shape[1]) if _IDS in given else 0
        positions = runner.max_positions or configured_positions(runner.model)
        # After a probe that fills the positions no text begins: it is measured without.
        fits = positions is None or positions - before >= _FEWEST
        self.before = before if fits else 0
        self.most = None if positions is None else positions - self.before
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
    """Inputs with more tokens after theirs, as transformers' loop goes on from them."""
    found = {name: _longer(name, value, given, ids) for name, value in given.items()}
    return {name: value for name, value in found.items() if value is not None}


def _longer(name: str, value: Any, given: Mapping[str, Any], ids: Tensor) -> Any:
    """One of them; None for one that says nothing of the tokens to come."""
    new = len(ids)
    if not isinstance(value, Tensor):
        return value
    if name == _IDS:
        return torch.cat([value, ids[None].to(value)], dim=1)
    if name == _MASK and value.dim() > 2:
        return None
    if name == _POSITIONS:
        next_positions = value[..., -1:] + torch.arange(1, new + 1).to(value)
        return torch.cat([value, next_positions], dim=-1)
    if name not in _LIKE_THE_LAST | _ZERO or value.shape[1] != given[_IDS].shape[1]:
        return value
    last = value[:, -1:] * (name in _LIKE_THE_LAST)
    return torch.cat([value, last.expand(-1, new, *last.shape[2:])], dim=1)
