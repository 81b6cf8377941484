"""Answers to a source: what is captured in steps is what one pass over the whole target gives."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

from tinymodels import prompt_ids
from tinymodels.mappings import build_as
from tolerances import assert_near
from trilens.analysis.tokens import token_id
from trilens.edits import Ablate, Edit, Knockout, Scale, Steer
from trilens.errors import AttentionPathError, GenerationError, PromptError, UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.source_target import beginning
from trilens.models.tokens import SourceTarget
from trilens.taps.joined import cross_of_pass
from trilens.taps.registry import AttentionCall

pytestmark = pytest.mark.usefixtures("quiet")

TEXT = ("t5", "bart", "marian", "m2m_100", "led", "mvp", "t5gemma", "t5gemma2", "encoder-decoder")
SOUND = ("whisper", "speech_to_text", "moonshine")
SOURCE = [11, 50, 27, 33, 90]
TARGET = [3, 21, 40]
SHAPES = {"whisper": (1, 8, 32), "speech_to_text": (1, 40, 80), "moonshine": (1, 1607)}


@cache
def model_of(name: str) -> PreTrainedModel:
    kind, _, eager = name.partition(" ")
    model = build_as("speech" if kind in SOUND else "seq2seq", kind)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 3
    if eager:
        model.set_attn_implementation("eager")
    return model


def source_of(name: str) -> Any:
    kind = name.partition(" ")[0]
    if kind not in SHAPES:
        return prompt_ids("", 9)[0]
    shape, generator = SHAPES[kind], torch.Generator().manual_seed(2)
    name = "input_values" if len(shape) == 2 else "input_features"
    return {name: torch.randn(shape, generator=generator)}


def as_arguments(source: Any) -> dict[str, Tensor]:
    return source if isinstance(source, dict) else {"input_ids": source[None]}


def options_of(lens: Lens) -> dict[str, Any]:
    return {"residual": "all", "attention": not lens.anatomy.other_attention}


def assert_same(steps: Capture, whole: Capture) -> None:
    assert steps.tokens == whole.tokens
    assert steps.source_tokens == whole.source_tokens
    assert_near(steps.logits, whole.logits, 1e-4)
    for layer in whole.residual:
        assert_near(steps.residual[layer], whole.residual[layer], 1e-4)
    for part in ("attention", "cross_attention"):
        if whole.has(part):
            ours, theirs = getattr(steps, part), getattr(whole, part)
            assert ours.layers == theirs.layers
            for layer in theirs.layers:
                one, other = ours.pattern(layer), theirs.pattern(layer)
                assert type(one) is type(other)
                assert_near(one.dense(), other.dense(), 1e-4)
                assert_near(one.entropy(), other.entropy(), 1e-3, least=0.1)


@pytest.mark.parametrize("name", (*TEXT, *SOUND, "t5 eager", "bart eager", "whisper eager"))
def test_steps_of_an_answer_are_one_pass_over_the_whole_target(name: str) -> None:
    lens, source = Lens(model_of(name)), source_of(name)
    options = options_of(lens)
    found = lens.generate(source, target=TARGET, max_new_tokens=7, capture=options)
    assert found.prompt_tokens == len(TARGET)
    capture = found.capture
    assert capture is not None
    assert capture.token_ids.tolist() == [*TARGET, *found.token_ids.tolist()]
    assert_same(capture, lens.capture(source, target=capture.token_ids, **options))
    if capture.has("cross_attention"):
        shape = capture.cross_attention.pattern(0).dense().shape
        assert shape[2:] == (len(capture.tokens), len(capture.source_tokens))
    # And against transformers' own weights.
    if "eager" in name:
        with torch.no_grad():
            plain = lens.model(
                **as_arguments(source),
                decoder_input_ids=capture.token_ids[None],
                output_attentions=True,
            )
        for layer, weights in enumerate(plain.cross_attentions):
            ours = capture.cross_attention.pattern(layer).dense()
            assert float((ours - weights).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ("t5", "bart", "marian", "m2m_100", *SOUND))
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model, source = model_of(name), source_of(name)
    found = Lens(model).generate(source, max_new_tokens=9)
    config = GenerationConfig.from_model_config(model.config)
    config.update(max_new_tokens=9, do_sample=False, num_beams=1, decoder_start_token_id=3)
    if name == "whisper":
        # What its own wrapper of the loop asks for; it hands back the new tokens alone.
        config.update(no_timestamps_token_id=119, is_multilingual=False, return_timestamps=False)
        model.generation_config, held = config, model.generation_config
        try:
            ids = torch.tensor([[3]])
            plain = model.generate(**as_arguments(source), decoder_input_ids=ids)[0]
        finally:
            model.generation_config = held
        plain = plain[int(plain[0] == 3) :]
    else:
        plain = model.generate(**as_arguments(source), generation_config=config)[0, 1:]
    assert found.token_ids.tolist() == plain.tolist()[: len(found.token_ids)]
    assert len(found.token_ids) == len(plain) or found.stopped_by == "end"


def edits_of(lens: Lens) -> list[Edit]:
    vector = torch.randn(lens.d_model, generator=torch.Generator().manual_seed(0))
    return [
        Steer("resid_post", layers=1, vector=vector, positions="generated"),
        Ablate("cross.out", layers=2, positions=slice(2, 6)),
        Scale("cross.add", layers=1, factor=0.5),
        Ablate("attn.z", layers=3, heads=1),
        Knockout(layers=3, queries=slice(3, None), keys=1),
    ]


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_edits_of_an_answer_act_as_on_the_whole_target(name: str) -> None:
    lens, source = Lens(model_of(name)), source_of(name)
    options = options_of(lens)
    plain = lens.generate(source, target=TARGET, max_new_tokens=5, capture=options).capture
    for edit in edits_of(lens):
        found = lens.generate(source, target=TARGET, max_new_tokens=5, edits=edit, capture=options)
        whole_edit = edit
        if isinstance(edit, Steer):
            whole_edit = replace(edit, positions=slice(len(TARGET), None))
        whole = lens.capture(source, target=found.capture.token_ids, edits=whole_edit, **options)
        assert_same(found.capture, whole)
        assert not torch.equal(found.capture.logits, plain.logits)


def test_what_the_generation_config_forces_and_forbids_is_kept() -> None:
    lens, source = Lens(build_as("seq2seq", "bart")), source_of("bart")
    model = lens.model
    model.generation_config = GenerationConfig(decoder_start_token_id=5)
    free = lens.generate(source, max_new_tokens=6)
    assert lens.capture(source).token_ids.tolist() == [5]
    odd = GenerationConfig(
        decoder_start_token_id=5, forced_bos_token_id=33, forced_eos_token_id=44,
        suppress_tokens=free.token_ids.tolist()[:3], bad_words_ids=[[int(free.token_ids[3])]],
        num_beams=1, eos_token_id=44,
    )  # fmt: skip
    model.generation_config = odd
    for kept in (None, {"attention": True}):
        found = lens.generate(source, max_new_tokens=6, capture=kept)
        plain = model.generate(source[None], max_new_tokens=6)[0, 1:].tolist()
        assert found.token_ids.tolist() == plain
        assert plain[0] == 33
        assert plain[-1] == 44
        assert not set(plain[1:-1]) & set(free.token_ids.tolist()[:4])
        assert found.stopped_by == "length"
    assert lens.generate(source, max_new_tokens=6, stop=44).stopped_by == "length"
    assert lens.generate(source, max_new_tokens=1).stopped_by == "length"
    first = int(lens.generate(source, max_new_tokens=6).token_ids[1])
    odd.eos_token_id = first
    assert lens.generate(source, max_new_tokens=6).stopped_by == "end"
    odd.eos_token_id = 44
    assert model.generation_config is odd
    odd.begin_suppress_tokens = [int(free.token_ids[0])]
    odd.suppress_tokens = odd.bad_words_ids = odd.forced_bos_token_id = None
    found = lens.generate(source, max_new_tokens=3).token_ids.tolist()
    assert found == model.generate(source[None], max_new_tokens=3)[0, 1:].tolist()
    assert found[0] != int(free.token_ids[0])


def test_a_decoder_begins_with_the_ids_that_its_configuration_forces() -> None:
    lens, sound = Lens(build_as("speech", "whisper")), source_of("whisper")
    config = lens.model.generation_config
    config.decoder_start_token_id = 3
    config.forced_decoder_ids = [[1, 51], [2, 52]]
    assert beginning(lens.model) == [3, 51, 52]
    found = lens.generate(sound, max_new_tokens=3, capture={})
    assert found.prompt_tokens == 3
    assert found.capture.token_ids.tolist()[:3] == [3, 51, 52]
    assert lens.capture(sound).token_ids.tolist() == [3, 51, 52]
    # A language that is to be told from the sound has no id.
    config.forced_decoder_ids = [[1, None], [2, 52]]
    assert beginning(lens.model) == [3]


def test_a_pair_and_inputs_are_sources_too() -> None:
    lens, source = Lens(model_of("bart")), source_of("bart")
    wanted = lens.generate(source, target=TARGET, max_new_tokens=4).token_ids
    pair = lens.generate(SourceTarget(source, TARGET), max_new_tokens=4).token_ids
    assert torch.equal(pair, wanted)
    given = {"input_ids": source[None], "decoder_input_ids": torch.tensor([TARGET])}
    assert torch.equal(lens.generate(inputs=given, max_new_tokens=4).token_ids, wanted)
    drawn = [
        lens.generate(source, max_new_tokens=8, temperature=3.0, seed=s).token_ids.tolist()
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    stopped = lens.generate(source, target=TARGET, max_new_tokens=4, stop=int(wanted[1]))
    assert stopped.stopped_by == int(wanted[1])
    assert token_id(lens, int(wanted[1])) == int(wanted[1])


@pytest.mark.parametrize("name", ["whisper", "mvp"])
def test_an_exception_while_answering_leaves_the_model_as_it_was(name: str) -> None:
    model, source = model_of(name), source_of(name)
    lens, config = Lens(model.train()), model.generation_config

    def fail(_text: str, _token: int) -> None:
        raise RuntimeError("the reader went away")

    state = torch.get_rng_state()
    for options in ({"capture": {"attention": True}}, {"edits": Ablate("cross.out", layers=0)}):
        with pytest.raises(RuntimeError, match="went away"):
            lens.generate(source, stream=fail, temperature=1.0, **options)
    assert model.generation_config is config
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert len(lens.generate(source, max_new_tokens=3).token_ids) >= 1


def test_a_decoder_with_more_blocks_than_its_encoder_answers() -> None:
    """transformers' own loop makes a cache for as many blocks as T5's encoder has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=3,
            num_heads=4, decoder_start_token_id=0,
        )  # fmt: skip
        lens = Lens(T5ForConditionalGeneration(config).eval())
    found = lens.generate(SOURCE, max_new_tokens=4, capture={"attention": True, "residual": "all"})
    whole = lens.capture(SOURCE, target=found.capture.token_ids, attention=True, residual="all")
    assert_same(found.capture, whole)


