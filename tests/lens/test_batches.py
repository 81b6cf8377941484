"""Batches of pairs and of inputs: what each prompt gives is what a pass of its own gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LEDConfig, LEDForConditionalGeneration, PreTrainedModel

from tinymodels import build, prompt_ids
from tinymodels.images import build_image_model, image_inputs
from tinymodels.mappings import build_as
from tolerances import assert_near
from trilens.caches.patterns.across import join_across, unpad_across
from trilens.caches.patterns.protocol import DensePattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.corpus.capture import capture_corpus
from trilens.edits import Ablate, Scale
from trilens.errors import GenerationError, PromptTooLongError, ShapeError, TokenIdError, UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.positions import max_positions_of
from trilens.models.tokens import SourceTarget
from trilens.progress import Step

pytestmark = pytest.mark.usefixtures("quiet")

TEXT = ("t5", "bart", "marian", "m2m_100", "led", "mvp", "t5gemma2", "nllb-moe")
SOUND = {"whisper": (1, 8, 32), "speech_to_text": (1, 40, 80), "moonshine": (1, 1607)}
EVERYTHING = {"residual": "all", "attention": True}


def ids_of(length: int, seed: int) -> Tensor:
    return prompt_ids("", length, seed=seed)[0]


def sound_of(name: str, seed: int) -> dict[str, Tensor]:
    shape = SOUND[name]
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {"input_values" if len(shape) == 2 else "input_features": made}


def pairs_of(name: str) -> list[SourceTarget]:
    lengths = ((7, 9), (12, 4), (3, 13), (5, 2))
    return [
        SourceTarget(sound_of(name, n) if name in SOUND else ids_of(n, n + 50), ids_of(m, m))
        for n, m in lengths
    ]


def opened(name: str) -> Lens:
    return Lens(build_as("speech" if name in SOUND else "seq2seq", name))


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The rows of each pass of a model inside the block."""
    rows: list[int] = []

    def before(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        given = [x for x in kwargs.values() if isinstance(x, Tensor)]
        rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else given[0]))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def assert_same(ours: Capture, theirs: Capture) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    if theirs.logits is not None:
        assert_near(ours.logits, theirs.logits, 1e-5)
    for layer in theirs.residual:
        assert_near(ours.residual[layer], theirs.residual[layer], 1e-5)
    for part in ("attention", "cross_attention"):
        assert ours.has(part) == theirs.has(part)
        if theirs.has(part):
            one, other = getattr(ours, part), getattr(theirs, part)
            assert one.layers == other.layers
            for layer in other.layers:
                assert_near(one.pattern(layer).dense(), other.pattern(layer).dense(), 1e-5)
    assert (ours.source is None) == (theirs.source is None)
    if theirs.source is not None:
        assert ours.source_tokens == theirs.source_tokens
        assert ours.source is not None
        assert ours.source.token_ids.tolist() == theirs.source.token_ids.tolist()


@pytest.mark.parametrize("name", (*TEXT, *SOUND))
def test_pairs_of_several_lengths_run_in_one_padded_pass(name: str) -> None:
    lens, pairs = opened(name), pairs_of(name)
    options = {**EVERYTHING, "attention": not lens.anatomy.other_attention}
    with counted(lens.model) as rows:
        many = list(lens.capture_many(pairs, batch_size=4, **options))
    assert rows[-1] == 4
    for pair, found in zip(pairs, many, strict=True):
        assert_same(found, lens.capture(pair, **options))
    with counted(lens.model) as rows:
        list(lens.capture_many(pairs, batch_size=4, logits=None))
    assert rows == [4]


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_batch_of_pairs_against_weights_that_transformers_gives(name: str) -> None:
    lens, pairs = opened(name), pairs_of(name)
    many = list(lens.capture_many(pairs, batch_size=4, **EVERYTHING))
    lens.model.set_attn_implementation("eager")
    eager = list(lens.capture_many(pairs, batch_size=4, **EVERYTHING))
    for pair, *found in zip(pairs, many, eager, strict=True):
        source = pair.source if isinstance(pair.source, dict) else {"input_ids": pair.source[None]}
        with torch.no_grad():
            plain = lens.model(
                **source, decoder_input_ids=pair.target[None], output_attentions=True,
                output_hidden_states=True,
            )  # fmt: skip
        for each in found:
            for layer, (own, cross) in enumerate(
                zip(plain.decoder_attentions, plain.cross_attentions, strict=True)
            ):
                assert_near(each.attention.pattern(layer).dense(), own, 1e-5)
                assert_near(each.cross_attention.pattern(layer).dense(), cross, 1e-5)
            for layer in range(lens.n_layers - 1):
                stream = plain.decoder_hidden_states[layer + 1][0]
                assert_near(each.residual[layer], stream, 1e-5)


