"""Free continuations: greedy, compared token by token, and loops that are loops."""

from __future__ import annotations

import pytest
import torch

from trilens.demo import demo_path
from trilens.errors import UsageError
from trilens.evaluation.continuations import (
    Continuations,
    agreement,
    compare_continuations,
    continuations,
    in_a_loop,
)
from trilens.models.loading import load


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (list(range(48)), False),
        ([*range(36), *[7] * 12], True),
        ([*range(37), *[7] * 11], False),  # a short run is no loop
        ([*range(24), *[1, 2, 3, 4, 5, 6] * 4], True),
        ([*range(30), *[1, 2, 3, 4, 5, 6] * 3], False),  # three times are not four
        ([*[1, 2, 3] * 15, 9], False),  # it has got out
        ([*range(21), 3, *[1, 2, 3] * 8], True),
        ([], False),
        ([5] * 11, False),
    ],
)
def test_loops(text: list[int], loops: bool) -> None:
    assert in_a_loop(torch.tensor(text, dtype=torch.long)) is loops


def test_agreement_is_the_share_before_the_first_difference() -> None:
    one = torch.arange(10)
    other = one.clone()
    assert agreement(one, other) == 1.0
    other[4] = 99
    assert agreement(one, other) == 0.4
    other[0] = 99
    assert agreement(one, other) == 0.0
    loop = torch.tensor([7] * 12)
    found = compare_continuations([torch.arange(12), loop], [torch.arange(12), torch.arange(12)])
    assert found == Continuations(2, 12, 0.5, 0.5, 0.0)
    assert "agree" in found.sentence
    assert Continuations.from_dict(found.to_dict()) == found
    with pytest.raises(UsageError, match="prompt"):
        compare_continuations([], [])
    for key, value in (("agreement", 2.0), ("n_prompts", "x"), ("loops_after", None)):
        with pytest.raises(TypeError):
            Continuations.from_dict({**found.to_dict(), key: value})


@pytest.mark.parametrize("kind", ["transformer", "mamba", "rwkv7"])
def test_prompts_of_several_lengths_go_on_greedily(kind: str) -> None:
    """As the model's own argmax says, without a cache."""
    model = load(demo_path(kind), dtype="float32").model
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 2048, (n,), generator=generator) for n in (5, 9, 5)]
    held = model.generation_config
    for prompt, found in zip(prompts, continuations(model, prompts, new=6), strict=True):
        text = torch.cat([prompt, found])
        with torch.no_grad():
            scores = model(text[None]).logits[0]
        rows = scores[len(prompt) - 1 : -1]
        chosen = rows.gather(1, found[:, None])[:, 0]
        # Two sums in another order may swap tokens that are as likely.
        assert torch.all(chosen >= rows.amax(1) - 1e-3)
    assert model.generation_config is held and not model.training
