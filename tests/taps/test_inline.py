"""Attention in a model's own code: against its own softmax, float64, and in hostile conditions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

from tinymodels import build, prompt_ids
from tinymodels.checks import check_capture
from tinymodels.generic import tiny_kwargs
from tinymodels.weights import redraw
from tolerances import assert_near
from trilens.caches.patterns.protocol import DensePattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.edits import Ablate, Knockout, Scale
from trilens.errors import AttentionPathError, TooLargeError
from trilens.lens.lens import Lens
from trilens.taps.inline import memory
from trilens.taps.inline.products import product_of

# Heads folded into the batch or not, ALiBi, windows, buffers of masks, einsum and a relative bias.
SOFTMAX = (
    "bloom",
    "codegen",
    "git",
    "gpt_neo",
    "gpt_neox_japanese",
    "gptj",
    "megatron-bert",
    "mpt",
    "mvp",
    "openai-gpt",
    "rembert",
    "roformer",
    "trocr",
    "xglm",
    "xlnet",
)
EVERY = (*SOFTMAX, "falcon")
TOKENS = 24
KEY = 3
TOLERANCE = 2e-6

pytestmark = pytest.mark.usefixtures("quiet")


@functools.cache
def lens_of(model_type: str) -> Lens:
    return Lens(build(model_type))


@contextmanager
def softmaxes(change: Callable[[Tensor], Tensor] = lambda scores: scores) -> Iterator[list[Tensor]]:
    """What every softmax over tokens is given and gives, one after the other."""
    seen: list[Tensor] = []
    own = F.softmax

    def softmax(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if x.shape[-2:] != (TOKENS, TOKENS):
            return own(x, *args, **options)
        y = own(change(x), *args, **options)
        seen.extend((x.reshape(-1, TOKENS, TOKENS), y.reshape(-1, TOKENS, TOKENS)))
        return y

    F.softmax = softmax
    try:
        yield seen
    finally:
        F.softmax = own


@contextmanager
def fused() -> Iterator[list[Tensor]]:
    """The weights that fused attention means, in float64, call by call."""
    seen: list[Tensor] = []
    own = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
        seen.append(scores.softmax(-1)[0])
        return own(q, k, v, attn_mask=attn_mask, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = own


@pytest.mark.parametrize("model_type", SOFTMAX)
def test_the_pattern_is_the_softmax_that_the_model_computed(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, TOKENS)
    names = ("attn.scores", "attn.pattern", "attn.v", "attn.z")
    found = lens.capture(ids, attention=True, sites=names)
    with softmaxes() as seen, torch.no_grad():
        plain = lens.model(input_ids=ids, use_cache=False).logits[0]
    assert torch.equal(found.logits, plain)
    assert found.attention.layers == tuple(range(lens.n_layers))
    assert len(seen) == 2 * lens.n_layers
    for layer in range(lens.n_layers):
        scores, weights = seen[2 * layer : 2 * layer + 2]
        ours = found.attention.get_layer(layer)[0]
        assert_near(ours, weights, TOLERANCE)
        pattern = torch.as_tensor(found.sites["attn.pattern", layer])
        assert_near(pattern.reshape(weights.shape), weights, TOLERANCE)
        # A key that may not be seen has no score of ours; elsewhere they may differ by a constant.
        own = torch.as_tensor(found.sites["attn.scores", layer]).reshape(scores.shape)
        visible = own.isfinite() & (weights > 0)
        assert torch.equal(own.isfinite() | (weights == 0), torch.ones_like(visible))
        assert_near(own[visible], scores[visible], TOLERANCE)
        v, z = (found.sites[name, layer].double() for name in names[2:])
        again = torch.einsum("hqk,khd->qhd", weights.double(), v)
        assert_near(again, z, TOLERANCE)


@pytest.mark.parametrize("model_type", EVERY)
def test_it_is_kept_as_queries_and_keys(model_type: str) -> None:
    lens = lens_of(model_type)
    attention = lens.capture(prompt_ids(model_type, TOKENS), attention=True).attention
    for layer in attention.layers:
        own = attention[layer]
        assert isinstance(own, SoftmaxPattern)
        held = [t for t in own.tensors().values() if t.shape[1] > 1 and t.shape[2:] == (24, 24)]
        # XLNet's scores have a term for every pair of tokens that no rule gives back.
        assert len(held) == (model_type == "xlnet")


@pytest.mark.parametrize("model_type", SOFTMAX)
def test_a_knockout_is_a_score_hidden_by_hand(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, TOKENS)
    plain = lens.capture(ids).logits

    def hide(scores: Tensor) -> Tensor:
        new = scores.clone()
        new[..., -1, KEY] = torch.finfo(new.dtype).min
        return new

    cut = lens.capture(ids, attention=True, edits=Knockout(queries=TOKENS - 1, keys=KEY))
    with softmaxes(hide) as seen, torch.no_grad():
        by_hand = lens.model(input_ids=ids, use_cache=False).logits[0]
    assert_near(cut.logits, by_hand, TOLERANCE)
    assert not torch.equal(cut.logits, plain)
    for layer in range(lens.n_layers):
        ours = cut.attention.get_layer(layer)[0]
        assert_near(ours, seen[2 * layer + 1], TOLERANCE)
        assert float(ours[:, -1, KEY].abs().max()) == 0


def test_a_knockout_in_falcon_is_its_mask_set_by_hand() -> None:
    lens, ids = lens_of("falcon"), prompt_ids("falcon", TOKENS)
    cut = lens.capture(ids, attention=True, edits=Knockout(queries=TOKENS - 1, keys=KEY))
    own = F.scaled_dot_product_attention

    def hidden(*args: Any, attn_mask: Tensor, **options: Any) -> Tensor:
        mask = attn_mask.clone()
        mask[..., -1, KEY] = False
        return own(*args, attn_mask=mask, **options)

    F.scaled_dot_product_attention = hidden
    try:
        with torch.no_grad():
            by_hand = lens.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        F.scaled_dot_product_attention = own
    assert_near(cut.logits, by_hand, TOLERANCE)
    assert float(cut.attention.get_layer(0)[0, :, -1, KEY].abs().max()) == 0


@pytest.mark.parametrize(
    ("model_type", "query", "key", "value"),
    [
        ("gptj", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
        ("xglm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("rembert", "attention.self.query", "attention.self.key", "attention.self.value"),
    ],
)
@pytest.mark.parametrize("site", ["attn.q_rot", "attn.k_rot", "attn.v"])
def test_queries_keys_and_values_are_edited_where_they_are_used(
    model_type: str, query: str, key: str, value: str, site: str
) -> None:
    """Doubled after the projection: the rotary step and xglm's scaling keep factors."""
    lens, ids = lens_of(model_type), prompt_ids(model_type, TOKENS)
    edited = lens.capture(ids, edits=Scale(site, 2.0, layers=1))
    path = {"attn.q_rot": query, "attn.k_rot": key, "attn.v": value}[site]
    module = lens.anatomy.blocks[1].module.get_submodule(path)
    handle = module.register_forward_hook(lambda _m, _a, output: output * 2)
    try:
        with torch.no_grad():
            by_hand = lens.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    assert_near(edited.logits, by_hand, TOLERANCE)


