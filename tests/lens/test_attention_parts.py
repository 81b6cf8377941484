"""Blocks in which several modules attend: their heads one after another, and each by its name."""

from __future__ import annotations

import pytest
import torch

from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.parts import PartsPattern
from trilens.caches.patterns.protocol import DensePattern
from trilens.edits import Knockout
from trilens.errors import EditError, GenerationError, ShapeError, UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens

NAMES = ("self_attn.0", "self_attn.1")


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens(build("longcat_flash"))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return prompt_ids("longcat_flash", 14)[0].tolist()


def eager_weights(lens: Lens, ids: list[int]) -> list[torch.Tensor]:
    """What each attention module gives as its weights under eager, in the order of the calls."""
    model = build("longcat_flash")
    model.set_attn_implementation("eager")
    seen: list[torch.Tensor] = []
    for path, module in model.named_modules():
        if path.rpartition(".")[0].endswith("self_attn") and path[-1].isdigit():
            module.register_forward_hook(lambda _m, _a, output: seen.append(output[1][0]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    return seen


def test_the_parts_are_the_modules_own_weights(lens: Lens, ids: list[int]) -> None:
    cache = lens.capture(ids, attention=True).attention
    theirs = eager_weights(lens, ids)
    assert len(theirs) == 2 * lens.n_layers
    for layer in range(lens.n_layers):
        parts = cache.parts(layer)
        assert tuple(parts) == NAMES
        whole = cache.get_layer(layer)[0]
        for number, (name, heads) in enumerate(parts.items()):
            expected = theirs[2 * layer + number]
            assert len(heads) == len(expected)
            assert_near(whole[heads.start : heads.stop], expected, 1e-5)
            pattern = cache.pattern(layer)
            assert isinstance(pattern, PartsPattern)
            assert torch.equal(pattern.part(name).dense()[0], whole[heads.start : heads.stop])
        head = parts[NAMES[1]][0]
        row = cache.attention_from_position(layer, 9, head=head)
        assert_near(torch.from_numpy(row), theirs[2 * layer + 1][0, 9], 1e-5)
        assert_near(torch.from_numpy(cache.entropy(layer)).exp().max(), 14, 14)
        assert cache.received(layer).shape == (len(whole), 14)
        assert cache.sink_mass(layer).shape == cache.mean_distance(layer).shape == (len(whole), 14)


def test_parts_come_out_of_a_batch_and_a_file(lens: Lens, ids: list[int], tmp_path) -> None:
    prompts = [ids, ids[:6]]
    for prompt, many in zip(prompts, lens.capture_many(prompts, attention=True), strict=True):
        one = lens.capture(prompt, attention=True)
        back = Capture.load(many.save(tmp_path / "parts.safetensors"))
        for layer in range(lens.n_layers):
            assert_near(many.attention.get_layer(layer), one.attention.get_layer(layer), 1e-5)
            assert back.attention.parts(layer) == one.attention.parts(layer)
            assert torch.equal(back.attention.get_layer(layer), many.attention.get_layer(layer))
    assert torch.equal(many.to("cpu").attention.get_layer(0), many.attention.get_layer(0))


def test_a_knockout_cuts_in_all_parts(lens: Lens, ids: list[int]) -> None:
    cut = lens.capture(ids, attention=True, edits=Knockout(layer=1, queries=9, keys=4))
    plain = lens.capture(ids, attention=True)
    weights, before = (each.attention.get_layer(1)[0] for each in (cut, plain))
    assert bool((before[:, 9, 4] > 0).all())
    assert bool((weights[:, 9, 4] == 0).all())
    assert_near(weights[:, 9].sum(-1), torch.ones(len(weights)), 1e-5)
    with pytest.raises(EditError, match="2 modules attend in layer 1"):
        lens.capture(ids, edits=Knockout(layer=1, queries=9, keys=4, heads=0))


def test_a_generation_says_that_it_keeps_no_parts(lens: Lens, ids: list[int]) -> None:
    with pytest.raises(GenerationError, match="attends in 2 modules"):
        lens.generate(ids, max_new_tokens=2, capture={"attention": True})


def test_parts_must_fit_each_other() -> None:
    one = DensePattern(torch.eye(3)[None, None])
    with pytest.raises(ShapeError, match="parts have"):
        PartsPattern({"a": one, "b": DensePattern(torch.eye(4)[None, None])})
    with pytest.raises(UsageError, match="at least one"):
        PartsPattern({})
    both = PartsPattern({"a": one, "b": one})
    with pytest.raises(UsageError, match="part 'c' is unknown"):
        both.part("c")
    assert both.parts == {"a": range(1), "b": range(1, 2)}
    assert torch.equal(both.rows([1], head=1), torch.eye(3)[None, 1:2])
    assert torch.equal(both.columns([1])[1], torch.eye(3)[:, 1:2])
    assert AttentionCache.from_layers({0: one}, n_model_layers=1).parts(0) == {}
