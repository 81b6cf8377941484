"""Blocks, final norm and unembedding by rule, on causal LMs, masked LMs and bare encoders."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from tolerances import assert_near
from trilens.errors import AnatomyError, SeveralStreamsError
from trilens.lens.lens import Lens

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 80,
}


def encoder(cls: type, config: type, **extra) -> nn.Module:
    torch.manual_seed(0)
    return cls(config(**{**SMALL, **extra})).eval()


ENCODERS = {
    "bert masked": lambda: encoder(tf.BertForMaskedLM, tf.BertConfig),
    "bert bare": lambda: encoder(tf.BertModel, tf.BertConfig),
    "bert classifier": lambda: encoder(tf.BertModel, tf.BertConfig, is_decoder=False),
    "roberta masked": lambda: encoder(tf.RobertaForMaskedLM, tf.RobertaConfig),
    "albert masked": lambda: encoder(tf.AlbertForMaskedLM, tf.AlbertConfig, embedding_size=16),
    "albert bare": lambda: encoder(tf.AlbertModel, tf.AlbertConfig, embedding_size=16),
    "modernbert masked": lambda: encoder(
        tf.ModernBertForMaskedLM,
        tf.ModernBertConfig,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
    ),
    "electra bare": lambda: encoder(tf.ElectraModel, tf.ElectraConfig, embedding_size=32),
    "llama bare": lambda: encoder(tf.LlamaModel, tf.LlamaConfig),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_and_bare_models(name: str) -> None:
    model = ENCODERS[name]()
    lens = Lens(model)
    assert lens.n_layers == 3
    assert lens.d_model == 32
    assert bool(lens.anatomy.unembedding) == ("masked" in name)
    ids = torch.randint(5, 80, (1, 21), generator=torch.Generator().manual_seed(1))
    cap = lens.capture(ids, residual="all", attention=True)
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True)
    hidden = plain.hidden_states
    for layer in range(2):
        assert torch.equal(cap.residual.get_layer(layer), hidden[layer + 1][0])
    if "masked" in name:
        assert torch.equal(cap.logits, plain.logits[0])
        last = cap.residual.get_layer(2)
        assert_near(lens.unembed(last), cap.logits, 1e-5)
    else:
        assert cap.logits is None
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions
    for layer in range(3):
        # float32 through another kernel: 1e-5, the project's bar
        assert (cap.attention.get_layer(layer) - weights[layer]).abs().max() <= 1e-5


def test_albert_runs_one_block_three_times() -> None:
    blocks = Lens(ENCODERS["albert bare"]()).anatomy.blocks
    assert len({id(block.module) for block in blocks}) == 1
    assert len(blocks) == 3


def test_masked_language_model_batches_equal_single_prompts() -> None:
    lens = Lens(ENCODERS["bert masked"]())
    prompts = [list(range(5, 5 + n)) for n in (12, 4, 9)]
    for prompt, many in zip(prompts, lens.capture_many(prompts, residual="all"), strict=True):
        one = lens.capture(prompt, residual="all")
        assert_near(many.logits, one.logits, 1e-5, least=1.0)
        for layer in range(3):
            ours, theirs = many.residual.get_layer(layer), one.residual.get_layer(layer)
            assert_near(ours, theirs, 1e-5, least=1.0)


def test_facts_say_what_was_proven() -> None:
    facts = Lens(encoder(tf.LlamaForCausalLM, tf.LlamaConfig)).anatomy.facts
    assert facts[0].startswith("3 blocks in model.layers")
    assert "model.norm" in facts[1]
    assert "lm_head" in facts[2]


class _Odd(tf.LlamaForCausalLM):
    """A model whose last hidden state is not a function of the last block's output alone."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1]) * 0.1
        return output


def test_logits_that_the_head_does_not_give_are_refused() -> None:
    with pytest.raises(AnatomyError, match="logits could not be rebuilt"):
        Lens(_Odd(tf.LlamaConfig(**SMALL)).eval())


class _TwoStreams(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden, **kwargs):
        one, two = hidden.unbind(2)
        return torch.stack([self.block(one, **kwargs), two + one], dim=2)


def _two_streams(norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).eval()
    model.model.layers = nn.ModuleList(_TwoStreams(block) for block in model.model.layers)
    original = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: torch.stack([original(ids)] * 2, dim=2)
    model.model.rotary_emb.forward = _rotary(model.model.rotary_emb)
    model.model.norm = norm(model.model.norm)
    return model


def test_several_streams_are_read_out_by_the_module_behind_the_blocks() -> None:
    lens = Lens(_two_streams(_First))
    assert (lens.n_streams, lens.d_model, lens.anatomy.readout) == (2, 32, ("model.norm",))
    cap = lens.capture([1, 2, 3, 4], residual="all")
    assert cap.residual[2].shape == (4, 2, 32)
    assert torch.equal(cap.residual.readout(2), lens.model.model.norm.norm(cap.residual[2][:, 0]))
    assert_near(lens.unembed(cap.residual.readout(2)), cap.logits, 1e-6)


def test_streams_whose_readout_looks_at_other_tokens_are_refused() -> None:
    with pytest.raises(SeveralStreamsError, match="the readout of one token is another one beside"):
        Lens(_two_streams(_Mean))


def test_streams_without_a_readout_are_refused_by_name() -> None:
    model = _two_streams(_Both)
    model.lm_head = nn.Linear(64, 80, bias=False)
    with pytest.raises(
        SeveralStreamsError, match=r"model\.layers\.2 .* no module makes one vector"
    ):
        Lens(model)


class _First(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return self.norm(hidden[:, :, 0])


class _Mean(_First):
    def forward(self, hidden):
        return super().forward(hidden) + hidden.mean((1, 2))[:, None]


class _Both(_First):
    """Gives the head both streams side by side."""

    def forward(self, hidden):
        return self.norm(hidden).flatten(2)


def _rotary(rotary: nn.Module):
    original = rotary.forward
    return lambda hidden, position_ids: original(hidden[:, :, 0], position_ids)