@pytest.mark.parametrize("model_type", ["bloom", "xlnet", "falcon"])
def test_heads_and_weights_are_edited(model_type: str) -> None:
    """A head whose weights are zero gives nothing, as one whose output is."""
    lens, ids = lens_of(model_type), prompt_ids(model_type, TOKENS)
    by_output = lens.capture(ids, edits=Ablate("attn.z", layers=1, heads=2)).logits
    by_weights = lens.capture(ids, edits=Scale("attn.pattern", 0.0, layers=1, heads=2)).logits
    assert_near(by_weights, by_output, TOLERANCE)
    assert not torch.allclose(by_output, lens.capture(ids).logits, atol=1e-3)


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "gptj", "falcon", "mpt", "openai-gpt"])
def test_decoding_gives_the_attention_of_the_whole_text(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, 14)
    steps = lens.generate(ids, max_new_tokens=5, capture={"attention": True}).capture
    whole = lens.capture(steps.token_ids, attention=True)
    assert steps.attention.layers == whole.attention.layers
    for layer in whole.attention.layers:
        ours, theirs = steps.attention.get_layer(layer), whole.attention.get_layer(layer)
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"alibi": True},
        {"alibi": True, "multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"_attn_implementation": "eager"},
        {"_attn_implementation": "eager", "alibi": True},
    ],
)
def test_falcons_forms(options: dict[str, Any]) -> None:
    config = copy.deepcopy(build("falcon").config)
    for name, value in options.items():
        setattr(config, name, value)
    model = type(build("falcon"))(config).eval()
    redraw(model, 0)
    lens, ids = Lens(model), prompt_ids("falcon", TOKENS)
    kwargs = {"input_ids": ids, "use_cache": False}
    found = lens.capture(ids, residual="all", attention=True)
    with softmaxes() as seen, fused() as weights, torch.no_grad():
        check_capture(lens, model(**kwargs).logits, found, kwargs)
    assert lens.attention_layers == tuple(range(lens.n_layers))
    theirs = weights or seen[1::2]
    for layer in range(lens.n_layers):
        assert_near(found.attention.get_layer(layer)[0], theirs[layer], TOLERANCE)
    several = [prompt_ids("falcon", n, seed=n)[0].tolist() for n in (TOKENS, 11, 17)]
    many = lens.capture_many(several, batch_size=3, attention=True)
    for prompt, one in zip(several, many, strict=True):
        alone = lens.capture(prompt, attention=True).attention
        for layer in alone.layers:
            assert_near(one.attention.get_layer(layer), alone.get_layer(layer), 1e-5)


