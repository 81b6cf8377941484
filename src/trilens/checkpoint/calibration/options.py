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

from trilens.checkpoint.calibration.device import find_device
from trilens.checkpoint.calibration.effort import EffortName, find_effort
from trilens.checkpoint.calibration.own_text import SELF, OwnText
from trilens.checkpoint.evaluate import Sample
from trilens.errors import TextError, UsageError, ValueRangeError
from trilens.numbers import at_least
from trilens.text.documents import read_documents
from trilens.text.token_blocks import token_blocks

__all__ = ["Apart", "Calibration", "Drawn", "block_length", "draw"]

_LEAST_TOKENS = 256
_LEAST_KINDS = 16
_EVALUATION_SHARE = 10  # of ten documents one is set aside where no evaluation text is given

OWN_KIND = "calibration text, set apart"
OWN_WRITING = "the model's own text, set apart"
_UNNAMED = "evaluation text"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which text, how much of it, and what damage is too much.

    Attributes:
        documents: The texts; see `from_source`.
        evaluation: Texts to measure the damage on: plain ones together, each `Sample` apart, and
            with a `Sample` also the calibration's own kind. Documents that are also among these are
            never calibrated on. Empty: the calibration's own kind alone, every tenth document, by
            the seed, which is set aside for it.
        tokens: How many tokens to calibrate on, at most; None for what the effort says.
        evaluation_tokens: How many to measure on, at most, of each text.
        length: Tokens of a block, at most; the model's own longest input where that is less.
        seed: What is drawn from the documents or from the model, and in which order.
        batch_size: Blocks that run together.
        max_perplexity_ratio: The largest ratio of perplexities that is written, or None for any;
            of several texts the worst counts.
        own_text: The model writes the calibration text itself; beside documents, half of it.
        effort: How many tokens, and how long rules that fit do so: "fast", "default" or "max".
        device: Where blocks run and are coded, such as "cuda", or "auto": this machine's
            accelerator where it has one. Sums round otherwise there.

    Raises:
        TextError: no document, where the model does not write the text itself.
        UsageError: an option of a wrong kind.
        ValueRangeError: a number out of its range.
    """

    documents: tuple[str, ...] = ()
    evaluation: tuple[str | Sample, ...] = ()
    tokens: int | None = None
    evaluation_tokens: int = 16_384
    length: int = 512
    seed: int = 0
    batch_size: int = 8
    max_perplexity_ratio: float | None = None
    own_text: OwnText | None = None
    effort: EffortName = "default"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check every option."""
        given: tuple[tuple[str, Any, Any], ...] = (
            ("documents", self.documents, str),
            ("evaluation", self.evaluation, (str, Sample)),
        )
        for name, texts, kinds in given:
            if isinstance(texts, str) or not all(isinstance(text, kinds) for text in texts):
                raise UsageError(f"{name} of the calibration are no texts: pass a list of strings")
            object.__setattr__(self, name, tuple(texts))
        names = [text.name for text in self.evaluation if isinstance(text, Sample)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"two evaluation texts are called {twice!r}: give each its own name")
        written = self.own_text is not None
        if written and not isinstance(self.own_text, OwnText):
            raise UsageError(f"own_text is {self.own_text!r}: give an OwnText, or None")
        if not any(text.strip() for text in self.documents) and (self.documents or not written):
            raise TextError("calibration text is empty: give at least one document")
        effort = find_effort(self.effort)
        if self.tokens is None:
            object.__setattr__(self, "tokens", effort.tokens)
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
        find_device(self.device)
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
            source: see `analysis.text.read_documents`; "self": the model writes the text itself.
            evaluation: likewise, for the damage.
            options: as for the class.

        Raises:
            TextError: a source that is missing, unreadable or empty.
        """
        apart = () if evaluation is None else read_documents(evaluation)
        if source == SELF and not Path(source).exists():
            return cls((), apart, **{"own_text": OwnText(), **options})
        return cls(read_documents(source), apart, **options)

    @property
    def budget(self) -> int:
        """Tokens to calibrate on, at most."""
        return self.tokens or 0  # set when it was made

    def own_rows(self, length: int) -> tuple[int, int]:
        """How many rows of so many tokens the model writes: to calibrate on, and to measure on."""
        if self.own_text is None:
            return 0, 0
        tokens = self.budget // 2 if self.documents else self.budget
        rows = math.ceil(tokens / length)
        apart = min(math.ceil(rows / _EVALUATION_SHARE), self.evaluation_tokens // length)
        return rows, max(1, apart) if self._measures_own_kind else 0

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The evaluation texts, each with its name."""
        plain = tuple(text for text in self.evaluation if isinstance(text, str))
        named = tuple(text for text in self.evaluation if isinstance(text, Sample))
        return ((Sample(_UNNAMED, plain),) if plain else ()) + named

    @property
    def _measures_own_kind(self) -> bool:
        return not self.evaluation or any(isinstance(text, Sample) for text in self.evaluation)

    def to_dict(self) -> dict[str, Any]:
        """What decides the result, in plain values: texts by their hash; no bound, no batches."""
        named = [text for text in self.evaluation if isinstance(text, Sample)]
        values: dict[str, Any] = {
            "documents_sha256": _digest(self.documents),
            "evaluation_sha256": _digest([t for s in self.samples for t in s.documents]),
            "tokens": self.budget,
            "evaluation_tokens": self.evaluation_tokens,
            "length": self.length,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        if named:
            values["evaluation_names"] = {text.name: text.sha256 for text in named}
        if self.own_text is not None:
            values["own_text"] = self.own_text.to_dict()
        if self.effort != "default":
            values["effort"] = self.effort
        if (kind := find_device(self.device).type) != "cpu":
            values["device"] = kind
        return values


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """Text to measure the damage on.

    Attributes:
        name: What reports call it.
        own_kind: It is of the kind that was calibrated on.
        blocks: Its token ids.
    """

    name: str
    own_kind: bool
    blocks: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What was drawn from the documents.

    Shapes: each block int64 [seq], 2 ≤ seq ≤ length

    Attributes:
        blocks: To calibrate on, equal lengths together.
        apart: To measure the damage on, text by text.
        refused: Documents left out because they are also among the evaluation's.
    """

    blocks: tuple[Tensor, ...]
    apart: tuple[Apart, ...]
    refused: int

    @property
    def evaluation(self) -> tuple[Tensor, ...]:
        """All blocks to measure on."""
        return tuple(block for text in self.apart for block in text.blocks)

    @property
    def n_tokens(self) -> int:
        """Tokens to calibrate on."""
        return sum(len(block) for block in self.blocks)


def draw(
    calibration: Calibration,
    tokenizer: Any,
    *,
    longest: int | None,
    written: Sequence[Tensor] = (),
) -> Drawn:
    """Draw token blocks from the documents: the same seed gives the same blocks.

    Args:
        calibration: the texts and how much of them.
        tokenizer: the model's own.
        longest: the model's longest input, where it has one.
        written: what the model wrote itself, `calibration.own_rows` in number.

    Raises:
        TextError: too few tokens, tokens nearly all alike, or nothing left beside the evaluation.
        NoTokenizerError: the model came without a tokenizer.
    """
    length = block_length(calibration, longest)
    generator = torch.Generator().manual_seed(calibration.seed)
    used, apart, refused = _documents(calibration, generator)
    budget = calibration.budget
    n_train = len(written) - calibration.own_rows(length)[1]
    blocks = _cut(written[:n_train], budget // 2 if used else budget)
    if used:
        left = budget - sum(map(len, blocks))
        blocks += list(_chosen(tokenizer, used, length, left, generator))
    n_tokens = sum(len(block) for block in blocks)
    kinds = len(torch.unique(torch.cat(blocks)))
    if n_tokens < _LEAST_TOKENS:
        raise TextError(
            f"calibration text is too short: {n_tokens} tokens, at least {_LEAST_TOKENS} are needed"
        )
    if kinds < _LEAST_KINDS:
        whose = "" if used else " that the model wrote itself"
        raise TextError(
            f"calibration text{whose} holds {kinds} different tokens in {n_tokens}: at least "
            f"{_LEAST_KINDS} are needed; give text of the kind the model is for"
        )
    measured = [
        Apart(
            sample.name,
            own,
            _chosen(tokenizer, sample.documents, length, calibration.evaluation_tokens, generator),
        )
        for own, sample in apart
    ]
    if len(written) > n_train:
        measured.append(Apart(OWN_WRITING, own_kind=True, blocks=tuple(written[n_train:])))
    return Drawn(tuple(sorted(blocks, key=len, reverse=True)), tuple(measured), refused)


def block_length(calibration: Calibration, longest: int | None) -> int:
    """Tokens of a block, at most, on a model with this longest input."""
    return min(calibration.length, longest or calibration.length)


def _documents(
    calibration: Calibration, generator: torch.Generator
) -> tuple[list[str], list[tuple[bool, Sample]], int]:
    """Documents to calibrate on, texts to measure on (own kind or not), and how many are refused.

    Raises:
        TextError: no document is left.
    """
    texts = [text for text in calibration.documents if text.strip()]
    order = torch.randperm(len(texts), generator=generator).tolist()
    texts = [texts[i] for i in order]
    apart = [(False, sample) for sample in calibration.samples]
    if texts and calibration._measures_own_kind:
        if len(texts) < 2:
            texts = _halves(texts[0])
        n_apart = max(1, len(texts) // _EVALUATION_SHARE)
        apart.append((True, Sample(OWN_KIND, tuple(texts[:n_apart]))))
        texts = texts[n_apart:]
    held = {_normal(text) for _, sample in apart for text in sample.documents}
    used = [text for text in texts if _normal(text) not in held]
    if texts and not used:
        raise TextError(
            f"all {len(texts)} calibration documents are among those the damage is measured on: "
            "give other text for one of the two"
        )
    return used, apart, len(texts) - len(used)


def _cut(rows: Sequence[Tensor], budget: int) -> list[Tensor]:
    """The first rows, the last cut to the budget."""
    found = []
    for row in rows:
        piece = row[:budget]
        if len(piece) < 2:
            break
        found.append(piece)
        budget -= len(piece)
    return found


def _chosen(
    tokenizer: Any, texts: Sequence[str], length: int, budget: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Blocks of full length first, drawn from all of the text; equal lengths stand together."""
    # Tokenizing a library for a few blocks would take longer than calibrating on them.
    found = token_blocks(tokenizer, texts, length=length, limit_tokens=max(4 * budget, 4 * length))
    order = torch.randperm(len(found), generator=generator).tolist()
    order.sort(key=lambda i: len(found[i]) < length)
    chosen = _cut([found[i] for i in order], budget)
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
