"""The residual stream of two models on the same tokens, layer by layer."""

from __future__ import annotations

from torch import Tensor

from trilens.analysis.comparison.rows import Place, Row
from trilens.errors import ShapeError
from trilens.statistics.divergence import cosine, relative_errors

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
            before, after [seq, d_model], or [seq, streams, d_model], which are one vector of all
            streams side by side; finite, of any floating dtype.

        Raises:
            ShapeError: shapes that differ.
        """
        if before.shape != after.shape:
            raise ShapeError(
                f"residual of layer {layer} is {list(before.shape)} before and "
                f"{list(after.shape)} after: the same tokens and width are needed"
            )
        before, after = before.flatten(1), after.flatten(1)
        angles, errors = cosine(before, after), relative_errors(before, after)
        sums = self._sums.setdefault(layer, [0.0] * 4)
        for i, value in enumerate((angles.sum(), errors.sum(), angles[-1], errors[-1])):
            sums[i] += float(value)
        self._tokens[layer] = self._tokens.get(layer, 0) + len(angles)
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
            found += [Place(_MODULE, layer).against_itself(*each) for each in values]
        return found
