"""What two models predict of the same tokens: perplexity, KL divergence, top tokens.

Streamed: logits come in prompt by prompt and are gone again; one float per token stays, for the
percentiles, and three numbers per prompt, for the confidence of the perplexity.

A chunk of rows is small enough to stay in the processor's cache while all questions are put to it,
so that the logits are read from memory once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import NonFiniteError, ShapeError, UsageError, ValueRangeError
from trilens.evaluation.loop import perplexity_of, row_chunks, softmax_terms
from trilens.statistics.divergence import kl_nats

__all__ = ["Interval", "OutputAccumulator", "OutputResult"]

_SPAN = 64
_TOP = 5
_MODULE = "output"
_ROUNDS = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % bootstrap interval of a mean over tokens, prompts resampled."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class OutputResult:
    """How far the next-token distributions of two models are apart.

    Attributes:
        n_prompts: prompts that were compared.
        n_tokens: positions whose distributions were compared: all that predict a next token, or,
            without next tokens, all.
        kl_nats_mean: mean KL(before ‖ after), in [0, Inf].
        kl_nats_median: its median over tokens.
        kl_nats_p99: its 99th percentile: between two values the higher one, which stays a number
            where values are infinite.
        kl_nats_max: its maximum.
        same_top1: share of positions with the same most probable token, in [0, 1].
        same_top5: mean share of the five most probable tokens that both have, in [0, 1].
        nll_nats_before: mean negative log-likelihood of the next token; None without next tokens.
        nll_nats_after: likewise.
        target_probability_before: mean probability of the next token.
        target_probability_after: likewise.
        target_probability_rms_change: root mean square of its change, in [0, 1].
        nll_interval_before: of the mean; None with fewer than two prompts.
        nll_interval_after: likewise.
        nll_interval_change: of after − before, prompts resampled in pairs.
        token_kl_nats: float32 [n_tokens], read-only, in the order of the tokens.
        prompt_tokens: int64 [n_prompts], positions of each prompt.
        prompt_nll_nats: float64 [n_prompts, 2], summed over each prompt, before and after.
    """

    n_prompts: int
    n_tokens: int
    kl_nats_mean: float
    kl_nats_median: float
    kl_nats_p99: float
    kl_nats_max: float
    same_top1: float
    same_top5: float
    nll_nats_before: float | None
    nll_nats_after: float | None
    target_probability_before: float | None
    target_probability_after: float | None
    target_probability_rms_change: float | None
    nll_interval_before: Interval | None
    nll_interval_after: Interval | None
    nll_interval_change: Interval | None
    token_kl_nats: NDArray[np.float32]
    prompt_tokens: NDArray[np.int64]
    prompt_nll_nats: NDArray[np.float64]

    @property
    def perplexity_before(self) -> float | None:
        """exp of the mean negative log-likelihood; infinite beyond the range of floats."""
        return None if self.nll_nats_before is None else perplexity_of(self.nll_nats_before)

    @property
    def perplexity_after(self) -> float | None:
        """exp of the mean negative log-likelihood; infinite beyond the range of floats."""
        return None if self.nll_nats_after is None else perplexity_of(self.nll_nats_after)

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity after / before."""
        if self.nll_nats_before is None or self.nll_nats_after is None:
            return None
        return perplexity_of(self.nll_nats_after - self.nll_nats_before)


