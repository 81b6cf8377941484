"""`Lens.capture` and `capture_many`: what they hold, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_cases import llama_config
from tinymodels import build, prompt_ids
from tolerances import assert_near, sum_error
from trilens.errors import (
    AnatomyError,
    AttentionPathError,
    EmptyPromptError,
    NoTokenizerError,
    OutOfRangeError,
    ShapeError,
    SilentSiteError,
    TokenIdError,
    TrilensError,
    UsageError,
)
from trilens.lens.lens import Lens


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens(build("llama"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompt_ids("llama")


def test_capture_holds_what_was_asked(lens: Lens, ids: torch.Tensor) -> None:
    cap = lens.capture(ids)
    assert cap.residual.layers == tuple(range(lens.n_layers))
    assert not cap.has("attention") and not cap.has("gates")
    assert cap.logits.shape == (40, 120)
    assert cap.token_ids.tolist() == ids[0].tolist()
    assert len(cap.tokens) == 40
    bare = lens.capture(ids, residual=None, logits=None)
    assert not bare.has("residual") and bare.logits is None
    last = lens.capture(ids, logits="last")
    assert torch.equal(last.logits, cap.logits[-1:])


def test_logits_none_asks_the_model_for_less_but_changes_nothing(lens: Lens, ids) -> None:
    a = lens.capture(ids, residual="all", logits=None).residual
    b = lens.capture(ids, residual="all").residual
    for layer in b.layers:
        assert torch.equal(a.get_layer(layer), b.get_layer(layer))


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified"])
def test_layers_that_share_keys_see_every_position(model_type: str) -> None:
    lens = Lens(build(model_type))
    asked: dict = {"residual": "all", "attention": True, "gates": True}
    whole = lens.capture(prompt_ids(model_type), **asked)
    short = lens.capture(prompt_ids(model_type), logits=None, **asked)
    for layer in range(lens.n_layers):
        assert torch.equal(short.residual.get_layer(layer), whole.residual.get_layer(layer))
        assert torch.equal(short.attention.get_layer(layer), whole.attention.get_layer(layer))
    for name in whole.gates.names:
        for layer in whole.gates.layers(name):
            assert torch.equal(short.gates.get(name, layer), whole.gates.get(name, layer))


def test_chosen_layers_only(lens: Lens, ids: torch.Tensor) -> None:
    cap = lens.capture(ids, layers=[2, 0, 2], attention=True, gates=True)
    assert cap.residual.layers == (0, 2)
    assert cap.attention.layers == (0, 2)
    assert cap.gates.layers("mlp.gate") == (0, 2)
    assert cap.attention.get_layer(1) is None
    full = lens.capture(ids)
    assert torch.equal(cap.residual.get_layer(2), full.residual.get_layer(2))


def test_last_token_residual_keeps_no_sequence_alive(lens: Lens, ids: torch.Tensor) -> None:
    residual = lens.capture(ids).residual
    tensor = residual.get_layer(0)
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_single_prompt_keeps_references_and_batches_keep_copies(lens: Lens) -> None:
    prompts = [prompt_ids("llama", n)[0].tolist() for n in (20, 7)]
    for cap in lens.capture_many(prompts, residual="all", attention=True, gates=True):
        n = len(cap.tokens)
        q = cap.attention.pattern(0).tensors()["q"]
        assert q.untyped_storage().nbytes() == q.numel() * q.element_size()
        assert cap.residual.get_layer(0).shape == (n, lens.d_model)
        stream = cap.residual.get_layer(0)
        assert stream.untyped_storage().nbytes() == stream.numel() * stream.element_size()


def test_mode_and_gradients(ids: torch.Tensor) -> None:
    model = build("llama")
    model.train()
    model.model.layers[1].eval()
    lens = Lens(model)
    cap = lens.capture(ids, residual="all", attention=True, gates=True)
    assert model.training and not model.model.layers[1].training
    assert not cap.logits.requires_grad
    assert not cap.residual.get_layer(0).requires_grad
    assert not cap.gates.pre("mlp.gate", 0).requires_grad


def test_inside_inference_mode(lens: Lens, ids: torch.Tensor) -> None:
    outside = lens.capture(ids, attention=True)
    with torch.inference_mode():
        inside = lens.capture(ids, attention=True)
    assert torch.equal(inside.logits, outside.logits)


def test_every_form_of_prompt(lens: Lens, ids: torch.Tensor) -> None:
    row = ids[0]
    forms = [row, ids, row.tolist(), tuple(row.tolist()), row.numpy(), row.to(torch.int32)]
    expected = lens.capture(row).logits
    for form in forms:
        assert torch.equal(lens.capture(form).logits, expected)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], EmptyPromptError, "empty"),
        ("text", NoTokenizerError, "token ids"),
        ([3, 120], TokenIdError, "0–119"),
        ([3, -1], TokenIdError, "position 1"),
        (torch.ones(2, 3, dtype=torch.long), ShapeError, "capture_many"),
        ([1.5], TrilensError, "integers"),
        ([True], TrilensError, "integers"),
        (None, TrilensError, "prompt"),
    ],
)
def test_bad_prompts(lens: Lens, prompt, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        lens.capture(prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": [4]}, OutOfRangeError, "layer 4 is out of range: this model has layers 0–3"),
        ({"layers": [-1]}, OutOfRangeError, "layers 0–3"),
        ({"layers": [True]}, UsageError, "not an integer"),
        ({"layers": []}, UsageError, "empty"),
        ({"residual": "some"}, UsageError, "'last', 'all' or None"),
        ({"logits": "first"}, UsageError, "'all', 'last' or None"),
    ],
)
def test_bad_options(lens: Lens, ids, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lens.capture(ids, **options)


def test_attention_of_a_model_without_it() -> None:
    lens = Lens(build("mamba"))
    with pytest.raises(AttentionPathError, match="no softmax attention"):
        lens.capture(prompt_ids("mamba"), attention=True)


def test_hybrid_numbers_layers_as_the_model_does() -> None:
    lens = Lens(build("qwen3_next"))
    cap = lens.capture(prompt_ids("qwen3_next"), attention=True)
    assert set(cap.attention.layers) == set(lens.attention_layers) < set(range(lens.n_layers))
    missing = next(i for i in range(lens.n_layers) if i not in lens.attention_layers)
    assert cap.attention.get_layer(missing) is None
    with pytest.raises(TrilensError, match=str(lens.attention_layers[0])):
        cap.attention.attention_from_position(missing, -1)
    with pytest.raises(AttentionPathError, match="layers that have it"):
        lens.capture(prompt_ids("qwen3_next"), attention=True, layers=[missing])


def test_gates_of_a_model_without_glu() -> None:
    lens = Lens(build("gpt2"))
    with pytest.raises(SilentSiteError, match="no gate is proven"):
        lens.capture(prompt_ids("gpt2"), gates=True)


def test_a_block_that_went_missing_is_loud(ids: torch.Tensor) -> None:
    model = build("llama")
    lens = Lens(model)
    model.config.num_hidden_layers = 2
    with pytest.raises(SilentSiteError, match="2 of 4 layers"):
        lens.capture(ids)


def test_gate_value_is_the_one_the_model_used(ids: torch.Tensor) -> None:
    """act(x) recomputed, times the up projection, is the down projection's input."""
    model = build("llama")
    lens = Lens(model)
    seen: dict[str, torch.Tensor] = {}
    mlp = model.model.layers[1].mlp
    handles = [
        mlp.up_proj.register_forward_hook(lambda m, a, o: seen.update(up=o[0])),
        mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(down=a[0][0])),
        mlp.act_fn.register_forward_hook(lambda m, a, o: seen.update(act=o[0])),
    ]
    cap = lens.capture(ids, gates=True)
    for handle in handles:
        handle.remove()
    value = cap.gates.get("mlp.gate", 1)
    # One function of the same numbers, in lanes of another layout.
    assert_near(value, seen["act"], float(sum_error(4, 1, torch.float32)))
    assert torch.equal(value * seen["up"], seen["down"])
    openness = cap.gates.openness("mlp.gate", 1)
    assert torch.allclose(openness, torch.sigmoid(cap.gates.pre("mlp.gate", 1)))
    analysis = cap.gates.analyse("mlp.gate", 1)
    assert np.allclose(analysis.avg_gate, openness.double().mean(0).numpy())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_tokenizer_does_not_matter(side: str) -> None:
    words = {f"w{i}": i for i in range(120)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        padding_side=side,
        pad_token="w5",
        unk_token="w0",
    )
    lens = Lens(build("llama"), tokenizer)
    prompts = [prompt_ids("llama", n, seed=n)[0].tolist() for n in (9, 30, 17)]
    for prompt, cap in zip(prompts, lens.capture_many(prompts, attention=True), strict=True):
        one = lens.capture(prompt, attention=True)
        assert_near(cap.logits, one.logits, 1e-5, least=1.0)
        for layer in cap.attention.layers:
            ours, theirs = cap.attention.get_layer(layer), one.attention.get_layer(layer)
            assert (ours - theirs).abs().max() <= 1e-5


