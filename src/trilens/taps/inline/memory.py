"""How much memory a pass may keep for attention that O(tokens) do not give back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trilens.errors import TooLargeError
from trilens.taps.inline.follower import inline_attention
from trilens.taps.registry import AttentionCall

__all__ = ["LARGEST", "KeptPairs"]

LARGEST = 4 * 2**30
"""Bytes of weights and biases over [heads, seq_q, seq_k] that one pass keeps at most."""


@dataclass(slots=True)
class KeptPairs:
    """The bytes that a pass keeps for pairs of tokens, of attention in modules' own code.

    Attributes:
        nbytes: so far.
    """

    nbytes: int = 0

    def check(self, call: AttentionCall, layer: int) -> None:
        """Count what a call keeps.

        Raises:
            TooLargeError: more than `LARGEST` in all.
        """
        if call.function is not inline_attention:
            return
        for tensor in (call.weights, call.options.get("position_bias")):
            if isinstance(tensor, Tensor) and tensor.shape[1] > 1 and tensor.shape[2] > 1:
                self.nbytes += tensor.numel() * tensor.element_size()
        if self.nbytes > LARGEST:
            batch, heads, seq_q, seq_k = *call.query.shape[:3], call.key.shape[2]
            raise TooLargeError(
                f"attention of layer {layer} ({batch} × {heads} heads, {seq_q} × {seq_k} tokens) "
                "cannot be kept as queries and keys, and the weights up to it take "
                f"{self.nbytes / 2**30:.1f} GiB of at most {LARGEST / 2**30:.0f}: capture fewer "
                "layers (layers=…), a shorter prompt or a smaller batch_size"
            )
