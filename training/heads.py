"""Which attention heads do something nameable: previous-token and induction scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

__all__ = ["HeadScores", "NamedHead", "head_table", "induction_scores", "previous_token_scores"]


@dataclass(frozen=True)
class NamedHead:
    """One head and its score.

    Attributes:
        layer: from 0.
        head: query head, from 0.
        score: mean attention weight, 0 to 1.
    """

    layer: int
    head: int
    score: float


@dataclass(frozen=True)
class HeadScores:
    """One kind of score for every head.

    Attributes:
        name: what was measured.
        values: ``values[layer][head]``, a mean attention weight, 0 to 1.
    """

    name: str
    values: tuple[tuple[float, ...], ...]

    def best(self) -> NamedHead:
        """The head with the largest score."""
        ranked = [
            NamedHead(layer, head, score)
            for layer, row in enumerate(self.values)
            for head, score in enumerate(row)
        ]
        return max(ranked, key=lambda named: named.score)

    def median(self) -> float:
        """Median over all heads: what an ordinary head scores."""
        flat = torch.tensor([score for row in self.values for score in row])
        return float(flat.median())


@torch.inference_mode()
def previous_token_scores(
    model: PreTrainedModel, inputs: torch.Tensor, batch: int = 4
) -> HeadScores:
    """Mean weight from position t to position t-1 over all t >= 1.

    Args:
        model: loaded with ``attn_implementation="eager"``, so that it returns its weights.
        inputs: full (unpadded) windows of text, int64 ``[windows, length]``.
        batch: windows per forward pass.
    """
    return _diagonal_scores("previous-token", model, inputs, distance=1, first_query=1, batch=batch)


@torch.inference_mode()
def induction_scores(
    model: PreTrainedModel,
    end_of_text_id: int,
    *,
    seed: int = 0,
    sequences: int = 32,
    half: int = 128,
    batch: int = 4,
) -> HeadScores:
    """Mean weight from t, in the second half, to the position after t's token came first.

    The input is the bos token, ``half`` random tokens, and the same ``half`` tokens again, so
    nothing but copying can predict the second half.

    Args:
        model: loaded with ``attn_implementation="eager"``.
        end_of_text_id: the bos token, never among the random ones.
        seed: of the random tokens.
        sequences: number of sequences to average over.
        half: length in tokens of the repeated piece.
        batch: sequences per forward pass.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size: int = model.config.vocab_size
    piece = torch.randint(vocab_size - 1, (sequences, half), generator=generator)
    piece = piece + (piece >= end_of_text_id)
    start = torch.full((sequences, 1), end_of_text_id)
    inputs = torch.cat([start, piece, piece], dim=1)
    # The token at t stood at t - half before; the one after it, at t - half + 1.
    return _diagonal_scores(
        "induction", model, inputs, distance=half - 1, first_query=half + 1, batch=batch
    )


def _diagonal_scores(
    name: str,
    model: PreTrainedModel,
    inputs: torch.Tensor,
    *,
    distance: int,
    first_query: int,
    batch: int,
) -> HeadScores:
    """Average the weights from t to ``t - distance`` over ``t >= first_query``."""
    model.eval()
    sums: list[torch.Tensor] = []
    for first in range(0, len(inputs), batch):
        output = model(
            input_ids=inputs[first : first + batch], output_attentions=True, use_cache=False
        )
        # Each layer's weights are [batch, heads, query, key]; the diagonal starts at the
        # first query that has a key `distance` before it, position `distance`.
        rows = [
            weights.diagonal(-distance, 2, 3)[..., first_query - distance :].mean(-1).sum(0)
            for weights in output.attentions
        ]
        sums.append(torch.stack(rows))
    scores = torch.stack(sums).sum(0) / len(inputs)
    return HeadScores(name, tuple(tuple(float(x) for x in row) for row in scores))


def head_table(scores: HeadScores) -> str:
    """Lay out one kind of score, a layer per line and a head per column."""
    heads = len(scores.values[0])
    lines = [f"{scores.name} score", "layer " + "".join(f"  head {i:<2}" for i in range(heads))]
    for layer, row in enumerate(scores.values):
        lines.append(f"{layer:<6}" + "".join(f"  {score:7.3f}" for score in row))
    best = scores.best()
    lines.append(
        f"best: layer {best.layer} head {best.head} at {best.score:.3f} "
        f"(median of all heads {scores.median():.3f})"
    )
    return "\n".join(lines)
