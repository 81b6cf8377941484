"""Models as people have them: wrapped, compiled, adapted, quantized, offloaded, half in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from foreign_cases import eight_bit
from tinymodels import build, prompt_ids
from trilens import Lens, compare
from trilens.demo import demo_path
from trilens.errors import (
    AnatomyError,
    AttentionPathError,
    PromptError,
    RecorderError,
    UsageError,
)

IDS = prompt_ids("llama", 9)[0]


def compiled(part: Any) -> Any:
    return torch.compile(part, backend="eager")


def compile_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compile_layers(model: Any) -> Any:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = compiled(layer)
    return model


def compile_forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


def adapt(model: Any) -> Any:
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": compiled,
    "compile in place": compile_in_place,
    "compiled layers": compile_layers,
    "compiled forward": compile_forward,
    "DataParallel": nn.DataParallel,
    "adapter": adapt,
}


@pytest.mark.filterwarnings("ignore")  # what torch and peft say of themselves
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_captured_as_the_model_inside(name: str) -> None:
    expected = Lens(build("llama")).capture(IDS, residual="all", attention=True, gates=True)
    lens = Lens(WRAPPERS[name](build("llama")))
    found = lens.capture(IDS, residual="all", attention=True, gates=True)
    assert torch.equal(found.logits, expected.logits)
    for layer in range(lens.n_layers):
        for part in ("residual", "attention"):
            ours, theirs = (getattr(c, part).get_layer(layer) for c in (found, expected))
            assert torch.equal(ours, theirs)
        ours, theirs = (c.gates.get("mlp.gate", layer) for c in (found, expected))
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_brings_its_tokenizer_and_a_soft_prompt_is_refused() -> None:
    folder = demo_path("transformer")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe = transformers.pipeline(
        "text-generation", model=model, tokenizer=tokenizer, device=torch.device("cpu")
    )
    assert Lens(pipe).capture("x = 1").tokens
    soft = peft.get_peft_model(
        model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(UsageError, match=r"soft prompt .*get_base_model"):
        Lens(soft)
    with pytest.raises(UsageError, match="a loaded transformers model is needed"):
        Lens(nn.Linear(3, 3))  # type: ignore[arg-type]


def test_weights_without_a_storage_are_recorded() -> None:
    model = build("llama")
    for layer in model.model.layers:
        held = layer.mlp.gate_proj
        held.weight = nn.Parameter(eight_bit(held.weight.detach()), requires_grad=False)
    with torch.no_grad():
        expected = model(IDS[None], use_cache=False).logits[0]
    found = Lens(model).capture(IDS, gates=True)
    assert torch.equal(found.logits, expected)
    assert found.gates.layers("mlp.gate") == tuple(range(len(model.model.layers)))


@pytest.mark.parametrize("kind", ["all", "embedding"])
def test_offloaded_models_are_captured(kind: str) -> None:
    expected = Lens(build("llama")).capture(IDS, residual="all")
    model = build("llama")
    part = model if kind == "all" else model.get_input_embeddings()
    cpu_offload(part, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    found = Lens(model).capture(IDS, residual="all")
    assert torch.equal(found.logits, expected.logits)


def test_weights_that_nothing_brings_into_memory_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\..*weight is on the meta device"):
        Lens(model)


@pytest.mark.filterwarnings("ignore")  # of flex attention, when it runs uncompiled
def test_flex_attention_gives_all_but_its_patterns() -> None:
    config = build("llama").config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention").eval()
    lens = Lens(model)
    assert not lens.attention_layers
    assert lens.capture(IDS, residual="all", gates=True).residual.n_layers == lens.n_layers
    with pytest.raises(AttentionPathError, match=r"'flex_attention'.*attn_implementation='sdpa'"):
        lens.capture(IDS, attention=True)


def test_the_attention_implementation_can_be_chosen() -> None:
    folder = demo_path("transformer")
    lens = Lens.from_pretrained(folder, attn_implementation="eager")
    assert lens.model.config._attn_implementation == "eager"
    assert Lens.from_pretrained(folder).model.config._attn_implementation == "sdpa"
    with pytest.raises(UsageError, match="'fast' is not one that transformers has: give one of"):
        Lens.from_pretrained(folder, attn_implementation="fast")


def test_bidirectional_masks_are_recorded() -> None:
    config = build("gemma3_text").config
    config.use_bidirectional_attention = True
    model = AutoModelForCausalLM.from_config(config).eval()
    lens = Lens(model)
    pattern = lens.capture(IDS, attention=True).attention.get_layer(0)
    assert pattern is not None
    assert bool((pattern[0, :, 0, 1] > 0).all())


def test_an_encoder_decoder_opens_on_its_decoder_and_its_encoder_by_itself() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    assert Lens(model).stack_name == "decoder"
    assert Lens(model.get_encoder()).n_layers == 2


class Shy(nn.Identity):
    """A module that does not stand hooks beside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._forward_hooks:
            raise RuntimeError("I am watched")
        return x


