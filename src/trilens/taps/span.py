"""Which tokens of a text one forward pass holds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one pass: columns 0 … seq − 1 are text positions start … start + seq − 1.

    Attributes:
        start: tokens of the text that earlier passes read, 0 but in a decoding step.
        seq: columns of this pass, padding among them.
        lengths: per row, real columns of this pass.
        prompts: per row, tokens of its prompt: position prompts − 1 is "last", those from
            prompts on are "generated".
        numbers: per row, the number of its prompt among all that the run was prepared for; empty
            where the rows are all of them, in order.
    """

    start: int
    seq: int
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    numbers: tuple[int, ...] = ()

    @property
    def prompt_numbers(self) -> tuple[int, ...]:
        """Per row, the number of its prompt."""
        return self.numbers or tuple(range(len(self.lengths)))
