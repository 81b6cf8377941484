"""At which layer the final top token appears, before and after.

The residual stream after each block goes through the model's own final norm and unembedding; a
position converges at the first layer from which on the top token is that of the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilens.analysis.comparison.rows import Place, Row
from trilens.analysis.residual_logits import residual_logits
from trilens.lens.lens import Lens

__all__ = ["LensAccumulator", "convergence_layers"]

_MODULE = "logit_lens"


class LensAccumulator:
    """Takes the convergence layers of positions of both models.

    Memory:
        a number per layer.
    """

    __slots__ = ("_counts", "_n_layers")

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._counts = torch.zeros(2, n_layers, dtype=torch.int64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Convergence layers of the same positions.

        Shapes:
            before, after int64 [positions].
        """
        for side, layers in enumerate((before, after)):
            self._counts[side] += torch.bincount(layers, minlength=self._n_layers)

    def rows(self) -> list[Row]:
        """Share of positions that have converged, per layer, and the mean convergence layer."""
        total = int(self._counts[0].sum())
        if not total:
            return []
        converged = (self._counts.cumsum(-1).double() / total).tolist()
        rows = [
            Place(_MODULE, layer).change("settled", converged[0][layer], converged[1][layer])
            for layer in range(self._n_layers)
        ]
        means = (self._counts * torch.arange(self._n_layers)).sum(-1).double() / total
        rows.append(Place(_MODULE).change("settle_layer", *means.tolist()))
        return rows


def convergence_layers(lens: Lens, residuals: Sequence[Tensor], vocab: int | None = None) -> Tensor:
    """First layer from which on the top token is that of the last layer.

    Args:
        lens: the model.
        residuals: its residual streams.
        vocab: only ids below this can be the top token; None for all.

    Shapes:
        residuals one [positions, d_model] per layer; returns int64 [positions], on the CPU.

    Memory:
        logits of some positions at a time, 32 MB in float32.
    """
    layers, found = len(residuals), []
    for _, logits in residual_logits(lens, residuals, vocab):
        top = logits.argmax(-1).cpu()
        other = (top != top[-1]).long()
        # One beyond the last layer with another top token; 0 where none has.
        beyond = torch.arange(1, layers + 1)[:, None] * other
        found.append(beyond.amax(0))
    return torch.cat(found)
