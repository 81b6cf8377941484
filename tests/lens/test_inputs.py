"""Inputs beyond text: images, vectors and positions, on tiny vision–language models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinymodels import build, prompt_ids
from tinymodels.checks import attention_vs_eager, check_capture, hooked_run
from tinymodels.images import IMAGE, build_image_model, image_inputs
from tinymodels.mappings import build_as
from tolerances import assert_near
from trilens import Capture, Lens
from trilens.edits import Knockout, Scale, Steer
from trilens.errors import (
    AnatomyError,
    CaptureError,
    DtypeError,
    EmptyPromptError,
    GenerationError,
    NonFiniteError,
    NotStoredError,
    OutOfRangeError,
    PromptTooLongError,
    ShapeError,
    TokenIdError,
    TrilensError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("quiet")

SHAPES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "llava": [("image 0", (4, 4)), ("image 1", (4, 4))],
    "pixtral": [("image 0", (4, 6))],
    "qwen2_5_vl": [("image 0", (4, 6))],
    "qwen3_vl": [("image 0", (4, 6))],
    "gemma3": [("image 0", (2, 2))],
    "gemma4": [("image 0", (5, 11)), ("image 1", (8, 8))],
    "idefics3": [("image 0", (2, 2)), ("image 1", (2, 2)), ("image 2", (2, 2))],
    "smolvlm": [("image 0", (2, 2)), ("image 1", (2, 2)), ("image 2", (2, 2))],
    "paligemma": [("image 0", (4, 4))],
    "internvl": [("image 0 tile 0", (2, 2)), ("image 0 tile 1", (2, 2))],
}


@cache
def opened(name: str) -> Lens:
    return Lens(build_image_model(name))


@pytest.fixture
def llava() -> Lens:
    return opened("llava")


@pytest.mark.parametrize("name", SHAPES)
def test_a_text_with_images_is_captured_as_the_model_computes_it(name: str) -> None:
    lens, inputs = opened(name), image_inputs(name)
    with torch.no_grad():
        plain = lens.model(**inputs, use_cache=False).logits
    capture = lens.capture(inputs=inputs, residual="all", attention=True, gates=True)
    check_capture(lens, plain, capture, {**inputs, "use_cache": False})
    difference = attention_vs_eager(lens, capture, {**inputs, "use_cache": False})
    if name == "gemma4":
        # Other kernels round otherwise, which its large scores magnify: the eager run's own.
        eager = copy.deepcopy(lens.model)
        eager.set_attn_implementation("eager")
        own = Lens(eager)
        asked = own.capture(inputs=inputs, attention=True)
        difference = attention_vs_eager(own, asked, {**inputs, "use_cache": False})
    assert difference is not None
    assert difference <= 1e-5
    assert len(capture.tokens) == inputs["input_ids"].shape[1]
    assert [(each.name, each.positions.shape) for each in capture.media] == SHAPES[name]


@pytest.mark.parametrize("name", SHAPES)
def test_images_stand_among_the_tokens(name: str) -> None:
    capture = opened(name).capture(inputs=image_inputs(name), logits=None)
    ids = capture.token_ids
    every = np.concatenate([each.positions.reshape(-1) for each in capture.media])
    assert sorted(every) == torch.nonzero(ids == IMAGE).reshape(-1).tolist()
    for each in capture.media:
        for (row, col), position in np.ndenumerate(each.positions):
            assert capture.tokens[position] == f"<{each.name}: row {row}, col {col}>"
    assert capture.tokens[0] == f"<{int(ids[0])}>"


def tower_of(model: Any) -> nn.Module:
    return next(
        m
        for path, m in model.named_modules()
        if path.endswith(("vision_tower", "visual", "vision_model"))
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_place_of_a_token_is_where_its_pixels_are(name: str) -> None:
    """With the tower's attention silenced, a place's pixels reach its own token alone."""
    model = build_image_model(name)
    for module in tower_of(model).modules():
        if "Attention" in type(module).__name__:
            for parameter in module.parameters():
                parameter.data.zero_()
    inputs = image_inputs(name)
    capture = Lens(model).capture(inputs=inputs, logits=None)
    stack = model.get_decoder() if name not in ("idefics3", "smolvlm") else model.model.text_model
    seen: list[Tensor] = []
    stack.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    for number, media in enumerate(capture.media):
        # Of a large image some will do.
        every = list(np.ndenumerate(media.positions))
        for index, position in every[:: 1 if len(every) <= 24 else len(every) // 4]:
            pixels = inputs["pixel_values"].clone()
            brighten(pixels, inputs, number, index, media.positions.shape)
            with torch.no_grad():
                model(**inputs)
                model(**{**inputs, "pixel_values": pixels})
            before, after = seen[-2:]
            moved = torch.nonzero((before != after).any(-1)[0]).reshape(-1).tolist()
            assert moved == [position]


def brighten(
    pixels: Tensor, inputs: dict[str, Tensor], view: int, index: tuple[int, ...], shape: Any
) -> None:
    """Change the pixels of one token, by the processors' own layouts."""
    (row, col), (rows, cols) = index, shape
    if "image_position_ids" in inputs:
        # Gemma 4's processor writes column and row beside each patch; nine make a token.
        mine = inputs["image_position_ids"][view] // 3 == torch.tensor([col, row])
        assert int(mine.all(-1).sum()) == 9
        pixels[view, mine.all(-1)] += 1.0
        return
    if "image_grid_thw" in inputs:
        # Qwen's processor writes the four patches of a token one after the other.
        start = 4 * (row * cols + col)
        pixels[start : start + 4] += 1.0
        return
    tiles = pixels.view(-1, *pixels.shape[-3:])
    height, width = tiles.shape[-2] // rows, tiles.shape[-1] // cols
    tiles[view, :, row * height : (row + 1) * height, col * width : (col + 1) * width] += 1.0


