"""What one text says about two models: before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from trilens.evaluation.continuations import Continuations
from trilens.io.messages import in_blocks

__all__ = ["SampleReport", "worst_of"]


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What one text says about a model before and after.

    Attributes:
        name: What the text is called.
        n_tokens: Predicted tokens.
        perplexity_before: Of the source, in its own dtype.
        perplexity_after: Of the ternary checkpoint on the same tokens; infinite where its logits
            are not finite.
        block_length: Tokens of the longest context, on which a perplexity depends; None in files
            that lack it.
        own_kind: It is of the kind that was calibrated on, and so flatters.
        kl_nats: Mean KL(before ‖ after) of the next token; infinite where logits are not finite,
            None in files that lack it.
        same_top1: Share of positions with the same most probable token, in [0, 1]; likewise.
        continuations: Greedy continuations of its beginnings; None where none were written.
    """

    name: str
    n_tokens: int
    perplexity_before: float
    perplexity_after: float
    block_length: int | None = None
    own_kind: bool = False
    kl_nats: float | None = None
    same_top1: float | None = None
    continuations: Continuations | None = None

    @property
    def ratio(self) -> float:
        """After over before: 1 is no damage."""
        return self.perplexity_after / self.perplexity_before

    @property
    def sentence(self) -> str:
        """The finding in words."""
        kind = ", of the kind that was calibrated on" if self.own_kind else ""
        words = (
            f"Perplexity on {self.name} ({self.n_tokens} tokens{in_blocks(self.block_length)}): "
            f"{self.perplexity_before:.4g} "
            f"before, {self.perplexity_after:.4g} after, {self.ratio:.3g} times as much{kind}."
        )
        if self.kl_nats is not None and self.same_top1 is not None:
            words += f" KL {self.kl_nats:.3g} nats, the same top token at {self.same_top1:.1%}."
        return words + (f" {self.continuations.sentence}" if self.continuations else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; null where a number is infinite."""
        values = {**asdict(self), "ratio": self.ratio}
        # A file without these is as older ones are.
        for name in ("kl_nats", "same_top1", "continuations"):
            if values[name] is None:
                del values[name]
        if not self.own_kind:
            del values["own_kind"]
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The report that `to_dict` gave these values.

        Raises:
            TypeError, KeyError: values that are none.
        """
        name, n_tokens = values["name"], values["n_tokens"]
        before, after = values["perplexity_before"], values["perplexity_after"]
        after = math.inf if after is None else after
        length = values.get("block_length")
        kl, same = values.get("kl_nats"), values.get("same_top1")
        # What is infinite is null in JSON.
        kl = math.inf if kl is None and "kl_nats" in values else kl
        written = values.get("continuations")
        own_kind = values.get("own_kind", False)
        numbers = all(isinstance(value, int | float) for value in (before, after))
        numbers = numbers and (length is None or type(length) is int)
        numbers = numbers and all(v is None or isinstance(v, int | float) for v in (kl, same))
        numbers = numbers and type(own_kind) is bool
        if not (isinstance(name, str) and type(n_tokens) is int and numbers and before > 0):
            raise TypeError("the entry of the sample has values of the wrong kind")
        return cls(
            name,
            n_tokens,
            float(before),
            float(after),
            length,
            own_kind,
            kl,
            same,
            None if written is None else Continuations.from_dict(written),
        )


def worst_of(samples: Sequence[SampleReport]) -> SampleReport | None:
    """The text with the largest ratio of perplexities; NaN is larger than any. None for none."""
    return max(
        samples,
        key=lambda s: math.inf if math.isnan(s.ratio) else s.ratio,
        default=None,
    )
