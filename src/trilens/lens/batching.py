"""Which prompts run in one pass: those that one padded batch gives the same as passes of their own.

It is measured on the model: on made-up texts for prompts of tokens, on prompts of the caller's for
those that bring more than tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from transformers import PreTrainedModel

from trilens.io.short_memory import is_short_of_memory
from trilens.lens.capture import Capture
from trilens.models.batched_arguments import PAIR, TOKENS, batch_key, varying
from trilens.models.forward_call import probe_ids
from trilens.models.positions import configured_positions
from trilens.models.source_target import Reading
from trilens.models.tokens import Prompt
from trilens.text.source import Source

__all__ = ["Batching", "agree", "grouped"]

_PROBE_KINDS = 7


class Batching:
    """Which prompts of a model run together; measured once per doubling of length.

    Args:
        run: all residuals and logits of some prompts in one padded pass.
        model: the model.
        reading: the tokens that the stack and its encoder read.
    """

    def __init__(
        self,
        run: Callable[[list[Prompt]], list[Capture]],
        model: PreTrainedModel,
        reading: Reading,
    ) -> None:
        self._run = run
        self._model = model
        self._reading = reading
        self._safe = True
        self._checked = 0
        self._measured: dict[Hashable, bool] = {}

    def parts(self, group: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts in their order, in lists that run in one pass each."""
        for key, alike in groupby(group, key=batch_key):
            prompts = list(alike)
            if len(prompts) == 1 or (key is not None and self._together(key, prompts)):
                yield prompts
            else:
                yield from ([prompt] for prompt in prompts)

    def up_to(self, tokens: int) -> bool:
        """Whether padded rows of so many tokens, of a source too, equal single prompts."""
        longest = 1 << max(3, (tokens - 1).bit_length())
        longest = min(longest, max(self._most(longest)))
        if self._safe and longest > self._checked:
            probes = self._probes(sorted({longest, longest // 2 + 1, 3}, reverse=True))
            self._safe = self._equal(probes)
            self._checked = longest
        return self._safe

    def _together(self, key: Hashable, prompts: list[Prompt]) -> bool:
        lengths = {len(prompt.ids) for prompt in prompts}
        if key == TOKENS:
            return len(lengths) == 1 or self.up_to(max(lengths))
        if key == PAIR:
            sources = {len(prompt.source.tokens) for prompt in prompts if prompt.source}
            return len(lengths) == len(sources) == 1 or self.up_to(max(lengths | sources))
        # Rows that are alike show nothing of what a model makes of those that are not.
        differing = varying(prompts)
        place = key, (max(lengths) - 1).bit_length(), differing
        if place not in self._measured:
            try:
                self._measured[place] = self._equal(prompts if differing else prompts[:2])
            # Whether several fit in one pass is only known to the model.
            except Exception as error:  # noqa: BLE001
                if is_short_of_memory(error):
                    return False  # this time: it says nothing of the model
                self._measured[place] = False
        return self._measured[place]

    def _equal(self, prompts: list[Prompt]) -> bool:
        alone = [self._run([prompt])[0] for prompt in prompts]
        pairs = zip(self._run(prompts), alone, strict=True)
        return all(agree(a, b, self._model.dtype) for a, b in pairs)

    def _probes(self, lengths: list[int]) -> list[Prompt]:
        """Made-up prompts of these lengths; the longest has not the longest source."""
        # Few kinds of tokens: a sparse attention that breaks ties by place shows only there.
        rows = [self._ids(self._reading.vocab, min(self._most(n)[0], n), n) for n in lengths]
        if not self._reading.source_vocab:
            return [Prompt(row[0], tuple(map(str, row[0].tolist()))) for row in rows]
        return [self._pair(row, n) for row, n in zip(rows, lengths[1:] + lengths[:1], strict=True)]

    def _most(self, length: int) -> list[int]:
        """The most tokens of a text and, where it has one, of its source; else `length`."""
        text, source = configured_positions(self._model), self._reading.max_source_positions
        most = [text, source or text] if self._reading.source_vocab else [text]
        return [each or length for each in most]

    def _pair(self, target: torch.Tensor, length: int) -> Prompt:
        ids = self._ids(self._reading.source_vocab, min(self._most(length)[-1], length), length + 1)
        source = Source(tuple(map(str, ids[0].tolist())), ids[0])
        given = {"input_ids": ids, "decoder_input_ids": target}
        return Prompt(target[0], tuple(map(str, target[0].tolist())), None, given, source)

    def _ids(self, vocab: int, length: int, seed: int) -> torch.Tensor:
        return probe_ids(self._model, vocab, length, seed=seed, kinds=_PROBE_KINDS).cpu()


def grouped(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts in their order, so many at a time."""
    group: list[Prompt] = []
    for prompt in prompts:
        group.append(prompt)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def agree(a: Capture, b: Capture, dtype: torch.dtype) -> bool:
    """Whether logits and residuals are equal within 1e-5, or the rounding of the model's dtype."""
    pairs = [(a.logits, b.logits)]
    if a.has("residual") and b.has("residual"):
        pairs += [(a.residual[i], b.residual[i]) for i in a.residual]
    for ours, theirs in pairs:
        if ours is None or theirs is None:
            continue
        # PROMOTE: half-precision rows differ by their own rounding from batch to batch; a residual
        # that is kept in float32 holds what was computed in the model's dtype.
        eps = max(torch.finfo(dtype).eps, torch.finfo(ours.dtype).eps)
        tolerance = 1e-5 if eps == torch.finfo(torch.float32).eps else 8 * eps
        left, right = ours.double(), theirs.double()
        if float((left - right).abs().max()) > tolerance * max(1.0, float(right.abs().max())):
            return False
    return True