def test_places_that_the_model_does_not_bear_out_are_not_claimed() -> None:
    """A projector that turns the image over: as many tokens as make its shape, in another order."""
    model = build_image_model("llava")
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(
        lambda _m, _a, out: out.view(-1, 4, 4, 64).transpose(1, 2).reshape(out.shape)
    )
    capture = Lens(model).capture(inputs=image_inputs("llava"), logits=None)
    assert [each.positions.shape for each in capture.media] == [(16,), (16,)]
    assert capture.tokens[5] == "<image 0: token 0>"
    assert capture.image_positions(1).tolist() == list(range(24, 40))


def test_text_that_attends_to_images_beside_it() -> None:
    """Mllama: some blocks attend to the image alone, and text by itself passes them by."""
    model, inputs = build_image_model("mllama"), image_inputs("mllama")
    lens = Lens(model, probe=inputs)
    assert lens.n_layers == 5
    assert lens.attention_layers == (0, 2, 4)
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
    capture = lens.capture(inputs=inputs, residual="all", attention=True, gates=True)
    check_capture(lens, plain, capture, {**inputs, "use_cache": False})
    assert capture.cross_attention.layers == (1, 3)
    assert capture.source is not None
    assert len(capture.source.tokens) == 34
    assert capture.source.tokens[7] == "<image position 7>"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer, theirs in enumerate(weights):
        cache = capture.cross_attention if layer in (1, 3) else capture.attention
        assert_near(cache.get_layer(layer), theirs, 1e-5)
    with pytest.raises(CaptureError, match=r"layers\.1.*probe="):
        lens.capture([11, 12, 13])
    plain_lens = Lens(model)
    assert plain_lens.capture([11, 12, 13], residual="all").residual.layers == (0, 1, 2)
    with pytest.raises(CaptureError, match=r"layers\.1 runs on these inputs.*probe=inputs"):
        plain_lens.capture(inputs=inputs)
    assert not model.model.language_model.layers[1]._forward_pre_hooks


@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3", "pixtral"])
def test_a_vision_tower_is_a_stack_of_its_own(name: str) -> None:
    model = build_image_model(name)
    lens = Lens(model, stack="vision")
    assert lens.stacks == ("language", "vision")
    assert lens.model is not model
    pixels = image_inputs(name)["pixel_values"]
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[:1]
    kwargs = {"pixel_values": pixels}
    capture = lens.capture(inputs=kwargs, residual="all", attention=True, sites=["mlp.out"])
    _, seen = hooked_run(lens.model, [block.path for block in lens.anatomy.blocks], kwargs)
    for layer, stream in enumerate(seen):
        assert torch.equal(capture.residual[layer], stream[0])
    difference = attention_vs_eager(lens, capture, kwargs)
    assert difference is not None
    assert difference <= 1e-5
    assert capture.tokens[1] == "<image position 1>"
    assert lens.site_layers["mlp.out"] == (0, 1)
    if name != "pixtral":  # which reads several images as one row
        two = {"pixel_values": pixels.expand(2, -1, -1, -1)}
        with pytest.raises(ShapeError, match="2 prompts or images"):
            lens.capture(inputs=two)
    with pytest.raises(UsageError, match=r"'vision' is not one of .*'language'"):
        Lens(build("llama"), stack="vision")
    with pytest.raises(UsageError, match=r"probe= is of a model that runs as a whole"):
        Lens(model, stack="vision", probe=kwargs)


