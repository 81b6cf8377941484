"""`Calibration`: the text that calibrated rules look at, and the text the damage is measured on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from trilens.errors import TextError, UsageError, ValueRangeError
from trilens.numbers import at_least
from trilens.text.documents import read_documents
from trilens.text.token_blocks import token_blocks

__all__ = ["Calibration", "Drawn", "draw"]

_LEAST_TOKENS = 256
_LEAST_KINDS = 16
_EVALUATION_SHARE = 10  # of ten documents one is set aside where no evaluation text is given


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which text, how much of it, and what damage is too much.

    Attributes:
        documents: The texts; see `from_source`.
        evaluation: Texts to measure the damage on. Documents that are also among these are never
            calibrated on. Empty: every tenth document, by the seed, is set aside for it.
        tokens: How many tokens to calibrate on, at most.
        evaluation_tokens: How many to measure on, at most.
        length: Tokens of a block, at most; the model's own longest input where that is less.
        seed: What is drawn from the documents, and in which order.
        batch_size: Blocks that run together.
        max_perplexity_ratio: The largest ratio of perplexities that is written, or None for any.

    Raises:
        TextError: no document.
        UsageError: an option of a wrong kind.
        ValueRangeError: a number out of its range.
    """

    documents: tuple[str, ...]
    evaluation: tuple[str, ...] = ()
    tokens: int = 65_536
    evaluation_tokens: int = 16_384
    length: int = 512
    seed: int = 0
    batch_size: int = 8
    max_perplexity_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check every option."""
        given: tuple[tuple[str, Any], ...] = (
            ("documents", self.documents),
            ("evaluation", self.evaluation),
        )
        for name, texts in given:
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise UsageError(f"{name} of the calibration are no texts: pass a list of strings")
            object.__setattr__(self, name, tuple(texts))
        if not any(text.strip() for text in self.documents):
            raise TextError("calibration text is empty: give at least one document")
        least = {
            "tokens": _LEAST_TOKENS,
            "evaluation_tokens": 2,
            "length": 2,
            "seed": 0,
            "batch_size": 1,
        }
        for name, lowest in least.items():
            number = at_least(lowest, getattr(self, name), f"calibration {name}")
            object.__setattr__(self, name, number)  # NumPy's integers are none for JSON
        bound = self.max_perplexity_ratio
        if bound is not None and not (isinstance(bound, int | float) and bound > 0):
            raise ValueRangeError(
                f"max_perplexity_ratio is {bound!r}: a number above 0 is needed, such as 1.5"
            )

    @classmethod
    def from_source(
        cls, source: str | Path, *, evaluation: str | Path | None = None, **options: Any
    ) -> Self:
        """Read documents from files: text, JSONL, Parquet, a folder of these, or "stdlib".

        Args:
            source: see `analysis.text.read_documents`.
            evaluation: likewise, for the damage.
            options: as for the class.

        Raises:
            TextError: a source that is missing, unreadable or empty.
        """
        apart = () if evaluation is None else read_documents(evaluation)
        return cls(read_documents(source), apart, **options)

    def to_dict(self) -> dict[str, Any]:
        """What decides the result, in plain values: texts by their hash; no bound, no batches."""
        return {
            "documents_sha256": _digest(self.documents),
            "evaluation_sha256": _digest(self.evaluation),
            "tokens": self.tokens,
            "evaluation_tokens": self.evaluation_tokens,
            "length": self.length,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What was drawn from the documents.

    Shapes: each block int64 [seq], 2 ≤ seq ≤ length

    Attributes:
        blocks: To calibrate on, equal lengths together.
        evaluation: To measure the damage on.
        refused: Documents left out because they are also among the evaluation's.
    """

    blocks: tuple[Tensor, ...]
    evaluation: tuple[Tensor, ...]
    refused: int

    @property
    def n_tokens(self) -> int:
        """Tokens to calibrate on."""
        return sum(len(block) for block in self.blocks)


def draw(calibration: Calibration, tokenizer: Any, *, longest: int | None) -> Drawn:
    """Draw token blocks from the documents: the same seed gives the same blocks.

    Args:
        calibration: the texts and how much of them.
        tokenizer: the model's own.
        longest: the model's longest input, where it has one.

    Raises:
        TextError: too few tokens, tokens nearly all alike, or nothing left beside the evaluation.
        NoTokenizerError: the model came without a tokenizer.
    """
    length = min(calibration.length, longest or calibration.length)
    generator = torch.Generator().manual_seed(calibration.seed)
    apart = list(calibration.evaluation)
    texts = [text for text in calibration.documents if text.strip()]
    order = torch.randperm(len(texts), generator=generator).tolist()
    texts = [texts[i] for i in order]
    if not apart:
        if len(texts) < 2:
            texts = _halves(texts[0])
        n_apart = max(1, len(texts) // _EVALUATION_SHARE)
        apart, texts = texts[:n_apart], texts[n_apart:]
    held = {_normal(text) for text in apart}
    used = [text for text in texts if _normal(text) not in held]
    if not used:
        raise TextError(
            f"all {len(texts)} calibration documents are among those the damage is measured on: "
            "give other text for one of the two"
        )
    blocks = _chosen(tokenizer, used, length, calibration.tokens, generator)
    n_tokens = sum(len(block) for block in blocks)
    kinds = len(torch.unique(torch.cat(blocks)))
    if n_tokens < _LEAST_TOKENS:
        raise TextError(
            f"calibration text is too short: {n_tokens} tokens, at least {_LEAST_TOKENS} are needed"
        )
    if kinds < _LEAST_KINDS:
        raise TextError(
            f"calibration text holds {kinds} different tokens in {n_tokens}: at least "
            f"{_LEAST_KINDS} are needed; give text of the kind the model is for"
        )
    measured = _chosen(tokenizer, apart, length, calibration.evaluation_tokens, generator)
    return Drawn(blocks, measured, len(texts) - len(used))


def _chosen(
    tokenizer: Any, texts: Sequence[str], length: int, budget: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Blocks of full length first, drawn from all of the text; equal lengths stand together."""
    # Tokenizing a library for a few blocks would take longer than calibrating on them.
    found = token_blocks(tokenizer, texts, length=length, limit_tokens=max(4 * budget, 4 * length))
    order = torch.randperm(len(found), generator=generator).tolist()
    order.sort(key=lambda i: len(found[i]) < length)
    chosen: list[Tensor] = []
    left = budget
    for i in order:
        piece = found[i][:left]
        if len(piece) < 2:
            break
        chosen.append(piece)
        left -= len(piece)
    return tuple(sorted(chosen, key=len, reverse=True))


def _halves(text: str) -> list[str]:
    """One document is cut, so that the damage is measured on what calibration did not see."""
    lines = text.splitlines(keepends=True)
    if len(lines) >= _EVALUATION_SHARE:
        cut = len(lines) // _EVALUATION_SHARE
        return ["".join(lines[:cut]), "".join(lines[cut:])]
    cut = math.ceil(len(text) / _EVALUATION_SHARE)
    return [text[:cut], text[cut:]]


def _normal(text: str) -> str:
    """A text without what may change on the way between files: white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    return digest.hexdigest()