@pytest.mark.parametrize("model_type", EVERY)
def test_half_precision(model_type: str) -> None:
    """Logits keep their bits; weights are the model's own, however far bfloat16 rounds them."""
    model = build(model_type).to(torch.bfloat16)
    lens, ids = Lens(model), prompt_ids(model_type, TOKENS)
    found = lens.capture(ids, attention=True)
    with softmaxes() as seen, torch.no_grad():
        assert torch.equal(found.logits, model(input_ids=ids, use_cache=False).logits[0])
    assert found.attention.layers == tuple(range(lens.n_layers))
    for layer in range(lens.n_layers if seen else 0):
        ours, theirs = found.attention.get_layer(layer)[0], seen[2 * layer + 1]
        assert float((ours.float() - theirs.float()).abs().sum(-1).max()) < 0.1


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "xlnet"])
def test_after_an_exception_nothing_is_left(model_type: str) -> None:
    model = build(model_type)
    lens, ids = Lens(model), prompt_ids(model_type, TOKENS)
    before = lens.capture(ids, attention=True)
    own = torch.Tensor.permute
    # Sums of streams are watched at the same time; a parallel block has none between its parts.
    summed = "attn.add" if model_type == "falcon" else "resid_mid"

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("in the middle of attention")

    torch.Tensor.permute = broken
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            lens.capture(ids, attention=True, edits=Scale(summed, 1.0))
    finally:
        torch.Tensor.permute = own
    assert not _get_current_function_mode_stack()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    after = lens.capture(ids, attention=True)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.attention.get_layer(1), before.attention.get_layer(1))


