"""Generated text: what is captured in steps is what one pass over the whole text gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import trilens
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.caches.patterns.protocol import Pattern
from trilens.edits import Ablate, Edit, Knockout, Scale, Steer
from trilens.errors import (
    EditError,
    GenerationError,
    NoTokenizerError,
    OutOfRangeError,
    PromptError,
    UntouchedEditError,
    UsageError,
    ValueRangeError,
)
from trilens.lens.lens import Lens

pytestmark = pytest.mark.usefixtures("quiet")

TRANSFORMERS = ("llama", "gpt2", "gemma2", "gemma3_text", "gemma4_text", "mixtral", "gpt_oss",
                "llama4_text", "deepseek_v3", "bloom", "diffllama", "mllama",
                "whole_eager")  # fmt: skip
RECURRENT = ("mamba", "mamba2", "rwkv", "recurrent_gemma")
HYBRIDS = ("jamba", "zamba", "falcon_h1", "qwen3_next", "kimi_linear", "minimax")
REFUSED = ("camembert", "doge", "zamba2", "xlstm")


def everything(lens: Lens) -> dict[str, Any]:
    return {
        "residual": "all",
        "attention": bool(lens.attention_layers),
        "gates": bool(lens.gate_layers),
        "effective": bool(lens.effective_layers),
        "states": (3, -1) if lens.state_layers else False,
    }


def opened(model_type: str) -> Lens:
    model = build("gemma2" if model_type == "whole_eager" else model_type)
    if model_type == "whole_eager":
        model.set_attn_implementation("eager")
    return Lens(model)


def assert_same(steps: trilens.Capture, whole: trilens.Capture) -> None:
    assert steps.tokens == whole.tokens
    assert torch.equal(steps.token_ids, whole.token_ids)
    assert_near(steps.logits, whole.logits, 1e-4)
    for layer in whole.residual:
        assert_near(steps.residual[layer], whole.residual[layer], 1e-4)
    for name in ("attention", "effective"):
        if whole.has(name):
            ours, theirs = getattr(steps, name), getattr(whole, name)
            assert ours.layers == theirs.layers
            for layer in theirs.layers:
                one: Pattern = ours.pattern(layer)
                assert type(one) is type(theirs.pattern(layer))
                assert_near(one.dense(), theirs.pattern(layer).dense(), 1e-4)
    if whole.has("gates"):
        assert steps.gates.names == whole.gates.names
        for name in whole.gates.names:
            for layer in whole.gates.layers(name):
                assert_near(steps.gates.get(name, layer), whole.gates.get(name, layer), 1e-4)
    if whole.has("states"):
        for layer in whole.states.layers:
            for place in whole.states.positions:
                for part in whole.states.spec(layer).parts:
                    ours, theirs = (
                        each.states.get(layer, place, part.name) for each in (steps, whole)
                    )
                    assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("model_type", (*TRANSFORMERS, *RECURRENT, *HYBRIDS))
def test_steps_are_one_pass_over_the_whole_text(model_type: str) -> None:
    lens, ids = opened(model_type), prompt_ids("llama", 14)
    plain = lens.model.generate(
        ids, generation_config=GenerationConfig(max_new_tokens=9, do_sample=False)
    )
    found = lens.generate(ids, max_new_tokens=9, capture=everything(lens))
    if found.stopped_by == "length":
        assert found.token_ids.tolist() == plain[0, 14:].tolist()
    assert found.prompt_tokens == 14
    assert found.capture is not None
    assert len(found.capture.tokens) == 14 + len(found.token_ids)
    assert_same(found.capture, lens.capture(found.capture.token_ids, **everything(lens)))


@pytest.mark.parametrize("kind", ["transformer", "rwkv7"])
def test_the_demos_generate(kind: str) -> None:
    lens = Lens.from_pretrained(trilens.demo_path(kind), dtype="float32")
    pieces: list[tuple[str, int]] = []
    found = lens.generate(
        "def read(path", max_new_tokens=20, capture=everything(lens),
        stream=lambda text, token: pieces.append((text, token)),
    )  # fmt: skip
    assert "".join(text for text, _ in pieces) == found.text
    assert [token for _, token in pieces] == found.token_ids.tolist()
    whole = lens.tokenizer.decode([*found.capture.token_ids.tolist()], skip_special_tokens=True)
    assert whole.endswith(found.text)
    assert_same(found.capture, lens.capture(found.capture.token_ids, **everything(lens)))


ALL_SITES = ("llama", "gpt2", "gemma3_text", "mixtral", "falcon_h1", "qwen3_next", "rwkv")


@pytest.mark.parametrize("model_type", ALL_SITES)
def test_every_site_in_steps(model_type: str) -> None:
    lens, ids = opened(model_type), prompt_ids("llama", 12)
    options = {"residual": None, "sites": list(lens.site_layers)}
    found = lens.generate(ids, max_new_tokens=6, capture=options).capture
    whole = lens.capture(found.token_ids, **options)
    assert len(whole.sites) >= 20
    for key in whole.sites:
        ours, theirs = (torch.as_tensor(each.sites[key]) for each in (found, whole))
        hidden = torch.isinf(theirs)
        assert torch.equal(torch.isinf(ours), hidden), key
        assert_near(ours.masked_fill(hidden, 0), theirs.masked_fill(hidden, 0), 1e-4)


def edits_of(lens: Lens) -> list[Edit]:
    vector = torch.randn(lens.d_model, generator=torch.Generator().manual_seed(0))
    found: list[Edit] = [
        Steer("resid_post", layers=1, vector=vector, positions=slice(12, None)),
        Scale("resid_pre", layers=2, factor=0.5, positions=slice(3, 15)),
    ]
    if lens.attention_layers:
        layer = lens.attention_layers[-1]
        new, old = slice(12, None), slice(0, 12)
        found += [
            Knockout(layers=layer, queries=new, keys=11, heads=[0]),
            Ablate("attn.z", layers=layer, heads=1),
            Scale("attn.pattern", layers=layer, factor=0.5, positions=new),
            Scale("attn.pattern", layers=layer, factor=0.5, positions=old),
            Scale("attn.scores", layers=layer, factor=0.5),
            Scale("attn.k_rot", layers=layer, factor=0.5),
            Scale("attn.v", layers=layer, factor=0.5, positions=slice(5, 15)),
        ]
    if lens.state_layers:
        found.append(Knockout(layers=lens.state_layers[0], keys=[3, 13]))
    return found


EDITED = ("llama", "gemma3_text", "whole_eager", "gpt_oss", "qwen3_next", "mamba", "rwkv")


@pytest.mark.parametrize("model_type", EDITED)
def test_edits_act_in_steps_as_on_the_whole_text(model_type: str) -> None:
    lens, ids = opened(model_type), prompt_ids("llama", 12)
    options = {"residual": "all", "attention": bool(lens.attention_layers)}
    plain = lens.generate(ids, max_new_tokens=6, capture=options).capture.logits
    for edit in edits_of(lens):
        found = lens.generate(ids, max_new_tokens=6, edits=edit, capture=options)
        assert_same(found.capture, lens.capture(found.capture.token_ids, edits=edit, **options))
        assert not torch.equal(found.capture.logits, plain)
        alone = lens.generate(ids, max_new_tokens=6, edits=edit)
        assert torch.equal(alone.token_ids, found.token_ids)


def test_words_for_positions_count_the_prompt() -> None:
    lens, ids = opened("llama"), prompt_ids("llama", 12)
    for word, places in (
        ("prompt", slice(0, 12)), ("last", 11), ("generated", slice(12, None)), (None, None),
    ):  # fmt: skip
        one, other = (
            Scale("resid_post", layers=1, factor=3.0, positions=each) for each in (word, places)
        )
        found = lens.generate(ids, max_new_tokens=6, edits=one, capture={}).capture
        assert_near(found.logits, lens.capture(found.token_ids, edits=other).logits, 1e-4)


def test_an_edit_of_tokens_that_never_come_is_an_error() -> None:
    lens, ids = opened("llama"), prompt_ids("llama", 12)
    first = int(lens.generate(ids, max_new_tokens=1).token_ids[0])
    late = Scale("resid_post", layers=1, factor=2.0, positions=15)
    with pytest.raises(UntouchedEditError):
        lens.generate(ids, max_new_tokens=8, edits=late, stop=first)
    with pytest.raises(EditError):
        lens.generate(ids, max_new_tokens=2, edits=late)


def test_a_failing_callback_leaves_the_model_as_it_was() -> None:
    model, ids = build("llama"), prompt_ids("llama", 8)
    lens, config = Lens(model.train()), model.generation_config

    def fail(_text: str, _token: int) -> None:
        raise RuntimeError("the reader went away")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="went away"):
        lens.generate(ids, capture={"attention": True}, stream=fail, temperature=1.0)
    assert model.generation_config is config
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(lens.generate(ids, max_new_tokens=3).token_ids) == 3


def test_a_prompt_of_one_token() -> None:
    lens = opened("gemma3_text")
    found = lens.generate([11], max_new_tokens=20, capture=everything(lens))
    assert_same(found.capture, lens.capture(found.capture.token_ids, **everything(lens)))


@pytest.mark.parametrize("logits", ["all", "last", None])
@pytest.mark.parametrize("model_type", ["gemma4_text", "mamba"])
def test_what_is_captured_is_what_is_asked(model_type: str, logits: str | None) -> None:
    lens, ids = opened(model_type), prompt_ids("llama", 8)
    options = {"layers": [1], "logits": logits}
    found = lens.generate(ids, max_new_tokens=5, capture=options)
    whole = lens.capture(found.capture.token_ids, **options)
    assert list(found.capture.residual) == [1]
    assert_near(found.capture.residual[1], whole.residual[1], 1e-4)
    if logits is None:
        assert found.capture.logits is None
    else:
        assert_near(found.capture.logits, whole.logits, 1e-4)


def test_sampling_repeats_and_leaves_the_random_state() -> None:
    lens, ids = opened("llama"), prompt_ids("llama", 8)
    before = torch.get_rng_state()
    drawn = [
        lens.generate(ids, max_new_tokens=12, temperature=2.0, seed=seed).token_ids.tolist()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = lens.generate(ids, max_new_tokens=12).token_ids.tolist()
    assert (
        lens.generate(ids, max_new_tokens=12, temperature=2.0, top_k=1).token_ids.tolist() == greedy
    )
    low = lens.generate(ids, max_new_tokens=12, temperature=1.0, top_p=1e-6)
    assert low.token_ids.tolist() == greedy


def test_the_models_generation_config_changes_nothing() -> None:
    model, ids = build("llama"), prompt_ids("llama", 8)
    wanted = Lens(model).generate(ids, max_new_tokens=12).token_ids
    odd = GenerationConfig(
        repetition_penalty=5.0, do_sample=True, top_k=3, temperature=9.0, min_new_tokens=3,
        forced_eos_token_id=7, suppress_tokens=wanted.tolist(), num_beams=2,
        cache_implementation="static", max_length=9,
    )  # fmt: skip
    model.generation_config = odd
    held = odd.to_dict()
    assert torch.equal(Lens(model).generate(ids, max_new_tokens=12).token_ids, wanted)
    assert model.generation_config is odd
    assert odd.to_dict() == held


def test_stops() -> None:
    lens = Lens.from_pretrained(trilens.demo_path("transformer"))
    free = lens.generate("import os", max_new_tokens=30)
    assert free.stopped_by == "length"
    assert len(free.token_ids) == 30
    third = int(free.token_ids[2])
    first = free.token_ids.tolist().index(third)
    stopped = lens.generate("import os", max_new_tokens=30, stop=third, capture={})
    assert stopped.stopped_by == third
    assert stopped.token_ids.tolist() == free.token_ids[: first + 1].tolist()
    assert len(stopped.capture.tokens) == stopped.prompt_tokens + first + 1
    word = free.text[4:9]
    found = lens.generate("import os", max_new_tokens=30, stop=["never there", word])
    assert found.stopped_by == word
    assert word in found.text
    assert free.text.startswith(found.text)
    lens.model.generation_config.eos_token_id = third
    ended = lens.generate("import os", max_new_tokens=30)
    assert ended.stopped_by == "end"
    assert ended.token_ids.tolist() == stopped.token_ids.tolist()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_new_tokens": 0}, ValueRangeError),
        ({"max_new_tokens": 2.5}, ValueRangeError),
        ({"temperature": -1.0}, ValueRangeError),
        ({"temperature": float("nan")}, ValueRangeError),
        ({"temperature": "hot"}, ValueRangeError),
        ({"temperature": 1.0, "top_k": 0}, ValueRangeError),
        ({"temperature": 1.0, "top_p": 0.0}, ValueRangeError),
        ({"temperature": 1.0, "top_p": 1.5}, ValueRangeError),
        ({"top_k": 5}, UsageError),
        ({"top_p": 0.5}, UsageError),
        ({"seed": -1}, ValueRangeError),
        ({"stop": [""]}, UsageError),
        ({"stop": 10**6}, ValueRangeError),
        ({"stop": [1.5]}, OutOfRangeError),
        ({"stop": ["text"]}, NoTokenizerError),
        ({"capture": {"residuals": "all"}}, UsageError),
        ({"capture": "all"}, UsageError),
        ({"capture": {"residual": "first"}}, UsageError),
        ({"capture": {"layers": [99]}}, OutOfRangeError),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Lens(build("llama")).generate([11, 12, 13], **options)


@pytest.mark.parametrize("model_type", REFUSED)
def test_steps_that_differ_are_refused(model_type: str) -> None:
    lens = Lens(build(model_type))
    for _ in range(2):
        with pytest.raises(GenerationError, match=r"does not generate|do not give"):
            lens.generate(prompt_ids(model_type, 12), max_new_tokens=4)


def test_an_encoder_and_too_long_a_text_are_refused_before_the_run() -> None:
    lens = Lens(build("llama").model)
    with pytest.raises(GenerationError, match="no causal language model"):
        lens.generate([11, 12], max_new_tokens=2)
    model = build("gpt2")
    lens, most = Lens(model), model.config.n_positions
    with pytest.raises(GenerationError, match="at most 3"):
        lens.generate([11] * (most - 3), max_new_tokens=4)
    found = lens.generate([11] * (most - 3), max_new_tokens=3, capture={})
    assert len(found.capture.tokens) == most
    with pytest.raises(PromptError):
        lens.generate([11] * (most + 1), max_new_tokens=1)


def test_messages_are_prompts() -> None:
    lens = Lens.from_pretrained(trilens.demo_path("transformer"))
    lens.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    found = lens.generate([{"role": "user", "content": "import os"}], max_new_tokens=3, capture={})
    ids = found.capture.token_ids.tolist()
    bos = lens.tokenizer.bos_token_id
    assert ids.count(bos) <= 1
    assert found.prompt_tokens == len(ids) - 3


def test_a_model_that_reads_more_ids_than_it_gives_generates() -> None:
    """Rows of an embedding that are padding have no score: the probe forces no such token."""
    model = build("inkling_text")
    model.config.unpadded_vocab_size = 90
    lens, ids = Lens(model), prompt_ids("inkling_text", 9) % 90
    found = lens.generate(ids, max_new_tokens=4)
    tokens = ids.reshape(1, -1)
    with torch.no_grad():
        plain = model.generate(tokens, max_new_tokens=4, do_sample=False)[0, tokens.shape[1] :]
    assert list(found.token_ids)[-4:] == plain.tolist()
