"""What ternary weights did to a model: measured perplexities, before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

__all__ = ["Damage"]


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
    """

    perplexity_before: float
    perplexity_after: float
    n_tokens: int
    calibration_tokens: int
    refused_documents: int
    fallbacks: tuple[str, ...] = ()

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
