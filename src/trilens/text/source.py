"""What an encoder read, as a person reads it: the positions that cross attention looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor

from trilens.errors import NotStoredError
from trilens.text.prompt_text import PromptText

__all__ = ["NO_TOKEN", "Source", "frames", "place_name"]

NO_TOKEN = -1
"""The id of a position that is no token, such as a piece of sound."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The positions of an encoder.

    Attributes:
        tokens: one readable string for each.
        token_ids: [positions] int64, on the CPU; −1 where a position is no token.
        text: which characters each token covers; None where that is not known.
    """

    tokens: tuple[str, ...]
    token_ids: Tensor
    text: PromptText | None = None

    def find(self, text: str, occurrence: SupportsIndex | None = None) -> tuple[int, ...]:
        """Positions of the tokens that cover a text; as `Capture.find`.

        Raises:
            TextNotFoundError, OutOfRangeError, ValueRangeError: as `Capture.find`.
            NotStoredError: the source is no text, or was given as ids without a tokenizer.
        """
        if self.text is None:
            raise NotStoredError(
                "the text of this source is not known: it is no text, or its lens has no tokenizer"
            )
        return self.text.find(text, self.tokens, occurrence)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "tokens": list(self.tokens),
            "token_ids": self.token_ids.tolist(),
            "text": None if self.text is None else self.text.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not whole.
        """
        tokens = tuple(str(token) for token in plain["tokens"])
        ids = torch.tensor(plain["token_ids"], dtype=torch.int64)
        if ids.shape != (len(tokens),):
            raise ValueError("tokens and ids of the source differ in number")
        text = plain.get("text")
        return cls(tokens, ids, None if text is None else PromptText.from_dict(text))


def place_name(arguments: Mapping[str, Any]) -> str:
    """What a position is called that is no token, by what the forward pass is given."""
    return "image position" if any("pixel" in name for name in arguments) else "frame"


def frames(n: int, what: str = "frame") -> Source:
    """A source of positions that are no tokens, such as frames of sound."""
    strings = tuple(f"<{what} {position}>" for position in range(n))
    return Source(strings, torch.full((n,), NO_TOKEN, dtype=torch.int64))