def test_a_failure_of_the_recorder_is_not_told_as_the_models() -> None:
    model = build("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(model.model.layers[0].mlp.act_fn, Shy())
    with pytest.raises(
        RecorderError, match=r"runs, but not while trilens records it.*I am watched"
    ):
        Lens(model)
    model = build("llama")
    model.model.layers[0].mlp.gate_proj = nn.Linear(3, 3)
    with pytest.raises(AnatomyError, match="does not run on a plain prompt") as caught:
        Lens(model)
    assert not isinstance(caught.value, RecorderError)


def test_what_is_no_tokenizer_of_transformers_is_refused_and_its_errors_are_the_prompts() -> None:
    words = Tokenizer(models.WordLevel({"a": 1, "b": 2}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = build("llama")
    for wrong, way in ((object(), "the object object"), ("gpt2", r"from_pretrained\('gpt2'\)")):
        with pytest.raises(UsageError, match=way):
            Lens(model, wrong)
    lens = Lens(model, transformers.PreTrainedTokenizerFast(tokenizer_object=words))
    assert lens.capture("a b").token_ids.tolist() == [1, 2]
    with pytest.raises(PromptError, match=r"fails on the prompt: .*\[UNK\]"):
        lens.capture("a zzz")


def test_a_model_that_was_changed_is_proven_anew() -> None:
    model = build("llama")
    lens = Lens(model)
    expected = lens.capture(IDS, residual="all").residual.get_layer(0)
    model.model.layers = model.model.layers[:2]
    short = lens.capture(IDS, residual="all", gates=True)
    assert (lens.n_layers, short.residual.n_layers) == (2, 2)
    assert torch.equal(short.residual.get_layer(0), expected)
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert lens.capture(IDS, gates=True).gates.spec("mlp.gate", 1).function == "gelu"
    model.resize_token_embeddings(lens.anatomy.vocab + 2)
    (last,) = lens.capture_many([[lens.anatomy.vocab + 1]])
    assert last.logits.shape[-1] == lens.anatomy.vocab == model.config.vocab_size
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(UsageError, match=r"layers\.0\.mlp.* is on the meta device"):
        lens.capture(IDS)


@pytest.mark.parametrize(
    ("bad", "words"),
    [("", "prompt 3 is empty"), ([5000], "prompt 3: token id 5000"), (None, "prompt 3 is a None")],
)
def test_a_refused_prompt_among_several_is_numbered(bad: Any, words: str) -> None:
    folder = demo_path("transformer")
    lens = Lens.from_pretrained(folder)
    prompts = ["x", "x = 1", [5], bad]
    with pytest.raises((PromptError, UsageError), match=words):
        list(lens.capture_many(prompts, batch_size=2))
    with pytest.raises((PromptError, UsageError), match=words):
        compare(lens, lens, ["x = 1"] * 3 + [bad])
