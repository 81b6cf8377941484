"""What a prompt's logits come to in one number: the metrics of sweeps and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from trilens.caches.indices import check_index
from trilens.errors import MetricError, NonFiniteError, ShapeError, TokenIdError, UsageError
from trilens.io.messages import listed
from trilens.lens.lens import Lens
from trilens.models.tokens import read_prompt, vocab_size_of
from trilens.numbers import whole_number

__all__ = [
    "METRICS",
    "LogitMetric",
    "kl",
    "logit_diff",
    "loss",
    "metric_of",
    "target_prob",
    "token_id",
]

METRICS = ("logit_diff", "target_prob", "loss", "kl")

Token = SupportsIndex | str


@dataclass(frozen=True, slots=True, eq=False)
class LogitMetric:
    """A function of one prompt's logits with a name.

    Attributes:
        name: one of `METRICS`.
        title: the name with what it is of, such as "logit_diff(5, 9)".
    """

    name: str
    title: str
    _of: Callable[[Tensor], Tensor]

    @property
    def __name__(self) -> str:
        return self.title

    def __call__(self, logits: Tensor) -> Tensor:
        """The metric of logits [seq, vocab]: a scalar tensor, float32 or wider, differentiable.

        Raises:
            ShapeError: no such logits.
            OutOfRangeError, TokenIdError: they lack the position or a token.
        """
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(f"metric {self.title} of {shape}: logits [seq, vocab] are needed")
        # PROMOTE: differences of logits and softmaxes lose their digits in half precision.
        return self._of(logits if logits.dtype == torch.float64 else logits.float())

    def __repr__(self) -> str:
        return f"<metric {self.title}>"


def token_id(token: Token, lens: Lens | None = None) -> int:
    """A token as its id.

    Args:
        token: an id, or a text that is one token; a leading space counts.
        lens: its tokenizer reads a text; with it an id is checked against the vocabulary.

    Raises:
        UsageError: a text and no lens.
        TokenIdError: a text that is several tokens, which are named; an id that is not there.
        PromptError: as a prompt of this text: empty, no tokenizer.
    """
    if isinstance(token, str):
        if lens is None:
            raise UsageError(f"token {token!r} is text: give its id, or lens=… with a tokenizer")
        size = vocab_size_of(lens.model)
        prompt = read_prompt(
            token,
            tokenizer=lens.tokenizer,
            vocab_size=size,
            max_positions=None,
            add_special_tokens=False,
        )
        ids = prompt.ids.tolist()
        if len(ids) != 1:
            parts = listed([f"{s!r} ({i})" for s, i in zip(prompt.strings, ids, strict=True)], 8)
            raise TokenIdError(
                f"token {token!r} is {len(ids)} tokens of this model, {parts}: give one of them, "
                "or an id"
            )
        return int(ids[0])
    number = whole_number(token, "token")
    top = None if lens is None else lens.anatomy.vocab or vocab_size_of(lens.model)
    if number < 0 or (top is not None and number >= top):
        span = "0 or more" if top is None else f"0–{top - 1}"
        raise TokenIdError(f"token id {number} is out of range: this model has ids {span}")
    return number


def logit_diff(
    target: Token, against: Token, *, position: SupportsIndex = -1, lens: Lens | None = None
) -> LogitMetric:
    """Logit of a token minus another's, after a position.

    Args:
        target: a token id, or with `lens` a text that is one token.
        against: the other token.
        position: whose next token it is; negative from the end.
        lens: its tokenizer reads tokens that are texts.
    """
    first, second = token_id(target, lens), token_id(against, lens)

    def of(logits: Tensor) -> Tensor:
        row = _row(logits, position, first, second)
        return row[first] - row[second]

    return LogitMetric("logit_diff", f"logit_diff({first}, {second})", of)


def target_prob(
    target: Token, *, position: SupportsIndex = -1, lens: Lens | None = None
) -> LogitMetric:
    """Probability of a token after a position, in [0, 1]; arguments as `logit_diff`."""
    token = token_id(target, lens)

    def of(logits: Tensor) -> Tensor:
        return _row(logits, position, token).log_softmax(-1)[token].exp()

    return LogitMetric("target_prob", f"target_prob({token})", of)


def loss(ids: Tensor | np.ndarray[Any, Any] | Sequence[SupportsIndex]) -> LogitMetric:
    """Mean loss of predicting each token of a prompt but the first, in nats.

    Args:
        ids: [seq], the prompt's token ids, such as `Capture.token_ids`.

    Raises:
        MetricError: fewer than two tokens.
    """
    tokens = [whole_number(each, "token") for each in ids]
    if len(tokens) < 2:
        raise MetricError(f"loss of {len(tokens)} tokens: two or more are needed")

    def of(logits: Tensor) -> Tensor:
        if logits.shape[0] != len(tokens):
            raise ShapeError(
                f"loss of {len(tokens)} tokens and logits of {logits.shape[0]}: give the ids of "
                "the prompt that was run, and logits of all positions"
            )
        _row(logits, 0, *tokens[1:])
        following = torch.tensor(tokens[1:], device=logits.device)
        return torch.nn.functional.cross_entropy(logits[:-1], following)

    return LogitMetric("loss", f"loss({len(tokens)} tokens)", of)


def kl(reference_logits: Tensor) -> LogitMetric:
    """Mean divergence KL(reference ‖ logits) over positions, in nats, 0 or more.

    Args:
        reference_logits: [seq, vocab], such as `Capture.logits` of the run without edits.

    Raises:
        ShapeError: not [seq, vocab].
        NonFiniteError: NaN or +Inf among them.
    """
    if not isinstance(reference_logits, Tensor) or reference_logits.ndim != 2:
        raise ShapeError("kl needs reference logits [seq, vocab], such as Capture.logits")
    known = reference_logits.detach().float().log_softmax(-1)
    if bool(known.isnan().any()):
        raise NonFiniteError("reference logits hold NaN or +Inf: they give no probabilities")

    def of(logits: Tensor) -> Tensor:
        if logits.shape != known.shape:
            raise ShapeError(
                f"kl of logits {list(logits.shape)} to a reference {list(known.shape)}: the same "
                "positions and vocabulary are needed"
            )
        own = known.to(logits)
        gap = (own - logits.log_softmax(-1)).masked_fill(own == -torch.inf, 0.0)
        return (own.exp() * gap).sum(-1).mean()

    return LogitMetric("kl", "kl(reference)", of)


def metric_of(
    name: str,
    *,
    target: Token | None = None,
    against: Token | None = None,
    position: SupportsIndex = -1,
    ids: Tensor | Sequence[SupportsIndex] | None = None,
    reference_logits: Tensor | None = None,
    lens: Lens | None = None,
) -> LogitMetric:
    """The metric of this name, of `METRICS`, with the arguments that it takes.

    Raises:
        MetricError: no such name, or an argument that this metric needs was not given.
    """

    def need(value: Any, argument: str) -> Any:
        if value is None:
            raise MetricError(f"metric {name} needs {argument}: give {argument}=…")
        return value

    if name == "logit_diff":
        pair = need(target, "target"), need(against, "against")
        return logit_diff(*pair, position=position, lens=lens)
    if name == "target_prob":
        return target_prob(need(target, "target"), position=position, lens=lens)
    if name == "loss":
        return loss(need(ids, "ids"))
    if name == "kl":
        return kl(need(reference_logits, "reference_logits"))
    raise MetricError(f"metric {name!r} is unknown: the metrics are {', '.join(METRICS)}")


def _row(logits: Tensor, position: SupportsIndex, *tokens: int) -> Tensor:
    at = check_index(position, logits.shape[0], "position", "the logits", negative=True)
    for token in tokens:
        if not 0 <= token < logits.shape[1]:
            raise TokenIdError(
                f"token id {token} is out of range: the logits have ids 0–{logits.shape[1] - 1}"
            )
    return logits[at]
