"""The final norm and unembedding as one affine map of a residual stream: measured, then checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilens.errors import CaptureError
from trilens.models.anatomy import Anatomy
from trilens.models.trace import tensors_in

__all__ = ["FoldedHead", "folded_head"]

_NORM_ERROR = 1e-4  # of the largest entry; a norm that computes in float32 is off by 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class FoldedHead:
    """Logits of some tokens as an affine map, at the norm's scale of one residual stream.

    logit of token t, before a cap = directions[t] · x + biases[t].

    Attributes:
        directions: float64 [tokens, d_model].
        biases: float64 [tokens].
        facts: what was measured, in words.
    """

    directions: Tensor
    biases: Tensor
    facts: tuple[str, ...]


def folded_head(
    model: nn.Module, anatomy: Anatomy, residual: Tensor, tokens: Sequence[int]
) -> FoldedHead:
    """Fold the final norm, at the scale that it has for `residual`, into unembedding rows.

    Args:
        model: in eval mode.
        anatomy: its parts.
        residual: [d_model], the last layer's at one position.
        tokens: whose logits.

    Raises:
        CaptureError: the norm is not a factor per channel times the residual plus a constant, or
            the unembedding is not affine; says by how much.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    norm = _in_float64([modules[path] for path in anatomy.final_norm])
    x = residual.detach().double() * anatomy.final_scale
    factor, constant, centred, fact = _folded_norm(norm, x)
    rows, offsets = _rows(
        [modules[path] for path in anatomy.unembedding], norm(x).to(residual.dtype), tokens
    )
    rows, offsets = rows * anatomy.logit_scale, offsets * anatomy.logit_scale
    directions = rows * factor
    if centred:
        directions = directions - directions.mean(-1, keepdim=True)
    return FoldedHead(
        directions * anatomy.final_scale,
        offsets + rows @ constant,
        (fact, f"{' → '.join(anatomy.unembedding)}: affine, by its gradient"),
    )


def _in_float64(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The modules in a row, on a float64 copy of them, of one vector."""
    copies = [copy.deepcopy(module).double() for module in modules]

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        values = x[None, None]
        for module in copies:
            values = next(tensors_in(module(values)))
        return values[0, 0].double()

    return run


def _folded_norm(norm: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, bool, str]:
    """Factor and constant per channel, and whether the mean over channels is subtracted."""
    constant, normed = norm(torch.zeros_like(x)), norm(x)
    own = normed - constant
    size = float(own.abs().max())
    shifted = norm(x + x.abs().mean() + 1.0)
    centred = bool((shifted - normed).abs().max() <= _NORM_ERROR * size)
    weight = torch.ones_like(x)
    alternating = torch.ones_like(x)
    alternating[1::2] = -1.0

    def part(values: Tensor) -> Tensor:
        return values - values.mean() if centred else values

    weight = (norm(alternating) - constant) / part(alternating)
    line = weight * part(x)
    scale = float(own @ line) / max(float(line @ line), torch.finfo(x.dtype).tiny)
    error = float((scale * line - own).abs().max())
    kind = "subtracts the mean" if centred else "leaves the mean"
    if not error <= _NORM_ERROR * size:
        raise CaptureError(
            f"the final norm cannot be folded: it {kind}, and weight · scale · x + bias is off by "
            f"{error / size if size else error:.2g} of its largest entry"
        )
    return weight * scale, constant, centred, f"final norm: {kind}; scale {scale:.4g}"


def _rows(
    modules: Sequence[nn.Module], hidden: Tensor, tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Each token's row and offset of an affine map, float64, from its gradient and its zero."""

    def run(values: Tensor) -> Tensor:
        values = values[None, None]
        for module in modules:
            like = next(module.parameters(), values)
            values = next(tensors_in(module(values.to(like.dtype))))
        return values[0, 0]

    chosen = list(tokens)
    with torch.enable_grad():
        start = torch.zeros_like(hidden).requires_grad_()
        made = run(start)
        rows = torch.stack(
            [torch.autograd.grad(made[token], start, retain_graph=True)[0] for token in chosen]
        ).double()
    with torch.no_grad():
        offsets, full = made.detach()[chosen].double(), run(hidden)[chosen].double()
    terms = (rows * hidden.double()).abs().sum(-1) + offsets.abs()
    error = (rows @ hidden.double() + offsets - full).abs()
    bound = 4 * len(hidden) ** 0.5 * torch.finfo(made.dtype).eps * terms
    if bool((error > bound).any()):
        raise CaptureError(
            f"the unembedding is not affine: it is off by {float((error / terms).max()):.2g} of "
            "its terms, so that parts of its input have no logits of their own"
        )
    return rows, offsets
