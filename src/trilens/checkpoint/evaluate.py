"""How much worse a text is predicted once the weights are ternary: measured, not predicted."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from trilens.checkpoint.format.report import SampleReport
from trilens.errors import NonFiniteError, TextError, UsageError
from trilens.evaluation.perplexity import measure_perplexity
from trilens.io.paths import as_path
from trilens.models.loading import load
from trilens.models.positions import configured_positions
from trilens.printable import as_unicode
from trilens.text.documents import read_documents
from trilens.text.token_blocks import token_blocks

__all__ = ["FEWEST_TOKENS", "Baseline", "Sample"]

FEWEST_TOKENS = 128
"""Predicted tokens below which a perplexity says more about the text than about the model."""

_LENGTH = 512
_LIMIT_TOKENS = 1 << 14


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


@dataclass(frozen=True, slots=True)
class Baseline:
    """The source model on a sample, and the blocks that the ternary one is measured on.

    Attributes:
        name: The sample's name.
        blocks: int64 [≤ 512] each.
        perplexity: The source's.
        n_tokens: Predicted tokens.
    """

    name: str
    blocks: tuple[Tensor, ...]
    perplexity: float
    n_tokens: int

    @classmethod
    def of(cls, sample: Sample, folder: Path, *, tokenizer: Any = None) -> Self:
        """Measure the source.

        Args:
            sample: the text; of a long one the first 16,384 tokens.
            folder: the source's directory.
            tokenizer: goes before the source's own.

        Raises:
            TextError: fewer than `FEWEST_TOKENS` predicted tokens.
            NoTokenizerError: the source has no tokenizer.
            UsageError: the source is no causal language model.
            NonFiniteError: the source itself gives NaN or infinities.
            LoadError: it cannot be loaded; see `models.loading.load`.

        Memory: the model, and the logits of 8 blocks.
        """
        loaded = load(folder)
        model: Any = loaded.model
        if type(model) in MODEL_FOR_MASKED_LM_MAPPING.values() or _headless(model):
            raise UsageError(
                f"sample {sample.name!r} cannot be measured: {type(model).__name__} is no causal "
                "language model; leave the sample out"
            )
        longest = configured_positions(model)
        length = min(_LENGTH, longest) if longest is not None and longest > 1 else _LENGTH
        blocks = token_blocks(
            loaded.tokenizer if tokenizer is None else tokenizer,
            sample.documents,
            length=length,
            limit_tokens=_LIMIT_TOKENS,
        )
        n_tokens = sum(len(block) - 1 for block in blocks)
        if n_tokens < FEWEST_TOKENS:
            raise TextError(
                f"sample {sample.name!r} is too short: it gives {n_tokens} predicted tokens, at "
                f"least {FEWEST_TOKENS} are needed; give a longer text"
            )
        found = measure_perplexity(model, blocks)
        return cls(sample.name, blocks, found.value, found.n_tokens)

    def against(self, folder: Path) -> SampleReport:
        """Measure the ternary checkpoint on the same blocks.

        A model that gives NaN or infinities has perplexity ∞: that is a finding, no failure.
        """
        try:
            after = measure_perplexity(load(folder).model, self.blocks).value
        except NonFiniteError:
            after = math.inf
        return SampleReport(
            self.name,
            self.n_tokens,
            _rounded(self.perplexity),
            _rounded(after),
            max(len(block) for block in self.blocks),
        )


def _headless(model: Any) -> bool:
    try:
        return model.get_output_embeddings() is None
    except (AttributeError, NotImplementedError):
        return True


def _rounded(value: float) -> float:
    """Six digits: what comes after depends on the number of threads, and resuming must not."""
    return float(f"{value:.6g}")
