"""Whether heads raise the logit of the token that they look at, measured on a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trilens.analysis.lenses.readout import logits_of_tokens
from trilens.caches.activation import FullActivationCache
from trilens.caches.patterns.protocol import BLOCK_BYTES, Pattern
from trilens.errors import NotStoredError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens

__all__ = ["copying_scores"]

_SITE = "attn.head_out"
_CLOSE = 1e-2  # attn.add and attn.out, as a bfloat16 model rounds them


def copying_scores(
    cap: Capture,
    lens: Lens,
    layer: int,
    pattern: Pattern,
    successors: Mapping[int, int] | None = None,
) -> tuple[Tensor, str]:
    """How a head's output ranks the token that it looks at among all tokens of the prompt.

    For each query the direct effect of a head on a token's logit is what the logit loses where
    the head's output is taken out of the last residual stream, final norm recomputed. The score is
    the share of the prompt's other tokens that are raised less than the one the head looks at
    most, averaged with that weight over queries: near 1 the head copies, near 0 it suppresses what
    it sees, 0.5 is chance. Position 0 is never what a head looks at: heads rest there.

    Args:
        cap: with residual="all" and sites "attn.head_out", "attn.out" and "attn.add".
        lens: the model.
        layer: whose heads.
        pattern: their weights.
        successors: token id → the id asked for in its place; tokens without one are left out.

    Returns:
        Float64 [heads], in [0, 1], NaN where nothing could be asked; and why, or "".

    Raises:
        NotStoredError: the capture does not hold what is needed.
    """
    residual, last = cap.residual, cap.model.n_layers - 1
    if not isinstance(residual, FullActivationCache) or last not in residual.layers:
        raise NotStoredError(
            f"copying scores need the last layer's residual of all tokens: capture layer {last} "
            "with residual='all'"
        )
    none = torch.full((pattern.heads,), torch.nan, dtype=torch.float64)
    if lens.n_streams > 1:
        return none, (
            f"layer {layer}: what attention gives goes into {lens.n_streams} residual streams, so "
            "that its heads have no direct effect of their own"
        )
    if (_SITE, layer) not in cap.sites and lens.why_no_site(_SITE, layer):
        return none, f"layer {layer} has no {_SITE}: {lens.why_no_site(_SITE, layer)}"
    heads = cap.sites[_SITE, layer]
    factor = _factor(cap.sites["attn.out", layer], cap.sites["attn.add", layer])
    if factor is None:
        return none, (
            f"layer {layer}: what attention adds to the stream is neither a multiple of attn.out "
            "nor its root-mean-square norm, so that its heads have no direct effect of their own"
        )
    ids = cap.token_ids.cpu()
    weights, at = _attended(pattern)
    known = {token: token for token in ids.tolist()} if successors is None else dict(successors)
    asked = [[known.get(token, -1) for token in row] for row in ids[at].tolist()]
    targets = torch.tensor(asked)
    tokens = torch.tensor(sorted({*ids.tolist(), *targets[targets >= 0].tolist()}))
    weights = weights * (targets >= 0)
    if len(tokens) < 2:
        return none, "a prompt of one token has no others to rank"
    stream = residual[last]
    whole = logits_of_tokens(lens, stream, tokens)
    scores = none.clone()
    for head in range(pattern.heads):
        without = logits_of_tokens(lens, stream - (factor * heads[:, head]).to(stream), tokens)
        effect = whole - without
        places = torch.searchsorted(tokens, targets[head].clamp(min=int(tokens[0])))
        own = effect.gather(1, places[:, None])
        less = (effect < own).sum(1) + 0.5 * ((effect == own).sum(1) - 1)
        share = less.double() / (len(tokens) - 1)
        # No weight at all: 0 / 0 is NaN.
        scores[head] = (share * weights[head]).sum() / weights[head].sum()
    return scores, ""


def _factor(out: Tensor, add: Tensor) -> Tensor | None:
    """What attn.out is multiplied by to be attn.add, where that is a number or a norm's factors.

    A root-mean-square norm between the two divides each token by its root mean square and weighs
    the channels: as it stands it is linear, and each head's share goes through it alike.

    Shapes: [1, 1] or [seq, d_model]
    """
    x, y = out.double(), add.double()

    def fitted(x: Tensor, over: tuple[int, ...]) -> Tensor:
        squares = x.square().sum(over, keepdim=True).clamp(min=1e-300)
        return (x * y).sum(over, keepdim=True) / squares

    norms = x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-300)
    # Of one token every difference is a factor of the channels: no norm can be told from another.
    by_channel = [fitted(x / norms, (0,)) / norms] if len(x) > 1 else []
    for factor in (fitted(x, (0, 1)), *by_channel):
        if float((y - factor * x).norm()) <= _CLOSE * float(y.norm()):
            return factor
    return None


def _attended(pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Weight and position of the key that each query looks at most, position 0 left out.

    Shapes: float64 and int64 [heads, seq]
    """
    n = pattern.seq_q
    step = max(1, BLOCK_BYTES // (4 * pattern.heads * pattern.seq_k))
    found = []
    for start in range(0, n, step):
        weights = pattern.rows(range(start, min(start + step, n))).cpu()
        weights[..., 0] = 0.0
        found.append(weights.max(-1))
    return (
        torch.cat([each.values for each in found], 1).double(),
        torch.cat([each.indices for each in found], 1),
    )