def test_sites_and_gates_of_a_batch_of_pairs_and_of_an_answer() -> None:
    lens, pairs = opened("nllb-moe"), pairs_of("nllb-moe")
    lens.model.generation_config.decoder_start_token_id = 3
    options: dict[str, Any] = {"sites": list(lens.site_layers), "gates": True, "residual": None}
    many = list(lens.capture_many(pairs, batch_size=4, **options))
    written = lens.generate(pairs[0], max_new_tokens=4, capture=options).capture
    assert written is not None
    whole = SourceTarget(pairs[0].source, written.token_ids)
    for pair, found in zip([*pairs, whole], [*many, written], strict=True):
        alone = lens.capture(pair, **options)
        assert len(alone.sites) >= 20
        for key in alone.sites:
            ours, theirs = (torch.as_tensor(each.sites[key]) for each in (found, alone))
            hidden = torch.isinf(theirs)
            assert torch.equal(torch.isinf(ours), hidden), key
            assert_near(ours.masked_fill(hidden, 0), theirs.masked_fill(hidden, 0), 1e-5)
        assert found.gates.names == alone.gates.names != ()
        for name in alone.gates.names:
            for layer in alone.gates.layers(name):
                assert_near(found.gates.get(name, layer), alone.gates.get(name, layer), 1e-5)


def test_what_is_cut_out_of_a_batch_keeps_nothing_of_it_alive() -> None:
    lens, pairs = opened("bart"), pairs_of("bart")
    many = list(lens.capture_many(pairs, batch_size=4, attention=True))
    for found in many:
        pattern = found.cross_attention.pattern(1)
        assert isinstance(pattern, SoftmaxPattern)
        assert pattern.mask is None
        for tensor in pattern.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def mixing(module: nn.Module, pick: Callable[[Any], Tensor]) -> None:
    """From now on the rows of a module's output look at each other."""

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = pick(output)
        hidden.add_(hidden.mean(0, keepdim=True) * 0.1)

    module.register_forward_hook(after)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_model_whose_rows_meet_runs_its_pairs_one_by_one(name: str) -> None:
    model = build_as("speech" if name in SOUND else "seq2seq", name)
    mixing(model.get_encoder(), lambda output: output.last_hidden_state)
    lens, pairs = Lens(model), pairs_of(name)
    assert not lens.batches_safely(8)
    list(lens.capture_many(pairs, batch_size=4))
    with counted(model) as rows:
        many = list(lens.capture_many(pairs, batch_size=4, **EVERYTHING))
    assert rows == [1, 1, 1, 1]
    for pair, found in zip(pairs, many, strict=True):
        assert torch.equal(found.logits, lens.capture(pair).logits)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bart"])
def test_edits_of_a_batch_of_pairs(name: str) -> None:
    lens, pairs = opened(name), pairs_of(name)
    edits = [Ablate("cross.out", layers=1, positions=-1), Scale("attn.z", layers=2, factor=0.5)]
    many = list(lens.capture_many(pairs, batch_size=4, edits=edits, sites=["cross.add"]))
    for pair, found in zip(pairs, many, strict=True):
        alone = lens.capture(pair, edits=edits, sites=["cross.add"])
        assert_near(found.logits, alone.logits, 1e-5)
        assert_near(found.sites["cross.add", 3], alone.sites["cross.add", 3], 1e-5)
        assert not torch.equal(found.logits, lens.capture(pair).logits)  # type: ignore[arg-type]


