"""Answers and batches of encoder–decoders, type by type, against independent paths.

A tiny model of each type of text and of sound. How far, in parts of the largest value,

- what decoding steps gave is from one pass over the whole target ("steps"),
- what a padded batch of four pairs gave is from passes of their own ("batch"),
- either is from what transformers returns of the same target under eager attention: its hidden
  states, its attention and its cross attention ("states", "attention", "cross").

    python -m benchmarks.pairs [TYPE ...]

All types: the result is kept; of some, their rows are printed.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save
from tinymodels import prompt_ids
from tinymodels.mappings import MAPPINGS, build_as
from trilens import Capture, Lens, SourceTarget
from trilens.errors import TrilensError
from trilens.models.source_target import Reading
from trilens.models.stack_probe import probe_of
from trilens.models.stacks import chosen_stack

LENGTHS = ((7, 9), (12, 4), (3, 13), (5, 2))
NEW = 7


def gap(ours: Any, theirs: Any) -> float:
    """The largest difference, in parts of the largest value."""
    left, right = (torch.as_tensor(each).double() for each in (ours, theirs))
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-30))


def between(ours: Capture, theirs: Capture) -> float:
    """The largest gap of logits, residuals and patterns."""
    gaps = [gap(ours.logits, theirs.logits)]
    gaps += [gap(ours.residual[i], theirs.residual[i]) for i in theirs.residual]
    for part in ("attention", "cross_attention"):
        if theirs.has(part):
            one, other = getattr(ours, part), getattr(theirs, part)
            gaps += [gap(one.pattern(i).dense(), other.pattern(i).dense()) for i in other.layers]
    return max(gaps)


@torch.no_grad()
def independent(model: Any, pair: SourceTarget, capture: Capture) -> Iterator[tuple[str, float]]:
    """What transformers returns of a pair beside what was captured of it."""
    source = pair.source if isinstance(pair.source, dict) else {"input_ids": pair.source[None]}
    asked = {"output_attentions": True, "output_hidden_states": True}
    try:
        plain = model(**source, decoder_input_ids=capture.token_ids[None], **asked)
    except (TypeError, ValueError):
        return
    states = getattr(plain, "decoder_hidden_states", None) or ()
    # The last of them has gone through the final norm.
    for layer, stream in enumerate(states[1:-1]):
        yield "states", gap(capture.residual[layer], stream[0])
    for key, part, name in (
        ("attention", "attention", "decoder_attentions"),
        ("cross", "cross_attention", "cross_attentions"),
    ):
        given = [each for each in getattr(plain, name, None) or () if isinstance(each, Tensor)]
        if capture.has(part) and len(given) == len(getattr(capture, part).layers):
            for layer, weights in zip(getattr(capture, part).layers, given, strict=True):
                yield key, gap(getattr(capture, part).pattern(layer).dense(), weights)


def measure(mapping: str, name: str) -> dict[str, Any] | None:
    """A row of one type; None where it has no decoder that answers a source."""
    model = build_as(mapping, name)
    try:
        lens = Lens(model)
    except TrilensError as error:
        return {"refused": str(error)}
    if not lens.reads_source:
        return None
    stack = chosen_stack(model, None)
    probe = probe_of(model, stack, Reading.of(model, stack)).arguments
    made = {k: v for k, v in probe.items() if isinstance(v, Tensor) and k != "decoder_input_ids"}

    def source(length: int) -> Any:
        if "input_ids" in made:
            return prompt_ids("", length, seed=length + 50)[0]
        generator = torch.Generator().manual_seed(length)
        return {k: torch.randn(v.shape, generator=generator) for k, v in made.items()}

    pairs = [SourceTarget(source(n), prompt_ids("", m, seed=m)[0]) for n, m in LENGTHS]
    options: dict[str, Any] = {"residual": "all", "attention": not lens.anatomy.other_attention}
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    row: dict[str, float] = {}

    def note(key: str, value: float) -> None:
        row[key] = max(value, row.get(key, 0.0))

    try:
        written = lens.generate(pairs[0], max_new_tokens=NEW, capture=options).capture
    except TrilensError as error:
        return {"refused": str(error)}
    assert written is not None
    whole = SourceTarget(pairs[0].source, written.token_ids)
    note("steps", between(written, lens.capture(whole, **options)))
    batch = list(lens.capture_many(pairs, batch_size=len(pairs), **options))
    for pair, found in zip(pairs, batch, strict=True):
        note("batch", between(found, lens.capture(pair, **options)))
    for pair, found in zip([whole, *pairs], [written, *batch], strict=True):
        for key, value in independent(eager, pair, found):
            note(key, value)
    return {key: float(f"{value:.2g}") for key, value in row.items()}


def main() -> int:
    """Measure, and keep."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    chosen, rows = sys.argv[1:], {}
    for mapping in ("seq2seq", "speech"):
        for name in MAPPINGS[mapping]:
            if chosen and name not in chosen:
                continue
            row = measure(mapping, name)
            if row is not None:
                rows[f"{mapping} {name}"] = row
                print(f"{mapping} {name}: {row}", flush=True)
    if not chosen:
        full = [row for row in rows.values() if "refused" not in row]
        worst = {key: max(row.get(key, 0.0) for row in full) for key in full[0]}
        save("pairs", {"types": len(full), "largest": worst, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
