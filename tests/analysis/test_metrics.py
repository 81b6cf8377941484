"""Metrics against formulas written out, in float64; what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

import trilens
from lens_cases import demo_lens
from tolerances import sum_error
from trilens.analysis import kl, logit_diff, loss, metric_of, target_prob
from trilens.analysis.tokens import token_id
from trilens.errors import (
    MetricError,
    OutOfRangeError,
    ShapeError,
    TokenIdError,
    UsageError,
)
from trilens.lens.gradients import scalar_of

SEQ, VOCAB = 5, 11
CLOSE = float(sum_error(VOCAB * SEQ, 10.0))


def logits(seed: int = 0, *lead: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, SEQ, VOCAB, generator=generator, dtype=torch.float64) * 2


def by_hand(row: torch.Tensor) -> list[float]:
    """Probabilities of one row."""
    shares = [math.exp(value) for value in row.tolist()]
    return [share / math.fsum(shares) for share in shares]


def test_each_metric_is_its_formula() -> None:
    x, y = logits(), logits(1)
    assert float(logit_diff(3, 7)(x)) == float(x[-1, 3] - x[-1, 7])
    assert float(logit_diff(3, 7, position=1)(x)) == float(x[1, 3] - x[1, 7])
    assert float(target_prob(4)(x)) == pytest.approx(by_hand(x[-1])[4], abs=CLOSE)
    ids = [2, 9, 0, 4, 10]
    nats = [-math.log(by_hand(x[i])[ids[i + 1]]) for i in range(SEQ - 1)]
    assert float(loss(ids)(x)) == pytest.approx(math.fsum(nats) / len(nats), abs=CLOSE)

    def divergence(i: int) -> float:
        pairs = zip(by_hand(y[i]), by_hand(x[i]), strict=True)
        return math.fsum(p * math.log(p / q) for p, q in pairs)

    assert float(kl(y)(x)) == pytest.approx(divergence(-1), abs=CLOSE)
    assert float(kl(y[2:3], position=2)(x)) == pytest.approx(divergence(2), abs=CLOSE)
    mean = math.fsum(divergence(i) for i in range(SEQ)) / SEQ
    assert float(kl(y, position=None)(x)) == pytest.approx(mean, abs=CLOSE)
    assert float(kl(x)(x)) == 0.0


def test_a_batch_is_the_mean_of_its_prompts() -> None:
    x = logits(2, 3)
    targets, against = [1, 4, 9], torch.tensor([0, 0, 5])
    single = [logit_diff(a, int(b))(row) for a, b, row in zip(targets, against, x, strict=True)]
    assert float(logit_diff(targets, against)(x)) == pytest.approx(
        float(torch.stack(single).mean()), abs=CLOSE
    )
    one = [target_prob(2)(row) for row in x]
    assert float(target_prob(2)(x)) == pytest.approx(float(torch.stack(one).mean()), abs=CLOSE)


@pytest.mark.parametrize(
    "metric",
    [
        logit_diff(1, 2),
        target_prob(1),
        loss([1, 2, 3, 4, 5]),
        kl(logits(3)),
        kl(logits(3), position=None),
    ],
    ids=["logit_diff", "target_prob", "loss", "kl", "kl_all"],
)
def test_gradients_are_those_of_finite_differences(metric) -> None:
    x = logits().requires_grad_()
    assert torch.autograd.gradcheck(metric, (x,))
    assert scalar_of(metric, x).shape == ()


def test_a_token_that_the_reference_excludes_counts_nothing() -> None:
    x, y = logits(), logits(1)
    y[-1, 4] = -torch.inf
    probabilities = by_hand(y[-1])
    expected = math.fsum(
        p * math.log(p / q) for p, q in zip(probabilities, by_hand(x[-1]), strict=True) if p
    )
    x.requires_grad_()
    value = kl(y)(x)
    value.backward()
    assert float(value.detach()) == pytest.approx(expected, abs=CLOSE)
    assert bool(x.grad.isfinite().all())


def test_names_and_tokens_are_read() -> None:
    lens = demo_lens()
    ids = lens.capture("import os", logits=None).token_ids
    x = lens.capture("import os").logits
    by_text = metric_of("logit_diff", lens=lens, target=" os", against="\n")
    word, line = token_id(lens, " os"), token_id(lens, "\n")
    assert float(by_text(x)) == float(x[-1, word] - x[-1, line])
    assert float(metric_of("loss", ids=ids)(x)) > 0
    own = metric_of(lambda logits: logits.sum())
    assert float(own(x)) == float(x.sum())
    cap = lens.gradients("import os", metric_of("target_prob", lens=lens, target=" os"))
    assert cap.metric == pytest.approx(float(x.float().softmax(-1)[-1, word]))


def test_what_is_refused() -> None:
    lens, x = demo_lens(), logits()
    with pytest.raises(MetricError, match="'entropy' is unknown: the names are logit_diff, tar"):
        metric_of("entropy")
    with pytest.raises(MetricError, match="logit_diff needs against: give against="):
        metric_of("logit_diff", target=3)
    with pytest.raises(MetricError, match="neither a function"):
        metric_of(3)  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="give lens="):
        metric_of("target_prob", target=" os")
    with pytest.raises(OutOfRangeError, match="token id 11 is out of range: the logits are over 0"):
        target_prob(VOCAB)(x)
    with pytest.raises(OutOfRangeError, match="position 5"):
        target_prob(1, position=SEQ)(x)
    with pytest.raises(ShapeError, match="one id for each position"):
        loss([1, 2])(x)
    with pytest.raises(MetricError, match="loss of one token"):
        loss([1])(x[:1])
    with pytest.raises(ShapeError, match="same vocabulary"):
        kl(x[:, :4])(x)
    with pytest.raises(ShapeError, match="one for each"):
        target_prob([1, 2])(x)
    with pytest.raises(ShapeError, match=r"\[..., seq, vocab\] is needed"):
        target_prob(1)(x[0])
    with pytest.raises(UsageError, match=r"'import os' is 2 tokens \('import', ' os'\)"):
        token_id(lens, "import os")
    with pytest.raises(TokenIdError, match="2048 is out of range: this model has ids 0–2047"):
        token_id(lens, 2048)
    with pytest.raises(MetricError, match="gave float64"):
        lens.gradients("x", lambda logits: logits)
    assert trilens.errors.MetricError is MetricError