def test_prompts_run_with_their_neighbours_of_one_kind() -> None:
    lens = opened("whisper")
    short = {"input_features": torch.randn(1, 8, 32)}
    kinds = [sound_of("whisper", 1), sound_of("whisper", 2), short, sound_of("whisper", 3)]
    pairs = [SourceTarget(each, [1, 11]) for each in kinds]
    # An option beside the tensors is another kind.
    pairs[2] = SourceTarget({**short, "attention_mask": torch.ones(1, 32)}, [1, 11])
    list(lens.capture_many(pairs, batch_size=8))
    steps: list[Step] = []
    with counted(lens.model) as rows:
        many = list(lens.capture_many(iter(pairs), batch_size=8, progress=steps.append))
    assert rows == [2, 1, 1]
    assert [step.done for step in steps] == [2, 3, 4]
    for pair, found in zip(pairs, many, strict=True):
        assert_near(found.logits, lens.capture(pair).logits, 1e-5)


def images_of(name: str, count: int) -> list[dict[str, Any]]:
    """Inputs of one shape, each with words and pixels of its own."""
    found = []
    for seed in range(count):
        given = {k: v.clone() for k, v in image_inputs(name).items()}
        generator = torch.Generator().manual_seed(seed)
        pixels = given["pixel_values"]
        given["pixel_values"] = torch.randn(pixels.shape, generator=generator)
        given["input_ids"][0, 0] = 11 + seed
        found.append(given)
    return found


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "mllama"])
def test_inputs_of_one_shape_run_in_one_pass(name: str) -> None:
    model, given = build_image_model(name), images_of(name, 3)
    lens = Lens(model, probe=given[0] if name == "mllama" else None)
    first = list(lens.capture_many(inputs=given, **EVERYTHING))
    with counted(model) as rows:
        many = list(lens.capture_many(inputs=given, **EVERYTHING))
    assert rows[-1] == 3
    for each, found, before in zip(given, many, first, strict=True):
        alone = lens.capture(inputs=each, **EVERYTHING)
        for ours in (found, before):
            assert_same(ours, alone)
            assert [m.to_dict() for m in ours.media] == [m.to_dict() for m in alone.media]
    assert not torch.equal(many[0].logits, many[1].logits)  # type: ignore[arg-type]


def test_inputs_of_other_shapes_run_one_by_one() -> None:
    lens = Lens(build("llama"))
    vectors = [torch.randn(1, n, 64) for n in (4, 6, 6)]
    given = [{"inputs_embeds": each} for each in vectors]
    list(lens.capture_many(inputs=given))
    with counted(lens.model) as rows:
        many = list(lens.capture_many(inputs=iter(given), residual="all"))
    assert rows == [1, 2]
    for each, found in zip(given, many, strict=True):
        assert_same(found, lens.capture(inputs=each, residual="all"))
    # Rows that a model mixes are told from those that it does not, whatever was measured before.
    mixing(lens.model.model.layers[1].mlp, lambda output: output)
    other = Lens(lens.model)
    same = [given[1], given[1]]
    for batch in (same, given[1:]):
        for each, found in zip(batch, other.capture_many(inputs=batch), strict=True):
            assert_near(found.logits, other.capture(inputs=each).logits, 1e-5)


def test_positions_with_an_axis_before_the_rows_are_not_put_together_wrongly() -> None:
    """Qwen-VL's positions are [3, 1, seq]: no rows stand first."""
    lens, given = Lens(build_image_model("qwen2_5_vl")), images_of("qwen2_5_vl", 2)
    seq = given[0]["input_ids"].shape[1]
    for place, each in enumerate(given):
        each["position_ids"] = (torch.arange(seq) * (1 + place)).expand(3, 1, seq)
    for each, found in zip(given, lens.capture_many(inputs=given), strict=True):
        assert_near(found.logits, lens.capture(inputs=each).logits, 1e-5)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["whisper", "moonshine"])
