"""How much worse a text is predicted once the weights are ternary: measured, not predicted."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from trilens.checkpoint.format.sample import SampleReport
from trilens.errors import GenerationError, NonFiniteError, TextError, UsageError
from trilens.evaluation.continuations import (
    Continuations,
    compare_continuations,
    continuations,
)
from trilens.evaluation.loop import logits_of
from trilens.evaluation.output import OutputAccumulator
from trilens.evaluation.perplexity import measure_perplexity
from trilens.io.paths import as_path
from trilens.models.auto_classes import is_built_for
from trilens.models.loading import load
from trilens.models.positions import configured_positions, max_positions_of
from trilens.printable import as_unicode
from trilens.text.documents import read_documents
from trilens.text.token_blocks import batches_by_length, token_blocks

__all__ = [
    "FEWEST_TOKENS",
    "NEW_TOKENS",
    "PROMPT_TOKENS",
    "Blocks",
    "Sample",
    "blocks_of",
    "compare_checkpoints",
    "compare_freely",
    "compare_on",
    "free_prompts",
    "read_samples",
]

FEWEST_TOKENS = 128
"""Predicted tokens below which a perplexity says more about the text than about the model."""

PROMPT_TOKENS = 32
"""Of a block, from which a model goes on freely."""

_LENGTH = 512
_LIMIT_TOKENS = 1 << 14
_BATCH = 8
_PROMPTS = 8
NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Sample:
    """A text to measure on.

    Attributes:
        name: What reports call it.
        documents: Its documents; no token is predicted across two of them.
    """

    name: str
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", as_unicode(self.name))

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Self:
        """Read a text file, JSONL, Parquet, a folder of them, or the word "stdlib".

        Raises:
            TextError: nothing is there, it is no text, or it is empty.
        """
        return cls(as_path(source, "text").name, read_documents(source))

    @property
    def sha256(self) -> str:
        """Hash of name and documents: another sample is another order."""
        digest = hashlib.sha256(self.name.encode())
        for document in self.documents:
            digest.update(hashlib.sha256(document.encode()).digest())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A sample as a model reads it.

    Attributes:
        name: The sample's name.
        blocks: int64 [≤ 512] each.
    """

    name: str
    blocks: tuple[Tensor, ...]

    @property
    def prompts(self) -> list[Tensor]:
        """Beginnings of its blocks, to go on from."""
        return [block[:PROMPT_TOKENS] for block in self.blocks if len(block) > PROMPT_TOKENS]


def read_samples(
    samples: Sequence[Sample], folder: Path, *, tokenizer: Any = None
) -> tuple[Blocks, ...]:
    """Read texts as a model does, and refuse what it cannot be measured on.

    Args:
        samples: the texts; of a long one the first 16,384 tokens.
        folder: the model's directory.
        tokenizer: goes before its own.

    Raises:
        TextError: fewer than `FEWEST_TOKENS` predicted tokens.
        NoTokenizerError: the model has no tokenizer.
        UsageError: it is no causal language model, or two texts have one name.
        NonFiniteError: it gives NaN or infinities on the first block of a text.
        LoadError: it cannot be loaded; see `models.loading.load`.

    Memory: the model, and the logits of a block.
    """
    names = [sample.name for sample in samples]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two evaluation texts are called {twice!r}: give each its own name")
    loaded = load(folder)
    model: Any = loaded.model
    tokenizer = loaded.tokenizer if tokenizer is None else tokenizer
    return tuple(blocks_of(model, sample, tokenizer) for sample in samples)


def blocks_of(
    model: Any, sample: Sample, tokenizer: Any, *, limit_tokens: int = _LIMIT_TOKENS
) -> Blocks:
    """A text as a loaded model reads it; as `read_samples`."""
    if is_built_for("masked", model) or _headless(model):
        raise UsageError(
            f"sample {sample.name!r} cannot be measured: {type(model).__name__} is no causal "
            "language model; leave the sample out"
        )
    longest = configured_positions(model)
    length = min(_LENGTH, longest) if longest is not None and longest > 1 else _LENGTH
    blocks = token_blocks(tokenizer, sample.documents, length=length, limit_tokens=limit_tokens)
    n_tokens = sum(len(block) - 1 for block in blocks)
    if n_tokens < FEWEST_TOKENS:
        raise TextError(
            f"sample {sample.name!r} is too short: it gives {n_tokens} predicted tokens, at "
            f"least {FEWEST_TOKENS} are needed; give a longer text"
        )
    measure_perplexity(model, blocks[:1])
    return Blocks(sample.name, blocks)


def compare_on(before: Any, after: Any, text: Blocks) -> SampleReport:
    """What a text says about two models with the same tokens.

    A model after that gives NaN or infinities has perplexity ∞: that is a finding, no failure.

    Raises:
        NonFiniteError: the model before gives them.

    Memory: the logits of 8 blocks, of both.
    """
    batches = list(batches_by_length(text.blocks, batch_size=_BATCH))
    longest = max(map(len, text.blocks))
    found = OutputAccumulator()
    try:
        pairs = zip(logits_of(before, batches), logits_of(after, batches), strict=True)
        for (ids, one), (_, other) in pairs:
            for row in zip(one, other, ids, strict=True):
                found.add(*row)
    except NonFiniteError:
        own = measure_perplexity(before, text.blocks)
        return SampleReport(
            text.name, own.n_tokens, _rounded(own.value), math.inf, longest, kl_nats=math.inf
        )
    result = found.result()
    assert result.perplexity_before is not None and result.perplexity_after is not None
    return SampleReport(
        text.name,
        result.n_tokens,
        _rounded(result.perplexity_before),
        _rounded(result.perplexity_after),
        longest,
        kl_nats=_rounded(result.kl_nats_mean),
        same_top1=_rounded(result.same_top1),
        continuations=compare_freely(before, after, text.prompts),
    )


def compare_freely(before: Any, after: Any, prompts: Sequence[Tensor]) -> Continuations | None:
    """What two models greedily go on with; None without prompts, or where they do not generate."""
    chosen, new = free_prompts(before, prompts)
    if not chosen or not _generates(after):
        return None
    try:
        written = [continuations(model, chosen, new=new) for model in (before, after)]
    except GenerationError:
        return None
    found = compare_continuations(*written)
    return replace(found, agreement=_rounded(found.agreement))


def free_prompts(model: Any, prompts: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Prompts that a model goes on from, and by how many tokens; none where it writes nothing."""
    chosen = list(prompts)[:_PROMPTS]
    if not chosen or not _generates(model):
        return [], 0
    longest = max_positions_of(model)
    room = NEW_TOKENS if longest is None else longest - max(map(len, chosen))
    return (chosen, min(NEW_TOKENS, room)) if room > 0 else ([], 0)


def _generates(model: Any) -> bool:
    return hasattr(model, "generate") and bool(model.can_generate())


def compare_checkpoints(
    texts: Sequence[Blocks], before: Path, after: Path
) -> tuple[SampleReport, ...]:
    """What texts say about two checkpoints.

    Memory: both models, and the logits of 8 blocks of both.
    """
    one, other = load(before).model, load(after).model
    return tuple(compare_on(one, other, text) for text in texts)


def _headless(model: Any) -> bool:
    try:
        return model.get_output_embeddings() is None
    except (AttributeError, NotImplementedError):
        return True


def _rounded(value: float) -> float:
    """Six digits: what comes after depends on the number of threads, and resuming must not."""
    return float(f"{value:.6g}")
