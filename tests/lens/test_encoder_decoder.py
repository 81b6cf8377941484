"""A lens on either stack of an encoder–decoder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tinymodels.mappings import build_as
from tolerances import assert_near
from trilens.analysis.comparison.run import compare
from trilens.edits import Scale
from trilens.errors import NotStoredError, PromptError, UsageError
from trilens.evaluation.reference import ReferenceLogits
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.tokens import SourceTarget
from trilens.text.source import NO_TOKEN

pytestmark = pytest.mark.usefixtures("quiet")

WORDS = ("the", "house", "is", "small", "das", "haus", "ist", "klein")
SOURCE = [11, 50, 27, 33, 90, 14, 60]
TARGET = [1, 21, 70, 45]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A word each, and an end token after every text, as T5's tokenizer writes one."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {w: 10 + i for i, w in enumerate(WORDS)}
    raw = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@cache
def t5() -> Lens:
    model = build_as("seq2seq", "t5")
    # As T5's checkpoints say; the class has no default.
    model.config.decoder_start_token_id = 0
    return Lens(model, tokenizer())


@cache
def captured() -> Capture:
    return t5().capture(SOURCE, target=TARGET, attention=True, residual="all", sites=["cross.out"])


def test_the_decoder_is_opened_where_no_stack_is_named() -> None:
    lens = t5()
    assert lens.stacks == ("decoder", "encoder")
    assert lens.stack_name == "decoder"
    assert lens.cross_attention_layers == (0, 1, 2, 3)
    assert lens.no_cross_attention == {}
    encoder = Lens(lens.model, stack="encoder")
    assert encoder.stack_name == "encoder"
    assert encoder.model is lens.model.get_encoder()


def test_a_stack_that_a_model_has_not_is_refused_with_those_it_has() -> None:
    with pytest.raises(UsageError, match=r"stack 'vision' is not one of .*'decoder', 'encoder'"):
        Lens(t5().model, stack="vision")
    with pytest.raises(UsageError, match="it has 'language'"):
        Lens(build_as("masked", "bert"), stack="decoder")


def test_cross_attention_answers_which_source_token_a_target_token_looks_at() -> None:
    capture = captured()
    cross = capture.cross_attention
    dense = cross.get_layer(1)
    assert dense is not None
    assert dense.shape == (1, 4, len(TARGET), len(SOURCE))
    row = cross.attention_from_position(1, 2, head=3)
    np.testing.assert_allclose(row, dense[0, 3, 2].numpy(), atol=1e-6)
    best = cross.top_attended_positions(1, 2, 1, head=3)[0][0]
    assert best == int(dense[0, 3, 2].argmax())
    assert len(capture.source_tokens) == len(SOURCE)
    assert capture.source is not None
    assert capture.source.token_ids.tolist() == SOURCE
    assert capture.token_ids.tolist() == TARGET
    with pytest.raises(UsageError, match="cross attention has no distance"):
        cross.mean_distance(1)


def test_a_capture_with_a_source_comes_back_from_its_file(tmp_path: Path) -> None:
    capture = captured()
    found = Capture.load(capture.save(tmp_path / "one.safetensors"))
    assert found.source_tokens == capture.source_tokens
    assert found.cross_attention.layers == capture.cross_attention.layers
    for layer in capture.cross_attention.layers:
        ours, theirs = (c.cross_attention.get_layer(layer) for c in (found, capture))
        assert ours is not None
        assert torch.equal(ours, theirs)
    with pytest.raises(UsageError, match="no distance"):
        found.cross_attention.mean_distance(0)
    plain = Lens(build_as("masked", "bert")).capture(SOURCE)
    with pytest.raises(NotStoredError, match="has no source"):
        _ = plain.source_tokens
    with pytest.raises(NotStoredError, match="cross_attention was not captured"):
        _ = plain.cross_attention


def test_a_target_text_is_read_shifted_right_as_in_training() -> None:
    lens = t5()
    capture = lens.capture("the house is small", target="das haus ist klein")
    labels = torch.tensor([tokenizer()("das haus ist klein")["input_ids"]])
    shifted = lens.model.prepare_decoder_input_ids_from_labels(labels=labels)
    assert capture.token_ids.tolist() == shifted[0].tolist()
    assert capture.source is not None
    assert capture.source.find("small") == (3,)
    assert capture.source_tokens[-1] == "</s>"
    with torch.no_grad():
        plain = lens.model(
            input_ids=torch.tensor([tokenizer()("the house is small")["input_ids"]]), labels=labels
        )
    assert capture.logits is not None
    assert torch.equal(capture.logits, plain.logits[0])


def test_without_a_target_the_decoder_reads_its_start_token() -> None:
    lens = t5()
    capture = lens.capture(SOURCE)
    assert capture.token_ids.tolist() == [lens.model.config.decoder_start_token_id]


def test_pairs_are_captured_in_their_order() -> None:
    lens = t5()
    pairs = [SourceTarget(SOURCE, TARGET), SourceTarget(SOURCE[:3], TARGET[:2]),
             SourceTarget("das haus", "the house")]  # fmt: skip
    many = list(lens.capture_many(pairs, attention=True))
    assert [len(each.tokens) for each in many] == [4, 2, 3]
    for pair, each in zip(pairs, many, strict=True):
        one = lens.capture(pair, attention=True)
        assert_near(each.logits, one.logits, 1e-5)
        ours, theirs = (c.cross_attention.get_layer(2) for c in (each, one))
        assert_near(ours, theirs, 1e-5)
    assert lens.batches_safely(4)


def test_parts_of_a_decoder_block_sum_to_what_it_adds() -> None:
    lens = t5()
    names = ["resid_pre", "attn.add", "cross.add", "mlp.add", "resid_post", "resid_mid"]
    sites = lens.capture(SOURCE, target=TARGET, sites=names).sites
    for layer in range(lens.n_layers):
        parts = [sites[name, layer].double() for name in names[:4]]
        end = sites["resid_post", layer].double()
        assert float((sum(parts) - end).abs().max()) <= 1e-5 * float(end.abs().max())
        mid = sum(parts[:3]) - sites["resid_mid", layer].double()
        assert float(mid.abs().max()) <= 1e-5 * float(end.abs().max())


def test_an_edit_of_cross_attention_is_what_a_hook_would_do() -> None:
    lens = t5()
    edited = lens.capture(SOURCE, target=TARGET, edits=Scale("cross.out", 0.0, layer=1))
    module = lens.model.decoder.block[1].layer[1].EncDecAttention
    handle = module.register_forward_hook(lambda _m, _a, out: (out[0] * 0.0, *out[1:]))
    try:
        with torch.no_grad():
            plain = lens.model(
                input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([TARGET])
            ).logits[0]
    finally:
        handle.remove()
    assert edited.logits is not None
    assert torch.equal(edited.logits, plain)
    assert not torch.equal(plain, captured().logits)  # type: ignore[arg-type]


def test_gradients_reach_a_decoders_sites() -> None:
    lens = t5()
    pair = SourceTarget(SOURCE, TARGET)
    found = lens.gradients(pair, lambda logits: logits[-1, 40], sites=["cross.out"])
    assert float(found.gradients["cross.out", 2].abs().max()) > 0


def test_an_encoder_of_sound_has_frames_for_tokens() -> None:
    model = build_as("speech", "whisper")
    sound = {"input_features": torch.randn(1, 8, 32)}
    encoder = Lens(model, stack="encoder").capture(sound, residual="all", attention=True)
    assert encoder.tokens[:2] == ["<frame 0>", "<frame 1>"]
    assert encoder.token_ids.tolist() == [NO_TOKEN] * 16
    decoder = Lens(model).capture(sound, target=TARGET, attention=True)
    assert decoder.source_tokens == tuple(encoder.tokens)
    with torch.no_grad():
        whole = model(**sound, decoder_input_ids=torch.tensor([TARGET]))
    assert decoder.logits is not None
    assert torch.equal(decoder.logits, whole.logits[0])
    last = encoder.residual.get_layer(1)
    own = model.get_encoder().layer_norm(last)
    assert torch.equal(own, whole.encoder_last_hidden_state[0])


@pytest.mark.parametrize("lengths", [(7, 4), (3, 9), (1, 1)])
def test_cross_attention_in_a_models_own_code_is_what_it_returns(lengths: tuple[int, int]) -> None:
    model = build_as("seq2seq", "mvp")
    source, target = (torch.arange(10, 10 + n)[None] for n in lengths)
    capture = Lens(model).capture(source, target=target, attention=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(input_ids=source, decoder_input_ids=target, output_attentions=True)
    for layer in range(4):
        ours = capture.cross_attention.get_layer(layer)
        assert ours is not None
        assert float((ours - plain.cross_attentions[layer]).abs().max()) <= 1e-5
        own = capture.attention.get_layer(layer)
        assert own is not None
        assert float((own - plain.decoder_attentions[layer]).abs().max()) <= 1e-5


CASES: tuple[tuple[str, dict[str, Any], type[Exception], str], ...] = (
    ("whisper", {"prompt": SOURCE}, UsageError, "reads no tokens but input_features"),
    ("whisper", {"prompt": {"pixels": torch.zeros(1, 3)}}, UsageError, "takes no pixels"),
    ("t5", {"prompt": [999]}, PromptError, "token id 999"),
    ("t5", {"prompt": SOURCE, "target": [999]}, PromptError, "token id 999"),
    ("t5", {"prompt": SOURCE, "target": "das"}, PromptError, "target is text"),
)


@pytest.mark.parametrize(("kind", "given", "error", "words"), CASES)
def test_a_source_or_target_that_cannot_be_read_is_refused(
    kind: str, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    lens = Lens(build_as("speech" if kind == "whisper" else "seq2seq", kind))
    with pytest.raises(error, match=words):
        lens.capture(**given)


def test_a_model_without_a_source_takes_no_target() -> None:
    lens = Lens(build_as("masked", "bert"))
    with pytest.raises(UsageError, match="reads no target"):
        lens.capture(SOURCE, target=TARGET)


def test_decoders_that_answer_a_source_are_not_compared_on_texts() -> None:
    with pytest.raises(UsageError, match=r"predicts a target of a source.*stack='encoder'"):
        compare(t5(), t5(), [SOURCE])
    with pytest.raises(UsageError, match="predicts a target of a source"):
        ReferenceLogits(t5(), [torch.tensor(SOURCE)])
    encoder = Lens(t5().model, stack="encoder")
    assert compare(encoder, encoder, [SOURCE, SOURCE[:4]]).n_tokens == 11


def test_a_checkpoint_opens_on_either_stack(tmp_path: Path) -> None:
    for mapping, kind in (("seq2seq", "bart"), ("speech", "whisper")):
        folder = tmp_path / kind
        model = build_as(mapping, kind)
        model.save_pretrained(folder)
        lens = Lens.from_pretrained(folder, stack="decoder")
        assert type(lens.model) is type(model)
        assert lens.cross_attention_layers == (0, 1, 2, 3)
        assert Lens.from_pretrained(folder, stack="encoder").n_layers == 2
