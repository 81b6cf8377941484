"""What an RWKV-7 model remembers between two calls, and how it leaves padding out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from trilens.errors import ShapeError, UsageError

__all__ = ["Padding", "RWKV7LayerState", "RWKV7State", "shift_tokens"]


@dataclass(slots=True)
class RWKV7LayerState:
    """The memory of one block; None before its first token.

    Shapes
        attn_shift [batch, d_model], the last token that the time mix saw, after its norm;
        recurrent [batch, heads, d_head, d_head], the matrix state, key channels first;
        ffn_shift [batch, d_model], the last token that the channel mix saw, after its norm.
    """

    attn_shift: Tensor | None = None
    recurrent: Tensor | None = None
    ffn_shift: Tensor | None = None
    # transformers asks every layer of a cache for these.
    is_compileable: bool = False
    is_croppable: bool = False
    is_sliding: bool = False
    supports_early_init: bool = False

    def reset(self) -> None:
        """Forget everything."""
        self.attn_shift = self.recurrent = self.ffn_shift = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the batch in another order, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.attn_shift = _select(self.attn_shift, indices)
        self.recurrent = _select(self.recurrent, indices)
        self.ffn_shift = _select(self.ffn_shift, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.recurrent is not None:
            rows = torch.arange(self.recurrent.shape[0], device=self.recurrent.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a recurrent state cannot forget single tokens.

        Raises:
            UsageError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise UsageError(
                f"an RWKV-7 state cannot drop {abs(tokens_to_remove)} tokens: run the model again "
                "on the shorter text"
            )


class RWKV7State(Cache):  # type: ignore[misc]
    """The `past_key_values` of an RWKV-7 model; its size does not grow with the text.

    A forward pass that is given a state continues from it and leaves the new one in it.

    Args:
        n_layers: blocks of the model.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[RWKV7LayerState() for _ in range(n_layers)])
        self._tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens given to the model so far, padding included."""
        return self._tokens

    def add_tokens(self, count: int) -> None:
        """Count tokens that every layer has seen."""
        self._tokens += count

    @property
    def batch_size(self) -> int:
        """Rows of the batch, −1 before the first token."""
        recurrent = self.layers[0].recurrent if self.layers else None
        return -1 if recurrent is None else int(recurrent.shape[0])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._tokens = 0


@dataclass(frozen=True, slots=True)
class Padding:
    """Which tokens of a batch are real. A masked token is as if it were not there.

    Shapes
        keep [batch, seq, 1] bool; previous [batch, seq], the nearest real token before each one,
        counted from 1, with 0 for the state; last [batch], the last real token, counted likewise.
    """

    keep: Tensor
    previous: Tensor
    last: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor | None, batch: int, seq: int) -> Padding | None:
        """Read an attention mask; None where every token is real.

        Args:
            mask: [batch, at least seq], nonzero for real tokens; its last seq columns count.
            batch: rows of the input.
            seq: tokens of the input.

        Raises:
            ShapeError: a mask of another shape.
        """
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < seq:
            raise ShapeError(
                f"attention_mask has shape {tuple(mask.shape)}: RWKV-7 takes [batch, seq] with "
                f"batch {batch} and at least {seq} columns, nonzero for real tokens"
            )
        keep = mask[:, mask.shape[1] - seq :] != 0
        if bool(keep.all()):
            return None
        numbers = torch.arange(1, seq + 1, device=mask.device) * keep
        latest = numbers.cummax(dim=1).values
        previous = torch.nn.functional.pad(latest, (1, -1))
        return cls(keep.unsqueeze(-1), previous, latest[:, -1])


def shift_tokens(
    x: Tensor, before: Tensor | None, padding: Padding | None
) -> tuple[Tensor, Tensor]:
    """The real token before each token, and the last real one, for the next call.

    Shapes
        x [batch, seq, d_model]; before [batch, d_model], zero where nothing came before.
    """
    first = torch.zeros_like(x[:, 0]) if before is None else before.to(x.dtype)
    if padding is None:
        return torch.cat([first.unsqueeze(1), x[:, :-1]], dim=1), x[:, -1]
    tokens = torch.cat([first.unsqueeze(1), x], dim=1)
    rows = torch.arange(x.shape[0], device=x.device)
    return tokens[rows.unsqueeze(1), padding.previous], tokens[rows, padding.last]


def _select(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))
