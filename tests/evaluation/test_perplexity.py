"""Perplexity against torch's own loss in float64, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tolerances import largest, sum_error
from trilens.demo import demo_path
from trilens.errors import NonFiniteError, ShapeError, TextError, ValueRangeError
from trilens.evaluation.loop import Perplexity, log_likelihoods
from trilens.evaluation.perplexity import measure_perplexity
from trilens.text.token_blocks import batches_by_length, token_blocks


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)


def test_token_losses_are_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 50, generator=generator) * 4
    ids = torch.randint(50, (600,), generator=generator)
    expected = logits.double().log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
    bound = sum_error(50, 1, torch.float32) + sum_error(4, largest(logits), torch.float32)
    assert largest(log_likelihoods(logits, ids) - expected) <= bound


def test_batches_and_lengths_do_not_change_the_measure(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    blocks = token_blocks(tokenizer, ["import os\nimport sys\n" * 20, "x = 1\n" * 15], length=32)
    alone = measure_perplexity(model, blocks, batch_size=1)
    together = measure_perplexity(model, blocks, batch_size=4)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(block[None]).logits[0, :-1].double(), block[1:], reduction="sum"
            )
            for block in blocks
        ]
    count = sum(len(block) - 1 for block in blocks)
    assert alone.n_tokens == together.n_tokens == count
    assert alone.block_length == together.block_length == 32
    # Losses of more than 1 nat, each with a float32 sum over the vocabulary, of 1.
    close = float(sum_error(model.config.vocab_size, 1, torch.float32))
    assert alone.nll_nats == pytest.approx(float(sum(losses)) / count, rel=close)
    assert together.nll_nats == pytest.approx(alone.nll_nats, rel=close)
    assert alone.value == pytest.approx(math.exp(alone.nll_nats))


def test_the_mode_is_put_back(model: PreTrainedModel) -> None:
    model.train()
    model.model.layers[0].eval()
    try:
        measure_perplexity(model, [torch.tensor([1, 2, 3])])
        assert model.training and not model.model.layers[0].training
    finally:
        model.eval()


def test_blocks_are_grouped_by_length() -> None:
    blocks = [torch.zeros(n, dtype=torch.int64) for n in (4, 4, 4, 2, 4)]
    assert [len(batch) for batch in batches_by_length(blocks, batch_size=2)] == [2, 1, 1, 1]
    assert [len(batch) for batch in batches_by_length(blocks, max_tokens=9)] == [2, 1, 1, 1]
    assert [len(batch) for batch in batches_by_length(blocks, max_tokens=1)] == [1] * 5
    assert [len(batch) for batch in batches_by_length(blocks)] == [3, 1, 1]


def test_what_it_refuses(model: PreTrainedModel) -> None:
    with pytest.raises(TextError):
        measure_perplexity(model, [])
    with pytest.raises(ValueRangeError, match="batch_size is 0"):
        measure_perplexity(model, [torch.tensor([1, 2])], batch_size=0)
    with pytest.raises(ShapeError, match="do not belong"):
        log_likelihoods(torch.zeros(3, 5), torch.tensor([1, 2]))
    weight = model.model.norm.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="NaN"):
            measure_perplexity(model, [torch.tensor([1, 2])])
    finally:
        weight.data.copy_(kept)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert Perplexity(nll_nats=1e4, n_tokens=1, block_length=2).value == math.inf