def test_an_image_is_answered() -> None:
    """As captions and text in pictures are written (TrOCR, Donut): an encoder of pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = (
            ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=48, image_size=32, patch_size=8),
            TrOCRConfig(vocab_size=120, d_model=32, decoder_layers=2, decoder_attention_heads=2,
                        decoder_ffn_dim=48, cross_attention_hidden_size=32,
                        decoder_start_token_id=3),
        )  # fmt: skip
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        model = VisionEncoderDecoderModel(config).eval()
        images = [{"pixel_values": torch.randn(1, 3, 32, 32)} for _ in range(3)]
    model.generation_config.decoder_start_token_id = 3
    lens, options = Lens(model), {"residual": "all", "attention": True}
    found = lens.generate(images[0], max_new_tokens=4, capture=options)
    assert_same(found.capture, lens.capture(images[0], target=found.capture.token_ids, **options))
    plain = model.generate(**images[0], max_new_tokens=4, do_sample=False)
    assert found.token_ids.tolist() == plain[0, 1:].tolist()
    assert found.capture.source_tokens[1] == "<image position 1>"
    pairs = [SourceTarget(image, TARGET[: n + 1]) for n, image in enumerate(images)]
    for pair, one in zip(pairs, lens.capture_many(pairs, **options), strict=True):
        assert_same(one, lens.capture(pair, **options))


def test_what_cannot_be_answered_is_refused() -> None:
    lens = Lens(model_of("bart"))
    with pytest.raises(PromptError, match="token id 999"):
        lens.generate([999])
    with pytest.raises(UsageError, match="takes no pixels"):
        lens.generate({"pixels": torch.zeros(1, 3)})
    with pytest.raises(GenerationError, match=r"max_new_tokens 9999 is out of range"):
        lens.generate([11], max_new_tokens=9999)
    with pytest.raises(UsageError, match="reads no target"):
        Lens(build_as("masked", "bert")).capture([11], target=[12])
    with pytest.raises(GenerationError, match="does not generate"):
        Lens(lens.model, stack="encoder").generate([11])


def test_a_source_that_changes_between_the_steps_is_refused() -> None:
    lens, source = Lens(model_of("bart")), source_of("bart")
    capture = lens.capture(source, target=TARGET, attention=True)
    pattern = capture.cross_attention.pattern(0)
    module = lens.model.get_decoder().layers[0].encoder_attn

    def call(key: Tensor) -> AttentionCall:
        return AttentionCall(module, "sdpa", sdpa, pattern.q, key, None, {}, None)

    same = cross_of_pass(call(pattern.k.clone()), pattern, 0)
    assert same.k.data_ptr() == pattern.k.data_ptr()
    with pytest.raises(AttentionPathError, match="layer 0 attends to another source"):
        cross_of_pass(call(pattern.k + 1), pattern, 0)


def test_a_model_in_training_draws_nothing_for_its_made_up_source() -> None:
    model = build_as("speech", "speech_to_text")
    model.generation_config.decoder_start_token_id = 3
    for module in model.train().modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.1
    lens, sound, state = Lens(model), source_of("speech_to_text"), torch.get_rng_state()
    with torch.inference_mode():
        lens.generate(sound, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        model(**sound, decoder_input_ids=torch.tensor([TARGET]))
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_generation_config_with_empty_or_odd_rules() -> None:
    lens, source = Lens(build_as("seq2seq", "bart")), source_of("bart")
    lens.model.generation_config = config = GenerationConfig(decoder_start_token_id=5)
    wanted = lens.generate(source, max_new_tokens=3).token_ids.tolist()
    names = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
    for name in names:
        setattr(config, name, [])
        assert lens.generate(source, max_new_tokens=3).token_ids.tolist() == wanted
        setattr(config, name, ["x"])
        with pytest.raises(GenerationError, match=rf"generation_config\.{name} \['x'\] makes no"):
            lens.generate(source, max_new_tokens=3)
        setattr(config, name, None)
    for name, beyond in (("forced_bos_token_id", 999), ("bad_words_ids", [[999]])):
        setattr(config, name, beyond)
        with pytest.raises(GenerationError, match=rf"{name} \[*999.* give ids of this model"):
            lens.generate(source, max_new_tokens=3)
        setattr(config, name, None)
    config.bad_words_ids, config.eos_token_id = [[wanted[0]]], wanted[0]
    assert lens.generate(source, max_new_tokens=3).token_ids.tolist() == wanted[:1]