def test_sound_as_inputs_of_either_stack(name: str, stack: Any) -> None:
    lens = Lens(build_as("speech", name), stack=stack)
    given: list[dict[str, Any]] = [sound_of(name, seed) for seed in range(3)]
    if stack == "decoder":
        given = [{**x, "decoder_input_ids": ids_of(3 + n, n)[None]} for n, x in enumerate(given)]
    many = list(lens.capture_many(inputs=given, **EVERYTHING))
    with counted(lens.model) as rows:
        list(lens.capture_many(inputs=given))
    assert rows[-1] == 3
    for each, found in zip(given, many, strict=True):
        assert_same(found, lens.capture(inputs=each, **EVERYTHING))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_vectors_as_inputs_of_a_text_encoder(name: str) -> None:
    lens = Lens(build_as("seq2seq", name), stack="encoder")
    ids = ids_of(6, 1)[None]
    whole = lens.capture(ids[0], residual="all", attention=True)
    found = lens.capture(inputs={"input_ids": ids}, residual="all", attention=True)
    assert_same(found, whole)
    vectors = lens.model.get_input_embeddings()(ids).detach()
    seen = lens.capture(inputs={"inputs_embeds": vectors}, residual="all", attention=True)
    for layer in whole.residual:
        assert_near(seen.residual[layer], whole.residual[layer], 1e-5)
    assert seen.tokens[0] == "<embedding 0>"
    batch = [{"inputs_embeds": vectors}, {"inputs_embeds": vectors.flip(1)}]
    for each, one in zip(batch, lens.capture_many(inputs=batch, **EVERYTHING), strict=True):
        assert_same(one, lens.capture(inputs=each, **EVERYTHING))


def test_images_of_a_vision_tower_run_together() -> None:
    lens = Lens(build_image_model("llava"), stack="vision")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = [{"pixel_values": each[None]} for each in pixels]
    list(lens.capture_many(inputs=given))
    with counted(lens.model) as rows:
        many = list(lens.capture_many(inputs=given, **EVERYTHING))
    assert rows[-1] == 3
    for each, found in zip(given, many, strict=True):
        assert_same(found, lens.capture(inputs=each, **EVERYTHING))


def test_a_full_memory_parts_a_batch_for_once() -> None:
    lens = Lens(build_image_model("llava"), stack="vision")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = [{"pixel_values": each[None]} for each in pixels]

    def refuse_several(_: nn.Module, _args: Any, named: dict[str, Any]) -> None:
        if len(named["pixel_values"]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    handle = lens.model.register_forward_pre_hook(refuse_several, with_kwargs=True)
    assert len(list(lens.capture_many(inputs=given))) == 3
    handle.remove()
    with counted(lens.model) as rows:
        list(lens.capture_many(inputs=given))
    assert rows[-1] == 3


def test_inputs_that_are_no_list_of_mappings_are_refused(model: PreTrainedModel) -> None:
    lens = Lens(model)
    with pytest.raises(UsageError, match="inputs is one dict: give a list"):
        lens.capture_many(inputs={"input_ids": torch.ones(1, 3)})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="both prompts and inputs are given"):
        lens.capture_many([[11]], inputs=[{"input_ids": torch.ones(1, 3)}])
    with pytest.raises(UsageError, match="nothing is given to read"):
        lens.capture_many()
    ids = torch.tensor([[11, 12]])
    with pytest.raises(ShapeError, match=r"inputs\[1\]\['input_ids'\] has 2 rows"):
        list(lens.capture_many(inputs=[{"input_ids": ids}, {"input_ids": ids.expand(2, -1)}]))
    with pytest.raises(TokenIdError, match=r"inputs\[1\]: token id 999"):
        list(lens.capture_many(inputs=[{"input_ids": ids}, {"input_ids": ids + 988}]))


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama")