def test_an_encoder_decoder_takes_inputs_too() -> None:
    sound = Lens(build_as("speech", "whisper"))
    features = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[1, 11, 12]])
    given = {"input_features": features, "decoder_input_ids": target}
    found = sound.capture(inputs=given, residual="all")
    expected = sound.capture({"input_features": features}, target=target, residual="all")
    assert torch.equal(found.logits, expected.logits)
    assert found.tokens == expected.tokens
    text = Lens(build_as("seq2seq", "t5"))
    source = {"input_ids": prompt_ids("", 9), "attention_mask": torch.ones(1, 9)}
    found = text.capture(inputs={**source, "decoder_input_ids": target})
    assert torch.equal(found.logits, text.capture(source["input_ids"], target=target).logits)
    assert torch.equal(text.capture(inputs=source, target=target).logits, found.logits)


def test_a_model_that_runs_with_images_alone_is_proven_on_them() -> None:
    model = build_as("image", "blip-2")
    with pytest.raises(AnatomyError, match=r"'pixel_values'; where it needs more.*probe="):
        Lens(model)
    queries = model.config.num_query_tokens
    token = model.config.image_token_index
    ids = torch.cat([torch.full((queries,), token), prompt_ids("", 9)[0]])[None]
    size = model.config.vision_config.image_size
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size)}
    lens = Lens(model, probe=inputs)
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
    capture = lens.capture(inputs=inputs, residual="all", attention=True)
    check_capture(lens, plain, capture, {**inputs, "use_cache": False})
    assert capture.tokens[0] == "<image 0: token 0>"


def test_which_patch_a_word_attends_to_is_one_question(llava: Lens) -> None:
    capture = llava.capture(inputs=image_inputs("llava"), attention=True)
    where = capture.image_positions(1)
    assert where.shape == (4, 4)
    assert where[2, 3] == 24 + 11
    row = capture.attention.attention_from_position(2, -1)
    weights = capture.attention.get_layer(2)[0].mean(0)[-1]
    assert_near(row[where], weights.numpy()[where], 1e-5)
    best = np.unravel_index(row[where].argmax(), where.shape)
    assert capture.tokens[where[best]] == f"<image 1: row {best[0]}, col {best[1]}>"
    with pytest.raises(OutOfRangeError, match="image 2 is out of range"):
        capture.image_positions(2)
    with pytest.raises(OutOfRangeError, match="tile 0 is out of range: image 0 is in one piece"):
        capture.image_positions(0, tile=0)
    tiled = opened("internvl").capture(inputs=image_inputs("internvl"), logits=None)
    with pytest.raises(OutOfRangeError, match="cut into tiles 0–1: name one"):
        tiled.image_positions()
    assert tiled.image_positions(tile=-1).tolist() == [[9, 10], [11, 12]]
    with pytest.raises(NotStoredError, match=r"stands for an image: .*inputs=processor"):
        llava.capture([11, 12]).image_positions()


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_edits_and_sites_of_image_tokens(name: str) -> None:
    lens, inputs = opened(name), image_inputs(name)
    plain = lens.capture(inputs=inputs, sites=["resid_pre", "attn.z"], residual="all")
    image = plain.image_positions().reshape(-1).tolist()
    same = lens.capture(inputs=inputs, edits=Scale("resid_post", 1.0, positions=image))
    assert torch.equal(same.logits, plain.logits)
    cut = lens.capture(
        inputs=inputs, attention=True, edits=Knockout(queries=[-1], keys=image, layers=None)
    )
    assert not torch.equal(cut.logits[-1], plain.logits[-1])
    for layer in range(lens.n_layers):
        row = cut.attention.attention_from_position(layer, len(plain.tokens) - 1)
        assert row[image].max() == 0.0
        assert row.sum() > 0.5
    vector = torch.ones(lens.d_model)
    steered = lens.capture(
        inputs=inputs,
        residual="all",
        edits=Steer("resid_post", vector=vector, layers=0, positions=image),
    )
    moved = (steered.residual[0] - plain.residual[0])[image]
    assert_near(moved, torch.ones_like(moved), 1e-4)


