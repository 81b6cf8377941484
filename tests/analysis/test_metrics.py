"""Metrics against formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tolerances import assert_near
from trilens import Lens, demo_path
from trilens.analysis.metrics import kl, logit_diff, loss, metric_of, target_prob, token_id
from trilens.errors import MetricError, OutOfRangeError, ShapeError, TokenIdError, UsageError

F32 = 32 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens.from_pretrained(demo_path("transformer"))


def logits(seed: int = 0, rows: int = 4, vocab: int = 9) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def softmax(values: torch.Tensor) -> Any:
    exact = np.exp(values.double().numpy())
    return exact / exact.sum(-1, keepdims=True)


def test_metrics_by_hand() -> None:
    x, ids, reference = logits(), [3, 1, 4, 1], logits(1)
    p, q = softmax(reference), softmax(x)
    expected = {
        logit_diff(2, 5): float(x[-1, 2].double() - x[-1, 5].double()),
        logit_diff(2, 5, position=1): float(x[1, 2].double() - x[1, 5].double()),
        target_prob(2, position=-2): q[-2, 2],
        loss(ids): float(np.mean([-np.log(q[i, ids[i + 1]]) for i in range(3)])),
        kl(reference): float((p * np.log(p / q)).sum(-1).mean()),
    }
    for metric, value in expected.items():
        assert_near(metric(x), np.array(value), F32, least=1.0)


def test_metrics_have_gradients_and_names() -> None:
    for metric in (logit_diff(2, 5), target_prob(2), loss([3, 1, 4, 1]), kl(logits(1))):
        x = logits().requires_grad_()
        (gradient,) = torch.autograd.grad(metric(x), x)
        assert bool(gradient.abs().sum() > 0)
        assert metric.__name__.startswith(metric.name)


def test_a_token_that_never_comes_adds_no_divergence() -> None:
    x, reference = logits(), logits(1)
    reference[:, 0] = x[:, 0] = -torch.inf
    assert bool(kl(reference)(x).isfinite())


def test_metrics_by_name() -> None:
    x = logits()
    assert metric_of("logit_diff", target=2, against=5)(x) == logit_diff(2, 5)(x)
    assert metric_of("kl", reference_logits=x)(x) == 0
    with pytest.raises(MetricError, match="needs against"):
        metric_of("logit_diff", target=2)
    with pytest.raises(MetricError, match=r"'surprise' is unknown.*target_prob"):
        metric_of("surprise")


def test_bad_input_is_named() -> None:
    with pytest.raises(TokenIdError, match=r"token id 9 .*0–8"):
        target_prob(9)(logits())
    with pytest.raises(OutOfRangeError, match="position 4"):
        target_prob(1, position=4)(logits())
    with pytest.raises(ShapeError, match="3 tokens and logits of 4"):
        loss([1, 2, 3])(logits())
    with pytest.raises(MetricError, match="two or more"):
        loss([1])
    with pytest.raises(ShapeError, match="the same positions"):
        kl(logits(rows=3))(logits())
    with pytest.raises(ShapeError, match=r"\[seq, vocab\]"):
        target_prob(1)(logits()[0])


def test_tokens_as_text(lens: Lens) -> None:
    assert token_id(" are", lens) == 594
    assert token_id(594, lens) == 594
    with pytest.raises(TokenIdError, match=r"'def area' is 3 tokens .*' are' \(594\)"):
        token_id("def area", lens)
    with pytest.raises(TokenIdError, match="2048 is out of range"):
        token_id(2048, lens)
    with pytest.raises(UsageError, match="is text"):
        token_id(" are")


def test_the_gradient_of_a_metric(lens: Lens) -> None:
    metric = logit_diff(" are", "(", lens=lens)
    cap = lens.capture("def area(r):")
    found = lens.gradients("def area(r):", metric, layers=[1])
    assert cap.logits is not None
    assert_near(
        np.array(found.metric),
        metric(cap.logits).numpy(),
        4 * torch.finfo(torch.bfloat16).eps,
        least=float(cap.logits.abs().max()),
    )
