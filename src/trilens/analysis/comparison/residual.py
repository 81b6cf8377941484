"""The residual stream of two models on the same tokens, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from trilens.analysis.comparison.rows import Row, against_itself
from trilens.errors import ShapeError

__all__ = ["ResidualAccumulator"]

_MODULE = "resid_post"


class ResidualAccumulator:
    """Takes both streams of a layer, prompt by prompt.

    Errors are relative to each token's own norm and averaged after: the few tokens with enormous
    residuals that many models have would otherwise be all that is seen.
    """

    __slots__ = ("_prompts", "_sums", "_tokens")

    def __init__(self) -> None:
        # Per layer: cosine and error over all tokens, cosine and error of the last ones.
        self._sums: dict[int, list[float]] = {}
        self._tokens: dict[int, int] = {}
        self._prompts: dict[int, int] = {}

    def add(self, layer: int, before: Tensor, after: Tensor) -> None:
        """One prompt's streams after one block.

        Shapes:
            before, after [seq, d_model], finite, of any floating dtype.

        Raises:
            ShapeError: shapes that differ.
        """
        if before.shape != after.shape:
            raise ShapeError(
                f"residual of layer {layer} is {list(before.shape)} before and "
                f"{list(after.shape)} after: the same tokens and width are needed"
            )
        cosine, error = _apart(before, after)
        sums = self._sums.setdefault(layer, [0.0] * 4)
        new = (cosine.sum(), error.sum(), cosine[-1], error[-1])
        for i, value in enumerate(torch.stack(new).tolist()):
            sums[i] += value
        self._tokens[layer] = self._tokens.get(layer, 0) + len(cosine)
        self._prompts[layer] = self._prompts.get(layer, 0) + 1

    def rows(self) -> list[Row]:
        """Cosine and relative error per layer, of all tokens and of the last."""
        found = []
        for layer, sums in sorted(self._sums.items()):
            tokens, prompts = self._tokens[layer], self._prompts[layer]
            values = (
                ("cosine", sums[0] / tokens, 1.0),
                ("relative_error", sums[1] / tokens, 0.0),
                ("cosine_last", sums[2] / prompts, 1.0),
                ("relative_error_last", sums[3] / prompts, 0.0),
            )
            found += [
                against_itself(metric, value, module=_MODULE, layer=layer, itself=itself)
                for metric, value, itself in values
            ]
        return found


def _apart(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and relative error of each token: float64 [seq] each.

    1 − cos is taken from the distance of the unit vectors, |u − v|² / 2: for streams that nearly
    agree, 1 minus a quotient near 1 would have no digits left.
    """
    # PROMOTE: squares of bfloat16 residuals have two digits, and overflow in float16.
    a, b = before.double(), after.to(before.device).double()
    norm_a = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    norm_b = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    gap = torch.linalg.vector_norm(a - b, dim=-1)
    unit_a = a / norm_a.masked_fill(norm_a == 0, 1)
    unit_b = b / norm_b.masked_fill(norm_b == 0, 1)
    apart = torch.linalg.vector_norm(unit_a - unit_b, dim=-1).square() / 2
    cosine = (1 - apart).clamp(-1, 1)
    # A zero vector and another: no angle, 0. Two zero vectors are equal, 1.
    none = (norm_a == 0).logical_xor(norm_b == 0)[:, 0]
    cosine = cosine.masked_fill(none, 0)
    ratio = gap / norm_a[:, 0]
    return cosine, ratio.square().masked_fill(gap == 0, 0)