class OutputAccumulator:
    """Takes the logits of two models prompt by prompt; `result()` gives how far they are apart.

    Args:
        next_token: position i predicts token i + 1. False for a model that does not, such as a
            masked language model: then every position counts and there are no target tokens.
        seed: of the bootstrap.

    Memory:
        4 bytes per token and 24 per prompt.
    """

    def __init__(self, *, next_token: bool = True, seed: int = 0) -> None:
        self._next_token = next_token
        self._seed = seed
        self._kl: list[NDArray[np.float32]] = []
        self._nll: list[tuple[float, float]] = []
        self._tokens: list[int] = []
        self._likely = [0.0, 0.0]
        self._square = 0.0
        self._top1 = self._top5 = 0
        self._vocab = 0

    @property
    def n_tokens(self) -> int:
        """Positions compared so far."""
        return sum(self._tokens)

    @torch.no_grad()
    def add(self, logits_before: Tensor, logits_after: Tensor, ids: Tensor) -> None:
        """One prompt; one that is refused leaves the accumulator as it was.

        Shapes:
            logits_before, logits_after [seq, vocab], of any floating dtype and device; ids [seq].

        Raises:
            ShapeError: shapes that do not fit each other, or no position to compare.
            NonFiniteError: NaN, +Inf, or a row of −Inf alone, naming model and token.
        """
        self._check(logits_before, logits_after, ids)
        if self._next_token:
            logits_before, logits_after, targets = logits_before[:-1], logits_after[:-1], ids[1:]
        else:
            targets = ids
        # Two models may lie on two devices.
        targets = targets.to(logits_before.device, torch.long)
        chunks = []
        for rows in row_chunks(len(targets), logits_before.shape[1]):
            p = logits_before[rows].float()
            q = logits_after[rows].to(p.device).float()
            chunks.append(_chunk(p, q, targets[rows], rows.start))
        # PROMOTE: sums over a corpus drift in float32.
        found = torch.cat(chunks, dim=1).double().cpu().numpy()
        kl, log_p, log_q, top1, top5 = found
        self._vocab = logits_before.shape[1]
        self._kl.append(kl.astype(np.float32))
        self._tokens.append(kl.size)
        self._top1 += int(top1.sum())
        self._top5 += int(top5.sum())
        self._nll.append((-float(log_p.sum()), -float(log_q.sum())))
        likely, likely_after = np.exp(log_p), np.exp(log_q)
        self._likely[0] += float(likely.sum())
        self._likely[1] += float(likely_after.sum())
        self._square += float(np.square(likely_after - likely).sum())

    def result(self) -> OutputResult:
        """Everything seen so far; the accumulator can go on afterwards.

        Raises:
            UsageError: no prompt was added.
        """
        if not self._tokens:
            raise UsageError("nothing was compared: add the logits of at least one prompt")
        kl = np.concatenate(self._kl)
        kl.setflags(write=False)
        n, wide = kl.size, kl.astype(np.float64)
        tokens = np.asarray(self._tokens, dtype=np.int64)
        nll = np.asarray(self._nll, dtype=np.float64).reshape(-1, 2)
        causal = self._next_token
        intervals = _bootstrap(nll, tokens, self._seed) if causal else (None, None, None)
        before, after = nll.sum(0) / n
        return OutputResult(
            n_prompts=len(tokens),
            n_tokens=n,
            kl_nats_mean=float(wide.mean()),
            kl_nats_median=float(np.median(wide)),
            kl_nats_p99=_percentile(wide, 99),
            kl_nats_max=float(wide.max()),
            same_top1=self._top1 / n,
            same_top5=self._top5 / (n * min(_TOP, self._vocab)),
            nll_nats_before=float(before) if causal else None,
            nll_nats_after=float(after) if causal else None,
            target_probability_before=self._likely[0] / n if causal else None,
            target_probability_after=self._likely[1] / n if causal else None,
            target_probability_rms_change=math.sqrt(self._square / n) if causal else None,
            nll_interval_before=intervals[0],
            nll_interval_after=intervals[1],
            nll_interval_change=intervals[2],
            token_kl_nats=kl,
            prompt_tokens=tokens,
            prompt_nll_nats=nll,
        )

    def _check(self, before: Tensor, after: Tensor, ids: Tensor) -> None:
        if before.dim() != 2 or before.shape != after.shape or not before.shape[1]:
            raise ShapeError(
                f"logits have shapes {list(before.shape)} before and {list(after.shape)} after: "
                "both are [seq, vocab] of the same tokens"
            )
        if self._vocab and before.shape[1] != self._vocab:
            raise ShapeError(
                f"logits are over {before.shape[1]} tokens, those before over {self._vocab}: "
                "all prompts have one vocabulary"
            )
        if tuple(ids.shape) != (before.shape[0],):
            raise ShapeError(
                f"ids have shape {list(ids.shape)}: one id for each of {before.shape[0]} positions"
            )
        minimum = 2 if self._next_token else 1
        if len(ids) < minimum:
            raise ShapeError(
                f"prompt of {len(ids)} tokens has nothing to compare: it needs {minimum} or more"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= before.shape[1]:
            raise ValueRangeError(
                f"token ids {int(ids.min())}–{int(ids.max())} are out of range: the logits are "
                f"over 0–{before.shape[1] - 1}"
            )


def _chunk(p: Tensor, q: Tensor, targets: Tensor, first: int) -> Tensor:
    """KL, log probability of the target token before and after, same top 1, top 5 in common.

    Shapes:
        p, q float32 [rows, vocab]; targets [rows]; returns float32 [5, rows].
    """
    top_p, best_p = _top(p)
    top_q, best_q = _top(q)
    for side, best in (("before", best_p), ("after", best_q)):
        # The largest logit is NaN, Inf or −Inf exactly where the row is no distribution.
        bad = ~best.isfinite()
        if bad.any():
            row = first + int(bad.nonzero()[0, 0])
            raise NonFiniteError(
                f"logits of the model {side} hold NaN or +Inf, or −Inf alone, at token {row}: "
                "its weights or its arithmetic overflow"
            )
    share, total, target_p = softmax_terms(p, best_p, targets)
    scratch, other_total, target_q = softmax_terms(q, best_q, targets)
    # Σ p (ln p − ln q), with what does not depend on the token taken out of the sum: best_p −
    # best_q stays within the difference, where equal logits give exactly 0.
    gap = torch.sub(p, q, out=scratch)
    mean_gap = share.mul_(gap).sum(-1, keepdim=True) / total
    kl = (mean_gap - ((best_p - best_q) + (total.log() - other_total.log()))).clamp_(min=0.0)
    if not bool(kl.isfinite().all()):
        # A token that one model excludes (−Inf) needs care; few models do that.
        kl = torch.from_numpy(kl_nats(p, q)).to(kl.dtype).to(kl.device)[:, None]
    common = (top_p[:, :, None] == top_q[:, None, :]).sum((1, 2))
    rows = (
        kl[:, 0],
        target_p,
        target_q,
        (top_p[:, 0] == top_q[:, 0]).float(),
        common.float(),
    )
    return torch.stack(rows)


def _top(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable tokens, descending, and the largest logit.

    The largest of each span of tokens is a cheap question, and the top five lie in the five spans
    with the largest ones; only those are sorted.

    Shapes:
        rows [rows, vocab]; returns int64 [rows, 5] and float32 [rows, 1].
    """
    n, vocab = rows.shape
    whole = vocab - vocab % _SPAN
    k = min(_TOP, vocab)
    if whole <= 2 * _TOP * _SPAN:
        values, found = rows.topk(k)
        return found, rows.amax(-1, keepdim=True)
    spans = rows[:, :whole].reshape(n, -1, _SPAN)
    largest = spans.amax(-1)
    chosen = largest.topk(k).indices
    tokens = (chosen[:, :, None] * _SPAN + torch.arange(_SPAN, device=rows.device)).flatten(1)
    rest = torch.arange(whole, vocab, device=rows.device).expand(n, -1)
    tokens = torch.cat([tokens, rest], dim=1)
    values, places = rows.gather(1, tokens).topk(k)
    best = torch.maximum(largest.amax(-1, keepdim=True), values[:, :1])
    return tokens.gather(1, places), best


def _bootstrap(
    nll: NDArray[np.float64], tokens: NDArray[np.int64], seed: int
) -> tuple[Interval | None, Interval | None, Interval | None]:
    """Intervals of the mean before, after and of its change; whole prompts are drawn."""
    n = len(tokens)
    if n < 2:
        return None, None, None
    generator = np.random.default_rng(seed)
    means = np.empty((_ROUNDS, 2))
    for i in range(_ROUNDS):
        times = np.bincount(generator.integers(0, n, n), minlength=n)
        means[i] = (times @ nll) / (times @ tokens)
    columns = (means[:, 0], means[:, 1], means[:, 1] - means[:, 0])
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, middle, high = (
        Interval(_percentile(column, tail), _percentile(column, 100 - tail)) for column in columns
    )
    return low, middle, high


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    # Between two infinities there is nothing to interpolate.
    return float(np.percentile(values, percent, method="higher"))
