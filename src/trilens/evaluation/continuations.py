"""What a model writes when it goes on freely: whether it runs in circles, and says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import UsageError
from trilens.lens.continuing import continue_batch

__all__ = ["Continuations", "agreement", "compare_continuations", "continuations", "in_a_loop"]

_TURNS = 4  # times that a text says the same before it counts as a loop
_LOOP_TOKENS = 12  # over which it does so, at least


@dataclass(frozen=True, slots=True)
class Continuations:
    """Greedy continuations of the same prompts, before and after.

    Attributes:
        n_prompts: Prompts that were gone on from.
        n_tokens: New tokens of each.
        agreement: Mean share of the new tokens before the first that differs, in [0, 1].
        loops_before: Share of continuations that end in a loop, in [0, 1]; see `in_a_loop`.
        loops_after: Likewise.
    """

    n_prompts: int
    n_tokens: int
    agreement: float
    loops_before: float
    loops_after: float

    @property
    def sentence(self) -> str:
        """The finding in words."""
        return (
            f"Of {self.n_prompts} greedy continuations of {self.n_tokens} tokens the first "
            f"{self.agreement:.0%} agree on average; {self.loops_before:.0%} ended in a loop "
            f"before, {self.loops_after:.0%} after."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            TypeError, KeyError: values that are none.
        """
        counts = (values["n_prompts"], values["n_tokens"])
        shares = (values["agreement"], values["loops_before"], values["loops_after"])
        if not (
            all(type(count) is int for count in counts)
            and all(type(share) in {int, float} and 0 <= share <= 1 for share in shares)
        ):
            raise TypeError("continuations have values of the wrong kind")
        return cls(*counts, *map(float, shares))


def in_a_loop(ids: Tensor) -> bool:
    """Whether a text ends by saying the same again and again.

    Its last tokens repeat with some period: four times in a row or more, and over 12 tokens or
    more.

    Shapes: ids int64 [tokens]
    """
    text: list[int] = ids.tolist()
    for period in range(1, len(text) // _TURNS + 1):
        span = max(_TURNS * period, _LOOP_TOKENS)
        tail = text[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return True
    return False


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of two texts of one length before the first token that differs, in [0, 1].

    Shapes: both int64 [tokens]
    """
    differ = (one != other).nonzero()
    return float(differ[0, 0]) / len(one) if len(differ) else 1.0


def continuations(model: PreTrainedModel, prompts: Sequence[Tensor], *, new: int) -> list[Tensor]:
    """What a model greedily goes on with.

    Shapes: each prompt int64 [seq]; each continuation int64 [new]

    Args:
        model: one that generates.
        prompts: those of one length run together.
        new: tokens that are written after each.

    Raises:
        GenerationError: the model's own code fails.

    Memory: the cache of all prompts of one length.
    """
    found: dict[int, Tensor] = {}
    for length in {len(prompt) for prompt in prompts}:
        places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.stack([prompts[i] for i in places])
        rows = continue_batch(model, ids, max_new_tokens=new)
        found |= {i: row[length:] for i, row in zip(places, rows, strict=True)}
    return [found[i] for i in range(len(prompts))]


def compare_continuations(before: Sequence[Tensor], after: Sequence[Tensor]) -> Continuations:
    """Two models' continuations of the same prompts.

    Shapes: each int64 [new]

    Raises:
        UsageError: there are none.
    """
    if not before:
        raise UsageError("no continuation to compare: give at least one prompt")
    n = len(before)
    same = [agreement(one, other) for one, other in zip(before, after, strict=True)]
    return Continuations(
        n,
        len(before[0]),
        sum(same) / n,
        sum(map(in_a_loop, before)) / n,
        sum(map(in_a_loop, after)) / n,
    )
