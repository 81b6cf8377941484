"""What ternary weights did to a model: measured perplexities, before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from trilens.checkpoint.format.sample import SampleReport, worst_of
from trilens.errors import DamageError

__all__ = ["Damage", "check_damage"]


@dataclass(frozen=True, slots=True)
class Damage:
    """Perplexity of the dense and of the ternary model on text that calibration did not see.

    Of several texts the figures are those of the worst.

    Attributes:
        perplexity_before: Of the dense model, in float32.
        perplexity_after: Of the ternary one.
        n_tokens: Predicted tokens.
        calibration_tokens: Tokens that were calibrated on.
        refused_documents: Calibration documents left out: they are also in the evaluation text.
        fallbacks: Matrices that were coded without their inputs, with the reason.
        block_length: Tokens of the longest block of the held-out text, on which a perplexity
            depends; None in files that lack it.
        texts: Every text that was measured on, both models in float32; empty in files that lack it.
        own_text: The model wrote calibration text itself.
    """

    perplexity_before: float
    perplexity_after: float
    n_tokens: int
    calibration_tokens: int
    refused_documents: int
    fallbacks: tuple[str, ...] = ()
    block_length: int | None = None
    texts: tuple[SampleReport, ...] = ()
    own_text: bool = False

    @classmethod
    def of(
        cls,
        texts: tuple[SampleReport, ...],
        *,
        calibration_tokens: int,
        refused_documents: int,
        fallbacks: tuple[str, ...],
        own_text: bool,
    ) -> Self:
        """The damage of at least one text: the worst one's figures in front."""
        worst = worst_of(texts)
        assert worst is not None
        return cls(
            worst.perplexity_before,
            worst.perplexity_after,
            worst.n_tokens,
            calibration_tokens,
            refused_documents,
            fallbacks,
            worst.block_length,
            texts,
            own_text,
        )

    @property
    def which(self) -> str:
        """On which text the figures are, and what the others say; to follow the figures."""
        worst = worst_of(self.texts)
        if worst is None:
            return ""
        kind = ", of the kind that was calibrated on" if worst.own_kind else ""
        rest = [
            f"{text.name} {text.ratio:.3g} times"
            + (" (the kind that was calibrated on)" if text.own_kind else "")
            for text in self.texts
            if text is not worst
        ]
        others = f", the worst of {len(self.texts)} texts; {'; '.join(rest)}" if rest else ""
        return f" ({worst.name}{kind}{others})"

    @property
    def ratio(self) -> float:
        """Perplexity after over before: 1 for no damage."""
        return self.perplexity_after / self.perplexity_before

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {**asdict(self), "fallbacks": list(self.fallbacks)}
        return {**values, "texts": [text.to_dict() for text in self.texts]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The damage that `to_dict` gave these values."""
        texts = tuple(SampleReport.from_dict(text) for text in values.get("texts", []))
        return cls(**{**values, "fallbacks": tuple(values["fallbacks"]), "texts": texts})


class _Measured(Protocol):
    @property
    def perplexity_before(self) -> float: ...

    @property
    def perplexity_after(self) -> float: ...

    @property
    def ratio(self) -> float: ...


def check_damage(damage: _Measured | None, highest: float | None, *, written: bool = False) -> None:
    """Refuse a ratio of perplexities above the caller's bound.

    Args:
        damage: what was measured, of several texts the worst.
        highest: what is allowed; None for anything.
        written: the output is there already.

    Raises:
        DamageError: it is above; NaN is above everything.
    """
    if damage is None or highest is None:
        return
    if not damage.ratio <= highest:
        end = "it was written before" if written else "nothing was written"
        raise DamageError(
            f"damage is {damage.ratio:.4g} times the perplexity ({damage.perplexity_before:.4g} to "
            f"{damage.perplexity_after:.4g}), more than the {highest:g} allowed: {end}; "
            "take a better rule, smaller groups or two planes, keep some matrices, or allow more"
        )