def test_a_saved_capture_knows_its_images(llava: Lens, tmp_path: Path) -> None:
    capture = llava.capture(inputs=image_inputs("llava"))
    loaded = Capture.load(capture.save(tmp_path / "a.safetensors"))
    assert loaded.tokens == capture.tokens
    assert np.array_equal(loaded.image_positions(1), capture.image_positions(1))
    assert loaded.image_positions(1).dtype == np.int64
    assert llava.capture([11, 12]).media == ()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_text_is_generated_after_images(name: str) -> None:
    lens, inputs = opened(name), image_inputs(name)
    made = lens.generate(
        inputs=inputs, max_new_tokens=4, capture={"residual": "all", "attention": True}
    )
    with torch.no_grad():
        ids = lens.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    start = inputs["input_ids"].shape[1]
    assert made.token_ids.tolist() == ids[0, start:].tolist()
    assert made.capture is not None
    assert made.capture.tokens[:start] == lens.capture(inputs=inputs, logits=None).tokens
    whole = torch.cat([inputs["input_ids"], made.token_ids[None]], dim=1)
    grown = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    for each in ("mm_token_type_ids", "token_type_ids"):
        if each in inputs:
            grown[each] = torch.nn.functional.pad(inputs[each], (0, 4))
    expected = lens.capture(inputs=grown, residual="all", attention=True)
    for layer in range(lens.n_layers):
        assert_near(made.capture.residual[layer], expected.residual[layer], 1e-4)
        ours, theirs = (c.attention.get_layer(layer) for c in (made.capture, expected))
        assert_near(ours, theirs, 1e-4)


def test_a_model_that_attends_to_images_beside_its_text_generates() -> None:
    """Mllama: the steps are measured on what the model was proven on, for text alone fails."""
    model, inputs = build_image_model("mllama"), image_inputs("mllama")
    lens, options = Lens(model, probe=inputs), {"residual": "all", "attention": True}
    made = lens.generate(inputs=inputs, max_new_tokens=4, capture=options)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert made.token_ids.tolist() == ids[0, -4:].tolist()
    capture, more = made.capture, made.token_ids[None]
    assert capture is not None
    grown = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    for name in ("attention_mask", "cross_attention_mask"):
        if name in inputs:
            last = inputs[name][:, -1:]
            rows = last.expand(-1, 4, *last.shape[2:])
            grown[name] = torch.cat([inputs[name], rows], 1)
    whole = lens.capture(inputs=grown, **options)
    assert capture.source_tokens == whole.source_tokens
    assert_near(capture.logits, whole.logits, 1e-4)
    for part in ("attention", "cross_attention"):
        ours, theirs = getattr(capture, part), getattr(whole, part)
        assert ours.layers == theirs.layers
        for layer in theirs.layers:
            assert_near(ours.get_layer(layer), theirs.get_layer(layer), 1e-4)


