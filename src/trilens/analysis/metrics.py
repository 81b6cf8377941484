"""What is asked of logits: pure, differentiable functions that give one number.

Each function here makes a metric: a callable that takes logits [..., seq, vocab] of one prompt, or
of a batch of equally long ones, and gives a scalar tensor, the mean over a batch. Positions count
from 0, or from the end; the last is asked where none is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from trilens.analysis.tokens import Token, token_id
from trilens.caches.indices import check_index
from trilens.errors import MetricError, OutOfRangeError, ShapeError
from trilens.lens.gradients import Metric
from trilens.lens.lens import Lens
from trilens.numbers import whole_number

__all__ = ["METRICS", "kl", "logit_diff", "loss", "metric_of", "target_prob"]

Target = int | Sequence[int] | Tensor
"""A token id, or one for each prompt of a batch."""


def logit_diff(target: Target, against: Target, *, position: SupportsIndex = -1) -> Metric:
    """The logit of one token less that of another.

    Args:
        target: a token id, or one for each prompt of a batch.
        against: likewise.
        position: whose logits.
    """

    def logit_diff(logits: Tensor) -> Tensor:
        row = _row(logits, position)
        return (_of(row, target) - _of(row, against)).mean()

    return logit_diff


def target_prob(target: Target, *, position: SupportsIndex = -1) -> Metric:
    """The probability of a token, in [0, 1]; arguments as in `logit_diff`."""

    def target_prob(logits: Tensor) -> Tensor:
        return _of(_row(logits, position).log_softmax(-1), target).exp().mean()

    return target_prob


def loss(ids: Sequence[int] | Tensor) -> Metric:
    """Mean negative log-likelihood, in nats, of every token but the first.

    Args:
        ids: the prompt's token ids [..., seq].
    """
    tokens = torch.as_tensor(ids)

    def loss(logits: Tensor) -> Tensor:
        _check(logits)
        if tokens.is_floating_point() or tokens.shape[-1:] != logits.shape[-2:-1]:
            raise ShapeError(
                f"token ids {list(tokens.shape)} of {tokens.dtype} do not fit logits "
                f"{list(logits.shape)}: one id for each position is needed"
            )
        if tokens.shape[-1] < 2:
            raise MetricError("loss of one token is not defined: the first token is not predicted")
        following = tokens[..., 1:].to(logits.device, torch.int64)
        _check_ids(following, logits.shape[-1])
        scores = logits[..., :-1, :].log_softmax(-1)
        following = following.expand(scores.shape[:-1])
        return -scores.gather(-1, following[..., None]).mean()

    return loss


def kl(reference: Tensor, *, position: SupportsIndex | None = -1) -> Metric:
    """KL(reference ‖ logits) in nats, in [0, Inf].

    Args:
        reference: logits [..., seq, vocab], such as those of a run without edits; detached. One
            row is enough for one position: [..., 1, vocab].
        position: whose logits; None for the mean over all positions.
    """
    fixed = reference.detach()

    def kl(logits: Tensor) -> Tensor:
        _check(logits)
        _check(fixed)
        if fixed.shape[-1] != logits.shape[-1]:
            raise ShapeError(
                f"reference has {fixed.shape[-1]} tokens and the logits {logits.shape[-1]}: both "
                "are over the same vocabulary"
            )
        p, q = fixed, logits
        if position is None:
            if p.shape[-2] != q.shape[-2]:
                raise ShapeError(
                    f"reference has {p.shape[-2]} positions and the logits {q.shape[-2]}: give "
                    "logits of the same tokens, or a position"
                )
        else:
            p = p[..., 0, :] if p.shape[-2] == 1 else _row(p, position)
            q = _row(q, position)
        log_p = p.to(q.device, q.dtype).log_softmax(-1)
        log_q = q.log_softmax(-1)
        excluded = log_p == -torch.inf
        terms = log_p.exp() * (log_p - log_q).masked_fill(excluded, 0.0)
        return terms.sum(-1).mean()

    return kl


METRICS: dict[str, tuple[Callable[..., Metric], tuple[str, ...]]] = {
    "logit_diff": (logit_diff, ("target", "against")),
    "target_prob": (target_prob, ("target",)),
    "loss": (loss, ("ids",)),
    "kl": (kl, ("reference",)),
}
"""Metrics by name, with what each needs."""


def metric_of(
    metric: str | Metric,
    *,
    lens: Lens | None = None,
    target: Token | Target | None = None,
    against: Token | Target | None = None,
    ids: Sequence[int] | Tensor | None = None,
    reference: Tensor | None = None,
    position: SupportsIndex | None = None,
) -> Metric:
    """A metric by its name, or a function of logits as it is.

    Args:
        metric: "logit_diff", "target_prob", "loss", "kl", or a function.
        lens: reads tokens that are given as text.
        target: for logit_diff and target_prob.
        against: for logit_diff.
        ids: for loss: the prompt's token ids.
        reference: for kl: logits.
        position: for all but loss; the last where not given.

    Raises:
        MetricError: an unknown name, or something that it needs is not given.
        UsageError: a text that is not one token.
    """
    if not isinstance(metric, str):
        if not callable(metric):
            raise MetricError(
                f"metric {metric!r} is neither a function of logits nor one of {_names()}"
            )
        return metric
    if metric not in METRICS:
        raise MetricError(f"metric {metric!r} is unknown: the names are {_names()}")
    make, needed = METRICS[metric]
    given = {
        "target": _read(lens, target),
        "against": _read(lens, against),
        "ids": ids,
        "reference": reference,
    }
    missing = [name for name in needed if given[name] is None]
    if missing:
        raise MetricError(f"metric {metric} needs {' and '.join(missing)}: give {missing[0]}=…")
    options: dict[str, Any] = {name: given[name] for name in needed}
    if position is not None and metric != "loss":
        options["position"] = position
    return make(**options)


def _names() -> str:
    return ", ".join(METRICS)


def _read(lens: Lens | None, token: Token | Target | None) -> Target | None:
    if isinstance(token, str):
        if lens is None:
            raise MetricError(f"token {token!r} is text: give lens=…, or a token id")
        return token_id(lens, token)
    return token


def _check(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(f"logits are {what}: a floating-point tensor [..., seq, vocab] is needed")


def _row(logits: Tensor, position: SupportsIndex) -> Tensor:
    _check(logits)
    at = check_index(position, logits.shape[-2], "position", "these logits", negative=True)
    return logits[..., at, :]


def _of(row: Tensor, target: Target) -> Tensor:
    """Entries [...] of rows [..., vocab]."""
    if isinstance(target, Tensor | Sequence):
        ids = torch.as_tensor(target).to(row.device)
        if ids.is_floating_point() or ids.shape not in (torch.Size(), row.shape[:-1]):
            raise ShapeError(
                f"target is {list(ids.shape)} of {ids.dtype}: a token id, or one for each of "
                f"{list(row.shape[:-1])} prompts, is needed"
            )
        ids = ids.to(torch.int64)
    else:
        ids = torch.tensor(whole_number(target, "token id"), device=row.device)
    _check_ids(ids, row.shape[-1])
    return row.gather(-1, ids.expand(row.shape[:-1])[..., None])[..., 0]


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        low, high = int(ids.min()), int(ids.max())
        raise OutOfRangeError(
            f"token ids {low}–{high} are out of range: the logits are over 0–{vocab - 1}"
            if low != high
            else f"token id {low} is out of range: the logits are over 0–{vocab - 1}"
        )