def test_a_store_of_pairs_is_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=r"predicts a target of a source.*stack='encoder'"):
        capture_corpus(opened("t5"), [ids_of(5, 0)], tmp_path / "store")  # type: ignore[list-item]


def test_patterns_across_are_cut_and_joined_as_their_weights_are() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, 2, 6, 8, generator=generator),
        torch.randn(2, 2, 9, 8, generator=generator),
    )
    seen = torch.rand(2, 1, 6, 9, generator=generator) > 0.3
    seen[..., 0] = True
    bias = torch.randn(1, 2, 6, 9, generator=generator)
    sinks = torch.randn(2, generator=generator)
    added = torch.zeros(2, 1, 6, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added, None):
        whole = SoftmaxPattern(q, k, scaling=0.4, mask=mask, bias=bias, sinks=sinks)
        cut = unpad_across(whole, 1, 4, 9)
        assert_near(cut.dense(), whole.dense()[1:, :, :4], 1e-6)
        dense = unpad_across(DensePattern(whole.dense()), 1, 4, 9)
        assert_near(dense.dense(), whole.dense()[1:, :, :4], 1e-6)
        row = [None if mask is None else mask[1:, :, i : i + 2] for i in (0, 2, 4)]
        if mask is not None:
            row[1] = None
        parts = [
            SoftmaxPattern(
                q[1:, :, i : i + 2], k[1:], scaling=0.4, mask=m, bias=bias[:, :, i : i + 2],
                sinks=sinks,
            )
            for i, m in zip((0, 2, 4), row, strict=True)
        ]  # fmt: skip
        joined = join_across(parts)
        assert isinstance(joined, SoftmaxPattern)
        assert_near(joined.dense(), torch.cat([part.dense() for part in parts], 2), 1e-6)
        mixed = join_across([parts[0], DensePattern(parts[1].dense()), parts[2]])
        assert isinstance(mixed, DensePattern)
        assert_near(mixed.dense(), joined.dense(), 1e-6)


def test_sources_longer_than_the_configured_positions_are_measured_once() -> None:
    lens = opened("t5")
    lens.model.config.n_positions = 16
    pairs = [SourceTarget(ids_of(n, n), ids_of(n - 15, n)) for n in (20, 25)]
    list(lens.capture_many(pairs, batch_size=2, logits=None))
    with counted(lens.model) as rows:
        list(lens.capture_many(pairs, batch_size=2, logits=None))
    assert rows == [2]


def test_an_encoder_that_reads_more_than_its_decoder_is_measured_within_both() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LEDConfig(
            vocab_size=120, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
            encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=48,
            max_encoder_position_embeddings=96, max_decoder_position_embeddings=40,
            attention_window=8, decoder_start_token_id=3,
        )  # fmt: skip
        lens = Lens(LEDForConditionalGeneration(config).eval())
    pairs = [SourceTarget(ids_of(n, n), ids_of(n // 10, n)) for n in (90, 70)]
    for pair, found in zip(pairs, lens.capture_many(pairs, batch_size=2), strict=True):
        assert_same(found, lens.capture(pair))
    with pytest.raises(PromptTooLongError, match="has 41 tokens, this model has 40 positions"):
        lens.capture(pairs[0].source, target=ids_of(41, 0))
    with pytest.raises(PromptTooLongError, match="has 97 tokens, this model has 96 positions"):
        lens.capture(ids_of(97, 0), target=[3])
    parts = (lens.model, lens.model.get_decoder(), lens.model.get_encoder(), config)
    assert [max_positions_of(part) for part in parts] == [40, 40, 96, 40]
    with pytest.raises(GenerationError, match="max_new_tokens 40 is out of range"):
        lens.generate(pairs[0].source, max_new_tokens=40)
    assert len(lens.generate(pairs[0].source, max_new_tokens=39).token_ids) >= 1