def bent(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores that go through a function no form of ours has."""
    scores = torch.sin(torch.matmul(query, key.transpose(-1, -2))) * 3 + mask
    weights = torch.softmax(scores, -1)
    return torch.matmul(weights, value), weights


def test_what_no_form_gives_back_is_kept_as_weights_up_to_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("gptj")
    for block in model.transformer.h:
        block.attn._attn = bent
    lens, ids = Lens(model), prompt_ids("gptj", TOKENS)
    found = lens.capture(ids, attention=True)
    assert isinstance(found.attention[0], DensePattern)
    with torch.no_grad():
        weights = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    for layer, own in enumerate(weights):
        assert torch.equal(found.attention.get_layer(layer), own)
    assert "attn.scores" not in lens.site_layers
    assert "no scores rebuild them" in lens.why_no_site("attn.scores", 0)
    monkeypatch.setattr(memory, "LARGEST", found.attention[0].nbytes * 2)
    with pytest.raises(TooLargeError, match=r"layers=.*batch_size"):
        lens.capture(ids, attention=True)
    assert len(lens.capture(ids, attention=True, layers=[0, 1]).attention.layers) == 2


def test_weights_that_no_product_applies_are_refused_by_name() -> None:
    """Heads are summed up key by key: nothing shows that the softmax weighs these values."""

    def summed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(torch.matmul(query, key.transpose(-1, -2)) / 4 + mask, -1)
        return (weights[..., None] * value[:, :, None]).sum(-2), weights

    model = build("gptj")
    for block in model.transformer.h:
        block.attn._attn = summed
    lens = Lens(model)
    assert lens.attention_layers == ()
    with pytest.raises(AttentionPathError, match="in its own code, where no matrix product"):
        lens.capture(prompt_ids("gptj", TOKENS), attention=True)
    assert lens.capture(prompt_ids("gptj", TOKENS), residual="all").residual.layers == (0, 1, 2, 3)


def test_another_way_than_on_the_probe_is_refused() -> None:
    model = build("gptj")
    lens, ids = Lens(model), prompt_ids("gptj", TOKENS)
    attention = model.transformer.h[1].attn
    own = attention._attn

    def changed(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        torch.matmul(query, key.transpose(-1, -2))
        return own(query, key, value, mask)

    attention._attn = changed
    with pytest.raises(AttentionPathError, match="in another way than when the lens was opened"):
        lens.capture(ids, attention=True)
    attention._attn = own
    assert lens.capture(ids, attention=True).attention.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("model_type", ["mpnet", "deberta", "convbert", "tapas", "ibert"])
def test_masked_models(model_type: str) -> None:
    """Relative biases, disentangled attention, convolutions beside heads, integer projections."""
    config_type = CONFIG_MAPPING[model_type]
    model = AutoModelForMaskedLM.from_config(config_type(**tiny_kwargs(config_type, {}))).eval()
    redraw(model, 0)
    lens, ids = Lens(model), prompt_ids(model_type, TOKENS)
    found = lens.capture(ids, attention=True)
    with torch.no_grad():
        plain = model(input_ids=ids, output_attentions=True)
    assert torch.equal(found.logits, plain.logits[0])
    assert found.attention.layers == tuple(range(lens.n_layers))
    for layer in found.attention.layers:
        weights = plain.attentions[layer]
        weights = weights[0] if isinstance(weights, tuple) else weights
        assert_near(found.attention.get_layer(layer), weights, TOLERANCE)
    beside = model_type == "ibert"
    assert ("beside what it projects" in lens.why_no_site("attn.head_out", 0)) == beside


@pytest.mark.parametrize("equation", ["ibnd,jbnd->bnij", "bnid,bnjd->bnij", "nbid,bnjd->nbij"])
def test_an_einsum_is_read_whatever_order_its_axes_have(equation: str) -> None:
    sizes = {"b": 2, "n": 3, "i": 5, "j": 7, "d": 4}
    left, right = (
        torch.randn([sizes[letter] for letter in part])
        for part in equation.partition("->")[0].split(",")
    )
    product = product_of("einsum", (equation, left, right), {}, 2)
    assert product is not None
    assert product.left.shape == (2, 3, 5, 4)
    assert product.right.shape == (2, 3, 4, 7)
    result = torch.einsum(equation, left, right)
    assert_near(product.result(result), product.left @ product.right, 1e-6)
    assert torch.equal(product.as_result(product.result(result), result), result)