def kept(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if value is None or isinstance(value, Tensor):
                yield path, name, id(value)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_nothing_of_an_image_stays_behind(name: str) -> None:
    lens = Lens(build_image_model(name))
    vectors = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    before = list(kept(lens.model))
    text = lens.capture(inputs={"inputs_embeds": vectors})
    lens.capture(inputs=image_inputs(name))
    lens.generate(inputs=image_inputs(name), max_new_tokens=2)
    assert list(kept(lens.model)) == before
    assert torch.equal(lens.capture(inputs={"inputs_embeds": vectors}).logits, text.logits)
    # So that the test could fail: the model itself keeps how far the image moved the positions.
    with torch.no_grad():
        lens.model(**image_inputs(name))
    assert list(kept(lens.model)) != before


def test_vectors_stand_in_place_of_tokens() -> None:
    lens = Lens(build("llama"))
    ids = prompt_ids("llama", 9)
    vectors = lens.model.get_input_embeddings()(ids).detach()
    expected = lens.capture(ids, residual="all", attention=True)
    found = lens.capture(inputs={"inputs_embeds": vectors}, residual="all", attention=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.residual[1], expected.residual[1])
    assert found.tokens == [f"<embedding {i}>" for i in range(9)]
    assert found.token_ids.tolist() == [-1] * 9
    with pytest.raises(NotStoredError, match="given as vectors"):
        found.find("x")
    with pytest.raises(GenerationError, match=r"inputs_embeds.*give input_ids"):
        lens.generate(inputs={"inputs_embeds": vectors})


def test_positions_are_the_callers() -> None:
    lens = Lens(build("llama"))
    ids = prompt_ids("llama", 9)
    places = torch.arange(9)[None]
    expected = lens.capture(ids)
    assert torch.equal(
        lens.capture(inputs={"input_ids": ids, "position_ids": places}).logits, expected.logits
    )
    spread = lens.capture(inputs={"input_ids": ids.numpy(), "position_ids": (7 * places).tolist()})
    with torch.no_grad():
        plain = lens.model(ids, position_ids=7 * places).logits[0]
    assert torch.equal(spread.logits, plain)
    assert not torch.equal(spread.logits, expected.logits)


def test_a_metrics_gradients_reach_image_tokens(llava: Lens) -> None:
    found = llava.gradients(
        None, lambda logits: logits[-1, 20], inputs=image_inputs("llava"), layers=[0]
    )
    assert found.token_ids.tolist() == image_inputs("llava")["input_ids"][0].tolist()
    (gradient,) = (found.gradients["resid_post", 0],)
    assert float(gradient[5:21].abs().max()) > 0.0


def test_pixels_are_given_in_the_models_dtype() -> None:
    model = build_image_model("llava").to(torch.bfloat16)
    inputs = image_inputs("llava")
    pixels = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        plain = model(**{**inputs, "pixel_values": pixels}, use_cache=False).logits[0]
    assert torch.equal(Lens(model).capture(inputs=inputs).logits, plain)


def with_(**changes: Any) -> dict[str, Any]:
    return {**image_inputs("llava"), **changes}


SEQ = 46
BAD: list[tuple[Any, type[TrilensError], str]] = [
    ("a text", UsageError, "inputs is a str: give a mapping"),
    (with_(colour=torch.ones(1)), UsageError, r"'colour', which the forward.*pixel_values"),
    (with_(labels=torch.ones(1, SEQ)), UsageError, "holds 'labels', which a capture sets"),
    (with_(output_attentions=True), UsageError, "ask with attention=True"),
    (with_(inputs_embeds=torch.ones(1, SEQ, 64)), UsageError, "inputs holds both"),
    (with_(input_ids=None), UsageError, r"neither \(.*pixel_values.*\): give input_ids"),
    (with_(input_ids=torch.ones(2, SEQ, dtype=torch.long)), ShapeError, "2 rows, and"),
    (with_(input_ids=torch.ones(1, 1, SEQ, dtype=torch.long)), ShapeError, "allowed is .1, seq"),
    (with_(input_ids=torch.ones(1, SEQ)), DtypeError, "float32: token ids are integers"),
    (with_(input_ids=torch.full((1, SEQ), 5000)), TokenIdError, "5000 at position 0"),
    (with_(input_ids=torch.ones(1, 0, dtype=torch.long)), EmptyPromptError, "no tokens"),
    (with_(input_ids=object()), DtypeError, "is a object"),
    (with_(input_ids=[[1, 2], [3]]), DtypeError, "return_tensors='pt'"),
    (with_(attention_mask=torch.ones(1, 9)), ShapeError, "there are 46 tokens"),
    (with_(attention_mask=torch.ones(2, SEQ)), ShapeError, "2 rows"),
    (with_(attention_mask=torch.arange(SEQ)[None]), UsageError, "hides 1 of 46 tokens"),
    (with_(position_ids=torch.ones(1, 9)), ShapeError, "'position_ids'.*46 tokens"),
    (with_(pixel_values=torch.full((2, 3, 32, 32), torch.nan)), NonFiniteError, "in 6144 of"),
    (with_(pixel_values=torch.ones(2, 3, 32, 32, device="meta")), UsageError, "meta device"),
    (with_(pixel_values=np.array(["a"])), DtypeError, "numbers are needed"),
    ({"inputs_embeds": torch.ones(1, 4, 63)}, ShapeError, "vectors of 63 numbers.*have 64"),
    ({"inputs_embeds": torch.ones(1, 4, 64, dtype=torch.long)}, DtypeError, "real numbers"),
    ({"inputs_embeds": torch.ones(4)}, ShapeError, "allowed is .1, seq, d_model"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "error", "words"), BAD)
def test_inputs_that_are_none_are_refused_by_name(
    llava: Lens, inputs: Any, error: type[TrilensError], words: str
) -> None:
    with pytest.raises(error, match=words):
        llava.capture(inputs=inputs)


def test_images_that_do_not_fit_the_text_are_the_models_to_refuse(llava: Lens) -> None:
    one = with_(pixel_values=torch.ones(1, 3, 32, 32))
    with pytest.raises(UsageError, match=r"does not run on these inputs.*do not match"):
        llava.capture(inputs=one)
    with pytest.raises(UsageError, match=r"both a prompt and inputs"):
        llava.capture([11, 12], inputs=with_())
    with pytest.raises(UsageError, match=r"nothing is given to read"):
        llava.capture()
    with pytest.raises(UsageError, match=r"prompt holds pixel_values.*inputs="):
        llava.capture(with_())
    table = Lens(build("gpt2"))
    with pytest.raises(PromptTooLongError, match="has 161 tokens, this model has 160 positions"):
        table.capture(inputs={"input_ids": torch.ones(1, 161, dtype=torch.long)})
