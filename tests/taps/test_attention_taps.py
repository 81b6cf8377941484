"""Knockouts of attention edges: hand-made masks, float64 weights, windows, padding and bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.edits import Knockout
from trilens.errors import EditError, UntouchedEditError
from trilens.lens.lens import Lens
from trilens.taps.attention_taps import AttentionTaps
from trilens.taps.registry import REGISTRY, AttentionArguments, attention_keys

TOKENS = 9
QUERIES, KEYS = [5, 8], [1, 2, 5]
# The same products in float32, in another kernel: of the largest logit.
TOLERANCE = 1e-6
IMPLEMENTATIONS = ("sdpa", "eager")

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def lens_of(model_type: str, implementation: str) -> Lens:
    model = build(model_type)
    model.set_attn_implementation(implementation)
    return Lens(model)


def hidden_of(heads: list[int] | None, n_heads: int) -> Tensor:
    hidden = torch.zeros(1, n_heads, TOKENS, TOKENS, dtype=torch.bool)
    for head in range(n_heads) if heads is None else heads:
        for query in QUERIES:
            hidden[0, head, query, KEYS] = True
    return hidden & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


@pytest.mark.parametrize("heads", [None, [0, 3]])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_knockout_is_a_mask_set_by_hand(implementation: str, heads: list[int] | None) -> None:
    lens, ids = lens_of("llama", implementation), prompt_ids("llama", TOKENS)
    edit = Knockout(layers=1, queries=QUERIES, keys=KEYS, heads=heads)
    found = lens.capture(ids, edits=edit, attention=True)
    module = lens.model.model.layers[1].self_attn
    hidden = hidden_of(heads, lens.model.config.num_attention_heads)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    later = ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask = mask.masked_fill(later, torch.finfo(torch.float32).min)

    def by_hand(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    handle = module.register_forward_pre_hook(by_hand, with_kwargs=True)
    with torch.no_grad():
        wanted = lens.model(input_ids=ids, use_cache=False).logits[0]
    handle.remove()
    assert_near(found.logits, wanted, TOLERANCE)
    plain = lens.capture(ids).logits
    assert float((found.logits - plain).abs().max()) > 1e-3
    dense = found.attention.pattern(1).dense()[0]
    assert (dense[hidden[0]] == 0).all()
    assert_near(dense.sum(-1), torch.ones(dense.shape[:-1]), 1e-6)


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [
        *(
            (name, way)
            for name in ("llama", "gemma3_text", "qwen3_next")
            for way in IMPLEMENTATIONS
        ),
        # A soft cap and a sink: the families have no other way.
        ("gemma2", "eager"),
        ("gpt_oss", "eager"),
    ],
)
def test_the_other_weights_are_the_softmax_of_the_rest(
    model_type: str, implementation: str
) -> None:
    lens, ids = lens_of(model_type, implementation), prompt_ids(model_type, TOKENS)
    layer = lens.attention_layers[-1]
    edit = Knockout(layers=layer, queries=QUERIES, keys=KEYS)
    plain = lens.capture(ids, attention=True).attention.pattern(layer)
    found = lens.capture(ids, attention=True, edits=edit).attention.pattern(layer)
    scores = plain.scores()[0].double()
    scores = scores.masked_fill(hidden_of(None, plain.heads)[0], -torch.inf)
    sinks = plain.tensors().get("sinks")
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, column], -1)
    wanted = scores.softmax(-1)[..., :TOKENS]
    assert_near(found.dense()[0], wanted, 1e-6)
    # What the model went on with are those weights, times the values.
    assert float((wanted - plain.dense()[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_a_padded_batch_are_as_alone(implementation: str) -> None:
    lens, ids = lens_of("llama", implementation), prompt_ids("llama", TOKENS)[0]
    edit = Knockout(queries=[-1], keys=[2])
    prompts = [ids, ids[:5], ids[:7]]
    together = list(lens.capture_many(prompts, batch_size=3, edits=edit, attention=True))
    for prompt, found in zip(prompts, together, strict=True):
        assert_near(found.logits, lens.capture(prompt, edits=edit).logits, 1e-5)
        dense = found.attention.pattern(0).dense()[0]
        assert (dense[:, -1, 2] == 0).all() and (dense[:, :-1, 2] > 0)[:, 2:].all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_edges_that_nothing_shows_leave_the_bits(implementation: str) -> None:
    lens, ids = lens_of("llama", implementation), prompt_ids("llama", TOKENS)
    plain = lens.capture(ids).logits
    masks: list[Any] = []

    class Noting(AttentionTaps):
        def before(self, given: AttentionArguments) -> AttentionArguments:
            new = super().before(given)
            masks.append(new is given)
            return new

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UntouchedEditError):
        patch.setattr("trilens.taps.passing.AttentionTaps", Noting)
        lens.capture(ids, edits=Knockout(queries=[2], keys=[6]))
    assert masks and all(masks)
    # Beside an edit that does something elsewhere, the layer's call is the very same.
    some = lens.capture(ids, edits=[Knockout(layers=3, queries=[8], keys=[1])], residual="all")
    before = lens.capture(ids, residual="all")
    for layer in range(3):
        assert torch.equal(some.residual.get_layer(layer), before.residual.get_layer(layer))
    assert not torch.equal(some.logits, plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_left_without_keys_by_a_window_is_refused(implementation: str) -> None:
    lens, ids = lens_of("gemma3_text", implementation), prompt_ids("gemma3_text", 40)
    window = lens.model.config.sliding_window
    layer = lens.model.config.layer_types.index("sliding_attention")
    assert window < 40
    keys = list(range(40 - window, 40))
    with pytest.raises(EditError, match=rf"position 39 of prompt 0 would see no .* layer {layer}"):
        lens.capture(ids, edits=Knockout(layers=layer, queries=[39], keys=keys))
    found = lens.capture(ids, edits=Knockout(layers=layer, queries=[39], keys=keys[1:]))
    assert bool(torch.isfinite(found.logits).all())
    # An edge that the window hides already is no fault, and changes nothing.
    far = lens.capture(ids, edits=Knockout(layers=layer, queries=[39], keys=[0]))
    assert torch.equal(far.logits, lens.capture(ids).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_steps_with_a_cache_cut_what_one_pass_cuts(model_type: str, implementation: str) -> None:
    lens, ids = lens_of(model_type, implementation), prompt_ids(model_type, 12)
    edit = Knockout(keys=[3, 10, 13], queries="generated")
    found = lens.generate(ids, max_new_tokens=4, edits=edit, capture={}).capture
    whole = lens.capture(
        found.token_ids, edits=Knockout(keys=[3, 10, 13], queries=[12, 13, 14, 15])
    )
    assert_near(found.logits, whole.logits, 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_stays_behind_also_after_an_exception(implementation: str) -> None:
    lens, ids = lens_of("llama", implementation), prompt_ids("llama", TOKENS)
    before = (
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
    )
    with pytest.raises(EditError, match="would see no key at all"):
        lens.capture(ids, edits=Knockout(queries=[3], keys=[0, 1, 2, 3]))
    lens.capture(ids, edits=Knockout(queries=[3], keys=[0]))
    keys = attention_keys(lens.model)
    with pytest.raises(ZeroDivisionError), REGISTRY.watch(keys, lambda _call: None, None):
        raise ZeroDivisionError
    after = ALL_ATTENTION_FUNCTIONS._local_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping
    assert (dict(after[0]), dict(after[1])) == before
    assert not REGISTRY._watchers
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lens.model.modules())
