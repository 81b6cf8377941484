"""What ternary weights did to a model: measured perplexities, before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from trilens.errors import DamageError

__all__ = ["Damage", "check_damage"]


@dataclass(frozen=True, slots=True)
class Damage:
    """Perplexity of the dense and of the ternary model on text that calibration did not see.

    Attributes:
        perplexity_before: Of the dense model, in float32.
        perplexity_after: Of the ternary one.
        n_tokens: Predicted tokens.
        calibration_tokens: Tokens that were calibrated on.
        refused_documents: Calibration documents left out: they are also in the evaluation text.
        fallbacks: Matrices that were coded without their inputs, with the reason.
        block_length: Tokens of the longest block of the held-out text, on which a perplexity
            depends; None in files that lack it.
    """

    perplexity_before: float
    perplexity_after: float
    n_tokens: int
    calibration_tokens: int
    refused_documents: int
    fallbacks: tuple[str, ...] = ()
    block_length: int | None = None

    @property
    def ratio(self) -> float:
        """Perplexity after over before: 1 for no damage."""
        return self.perplexity_after / self.perplexity_before

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "fallbacks": list(self.fallbacks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The damage that `to_dict` gave these values."""
        return cls(**{**values, "fallbacks": tuple(values["fallbacks"])})


class _Bound(Protocol):
    @property
    def max_perplexity_ratio(self) -> float | None: ...


def check_damage(damage: Damage | None, bound: _Bound | None, *, written: bool = False) -> None:
    """Refuse a ratio of perplexities above the caller's bound.

    Args:
        damage: what was measured.
        bound: what is allowed.
        written: the output is there already.

    Raises:
        DamageError: it is above; NaN is above everything.
    """
    highest = None if bound is None else bound.max_perplexity_ratio
    if damage is None or highest is None:
        return
    if not damage.ratio <= highest:
        end = "it was written before" if written else "nothing was written"
        raise DamageError(
            f"damage is {damage.ratio:.4g} times the perplexity ({damage.perplexity_before:.4g} to "
            f"{damage.perplexity_after:.4g}), more than the {highest:g} allowed: {end}; "
            "take a better rule, smaller groups or two planes, keep some matrices, or allow more"
        )