def test_capture_many_is_lazy_and_in_order(lens: Lens) -> None:
    taken = []

    def prompts():
        for n in range(3, 10):
            taken.append(n)
            yield list(range(10, 10 + n))

    captures = lens.capture_many(prompts(), batch_size=2)
    assert not taken
    assert len(next(captures).tokens) == 3
    assert taken == [3, 4]
    assert [len(cap.tokens) for cap in captures] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_bad_batch_size(lens: Lens, size: object) -> None:
    with pytest.raises(UsageError, match="integer of 1 or more"):
        lens.capture_many([[1, 2]], batch_size=size)


def test_one_string_for_many_prompts(lens: Lens) -> None:
    with pytest.raises(UsageError, match="list of prompts"):
        lens.capture_many("text")


def test_not_a_model() -> None:
    with pytest.raises(UsageError, match="from_pretrained"):
        Lens("gpt2")


class _InPlace(LlamaForCausalLM):
    """Writes into the residual that a block has handed on."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[1].register_forward_hook(_overwrite)


def _overwrite(_module, args, _output) -> None:
    # Block 1 has read its input, which is block 0's output.
    args[0].mul_(3.0)


def test_a_model_that_overwrites_its_tensors_is_copied() -> None:
    torch.manual_seed(0)
    config = llama_config(32, 64, layers=3, heads=4, vocab=64)
    model = _InPlace(config).eval()
    lens = Lens(model)
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(o.clone()))
    cap = lens.capture(list(range(12)), residual="all")
    handle.remove()
    assert torch.equal(cap.residual.get_layer(0), seen[-1][0])


def test_bfloat16_capture_is_bit_identical(ids: torch.Tensor) -> None:
    model = build("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits[0]
    cap = Lens(model).capture(ids, residual="all", attention=True, gates=True)
    assert torch.equal(cap.logits, plain)
    assert cap.residual.get_layer(0).dtype == torch.bfloat16
    row = cap.attention.attention_from_position(0, -1)
    assert row.dtype == np.float32
    assert abs(row.sum() - 1) <= sum_error(2 * len(row), 1, torch.float32)
    assert np.isfinite(cap.residual.to_f32_vecs()[0]).all()
    [many] = lens_many(model, ids)
    assert torch.equal(many.logits, plain)


def lens_many(model, ids):
    return list(Lens(model).capture_many([ids[0].tolist()]))


def test_unembed_refuses_what_it_cannot_read(lens: Lens) -> None:
    with pytest.raises(ShapeError, match="d_model is 64"):
        lens.unembed(torch.zeros(3, 5))


@pytest.mark.parametrize("model_type", ["dots3_note_text", "axk2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsafe_batches_are_seen_in_every_dtype(model_type: str, dtype: torch.dtype) -> None:
    """Sparse top-k attention flips its choice when a prompt is padded."""
    assert not Lens(build(model_type, dtype=dtype)).batches_safely(40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba", "jamba"])
def test_safe_batches_are_seen_too(model_type: str, dtype: torch.dtype) -> None:
    assert Lens(build(model_type, dtype=dtype)).batches_safely(40)


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"]
)
def test_heads_that_are_not_over_the_vocabulary_are_refused(name: str) -> None:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=80,
    )
    with pytest.raises(AnatomyError, match=name):
        Lens(getattr(transformers, name)(config).eval())


def test_nan_weights_are_named() -> None:
    model = build("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(AnatomyError, match=r"NaN on a plain prompt, first in .*layers\.2\.mlp"):
        Lens(model)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lens: lens.capture([5, 6], layers=2), "not a list"),
        (lambda lens: lens.capture_many(5), "list of prompts"),
        (lambda lens: lens.unembed("x"), "d_model"),
        (lambda lens: lens.unembed(torch.tensor(1.0)), "d_model"),
        (lambda lens: lens.capture([5, 6]).top_tokens(3, 99), "position 99 is out of range"),
        (lambda lens: lens.capture([5, 6], logits="last").top_tokens(2, 1), "out of range"),
        (lambda lens: lens.capture([5, 6]).top_tokens(-1), "k -1"),
        (lambda lens: lens.capture([5, 6]).top_tokens(2.5), "k 2.5"),
        (lambda lens: lens.capture([5, 6]).to("foo"), "foo"),
    ],
)
def test_every_misuse_is_a_trilens_error(lens: Lens, call, words: str) -> None:
    with pytest.raises(TrilensError, match=words):
        call(lens)


def test_numpy_layer_numbers(lens: Lens) -> None:
    assert lens.capture([5, 6], layers=np.arange(2)).residual.layers == (0, 1)
