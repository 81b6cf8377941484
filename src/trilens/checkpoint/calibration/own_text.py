"""Calibration text that the model writes itself: drawn from it token by token, kept with the run.

The model is run whole, over its mapped weights and in its own dtype, before the blocks are worked
on one by one. Rows begin with a token drawn from the vocabulary, or with given prompts; all rows of
a batch are written at once, with the model's cache or state.

Source: LLM-QAT, arXiv 2305.17888, which trains on such text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.errors import (
    CorruptFileError,
    GenerationError,
    NonFiniteError,
    UsageError,
    ValueRangeError,
)
from trilens.io.atomic import write_bytes
from trilens.io.json import json_text
from trilens.io.sealed import read_sealed, sealed
from trilens.lens.continuing import continue_batch
from trilens.models.tokens import vocab_size_of

__all__ = [
    "ROWS_AT_ONCE",
    "SELF",
    "OwnText",
    "check_writes",
    "kept_lines",
    "kept_text",
    "write_text",
]

SELF = "self"
"""The word for the model's own text, where a text is asked for."""

_NAME = "own-text.json"
ROWS_AT_ONCE = 32
"""Rows that are written together."""

_FEWEST = 2  # new tokens after a prompt


@dataclass(frozen=True, slots=True)
class OwnText:
    """How a model writes its own calibration text.

    Attributes:
        temperature: At which tokens are drawn, above 0; 1 for the model's own distribution.
        prompts: What the rows begin with, in turns; none: with a token drawn from the vocabulary.

    Raises:
        ValueRangeError: a temperature that is not above 0.
        UsageError: prompts that are no texts.
    """

    temperature: float = 1.0
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check both."""
        heat: Any = self.temperature
        if isinstance(heat, bool) or not isinstance(heat, int | float) or not 0 < heat < math.inf:
            raise ValueRangeError(
                f"temperature {heat!r} of the model's own text is out of range: it is a number "
                "above 0; 1 draws from the model's own distribution"
            )
        texts: Any = self.prompts
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise UsageError(
                "prompts of the model's own text are no texts: pass a list of strings that are "
                "not empty"
            )
        object.__setattr__(self, "temperature", float(heat))
        object.__setattr__(self, "prompts", tuple(texts))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"temperature": self.temperature, "prompts": list(self.prompts)}


def check_writes(model: Any) -> None:
    """Refuse a model that writes no text.

    Args:
        model: it, or its skeleton without weights.

    Raises:
        GenerationError: it is no causal language model.
    """
    writes = hasattr(model, "generate") and model.can_generate()
    if not writes or getattr(model.config, "is_encoder_decoder", False):
        raise GenerationError(
            f"{type(model).__name__} cannot write its own calibration text, since it predicts no "
            "next token: give a text of the kind that it is for (documents=…, --calibrate TEXT)"
        )


def write_text(
    model: Any,
    tokenizer: Any,
    own: OwnText,
    *,
    rows: int,
    length: int,
    seed: int,
    observe: Callable[[float], None] = lambda _: None,
) -> tuple[Tensor, ...]:
    """Let a model write.

    Shapes: → rows of int64 [length]

    Args:
        model: as it was loaded; see `check_writes`.
        tokenizer: the model's own; None where it has none, and no prompts are given.
        own: how it writes.
        rows: how many texts.
        length: tokens of each, with what it begins with.
        seed: of what is drawn; the same gives the same text on the same machine.
        observe: called with the share that is written, in [0, 1].

    Raises:
        GenerationError: the model writes nothing, or a prompt leaves no room.
        NonFiniteError: it gives NaN or infinities.

    Memory: the cache or state of 32 rows; the model's weights are read as they are mapped.
    """
    check_writes(model)
    starts = _starts(model, tokenizer, own, rows, length, seed)
    order = sorted(range(rows), key=lambda i: len(starts[i]))
    written: dict[int, Tensor] = {}
    number = 0
    while order:
        first = len(starts[order[0]])
        batch = [i for i in order[:ROWS_AT_ONCE] if len(starts[i]) == first]
        order = order[len(batch) :]
        observe(len(written) / rows)
        try:
            found = continue_batch(
                model,
                torch.stack([starts[i] for i in batch]),
                max_new_tokens=length - first,
                temperature=own.temperature,
                seed=(1_000_003 * seed + number) % 2**63,
            )
        except GenerationError as cause:
            if "probability tensor" not in str(cause.__cause__):
                raise
            raise NonFiniteError(
                f"{type(model).__name__} gives NaN or infinities while it writes its own "
                "calibration text: its weights or its arithmetic overflow"
            ) from cause
        written |= dict(zip(batch, found, strict=True))
        number += 1
    return tuple(written[i] for i in range(rows))


def kept_text(
    folder: Path, tokenizer: Any, write: Callable[[], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """The text of a run: as it was written into its folder, or written now.

    Raises:
        CorruptFileError: it is there, and damaged.
        WriteError: it cannot be kept.
    """
    path = folder / _NAME
    if path.is_file():
        return tuple(torch.tensor(ids) for ids in _ids_of(path))
    found = tuple(write())
    ids = [row.tolist() for row in found]
    texts = ["" if tokenizer is None else tokenizer.decode(row) for row in ids]
    write_bytes(path, sealed({"token_ids": ids, "text": texts}))
    return found


def kept_lines(folder: Path) -> bytes | None:
    """The text that a run has kept, as JSON lines of text and token ids; None without one.

    Raises:
        CorruptFileError: it is damaged.
    """
    path = folder / _NAME
    if not path.is_file():
        return None
    rows = zip(read_sealed(path)[0]["text"], _ids_of(path), strict=True)
    lines = [json_text({"text": text, "token_ids": ids}, indent=None) for text, ids in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def _ids_of(path: Path) -> list[list[int]]:
    rows = read_sealed(path)[0].get("token_ids")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise CorruptFileError(f"{path} holds no text: begin in a new directory")
    return rows


def _starts(
    model: Any, tokenizer: Any, own: OwnText, rows: int, length: int, seed: int
) -> list[Tensor]:
    """What each row begins with."""
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    if own.prompts:
        if tokenizer is None:
            raise GenerationError(
                "prompts of the model's own text need a tokenizer, and this model came without one"
            )
        prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in own.prompts]
        for text, ids in zip(own.prompts, prompts, strict=True):
            if not 1 <= len(ids) <= length - _FEWEST:
                raise GenerationError(
                    f"prompt {text[:40]!r} of the model's own text has {len(ids)} tokens: 1 to "
                    f"{length - _FEWEST} leave room in rows of {length}"
                )
        return [prompts[i % len(prompts)] for i in range(rows)]
    most = _written_ids(model, tokenizer)
    plain = torch.tensor([i for i in range(most) if i not in special] or list(range(most)))
    drawn = torch.randint(len(plain), (rows,), generator=torch.Generator().manual_seed(seed))
    before = _prefix(tokenizer)
    return [torch.cat([before, plain[i : i + 1]]) for i in drawn.tolist()]


def _written_ids(model: Any, tokenizer: Any) -> int:
    """Ids that are read, scored and mean something: tables may hold placeholders at their end."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    known = [vocab_size_of(model)]
    known += [head.shape[0]] if isinstance(head, Tensor) and head.ndim == 2 else []
    known += [] if tokenizer is None else [len(tokenizer)]
    return min(known)


def _prefix(tokenizer: Any) -> Tensor:
    """The special tokens that every text of this tokenizer begins with: also one without words."""
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"] for text in ("", "a")]
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    return torch.tensor([one for one, _ in pairs], dtype=torch.long)
