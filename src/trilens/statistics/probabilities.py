"""Probabilities of logits that have them."""

from __future__ import annotations

from torch import Tensor

from trilens.errors import NonFiniteError

__all__ = ["probabilities"]


def probabilities(logits: Tensor, where: str) -> Tensor:
    """Softmax in float32; −Inf is a token that never comes.

    Shapes: [vocab] → [vocab]

    Args:
        logits: of one position.
        where: what errors call it.

    Raises:
        NonFiniteError: NaN or +Inf among them, or nothing but −Inf.
    """
    # PROMOTE: a softmax over a vocabulary loses its tail in half precision.
    row = logits.float()
    if not bool(row.max().isfinite()):
        token = int(row.argmax())
        raise NonFiniteError(
            f"logits {where} give no probabilities: token {token} has {float(row[token])}; check "
            "the model's weights, or load it in another dtype"
        )
    return row.softmax(-1)
