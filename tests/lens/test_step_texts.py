"""The made-up texts that decoding steps are measured on, after what a caller gave as a probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from transformers import GPT2Config, GPT2LMHeadModel

from tinymodels import build, prompt_ids
from tinymodels.images import build_image_model, image_inputs
from trilens.lens.lens import Lens

pytestmark = pytest.mark.usefixtures("quiet")

PER_TOKEN: dict[str, Any] = {
    "position_ids": torch.arange(12),
    "position_ids from 5": torch.arange(5, 17)[None],
    "attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_probe_that_speaks_of_each_token_leaves_generation_as_it_is(name: str) -> None:
    probe = {"input_ids": prompt_ids("llama", 12), name.partition(" ")[0]: PER_TOKEN[name]}
    found = Lens(build("llama"), probe=probe).generate([5, 6, 7], max_new_tokens=4)
    plain = Lens(build("llama")).generate([5, 6, 7], max_new_tokens=4)
    assert found.token_ids.tolist() == plain.token_ids.tolist()


@pytest.mark.parametrize("given", ["three axes of positions", "as many tokens as a pixel's values"])
def test_a_probe_with_an_image_grows_in_its_tokens_alone(given: str) -> None:
    inputs = image_inputs("qwen2_5_vl")
    seq, probe = inputs["input_ids"].shape[1], dict(inputs)
    if given.startswith("three"):
        probe["position_ids"] = torch.arange(seq).expand(3, 1, -1)
    else:
        more = inputs["pixel_values"].shape[1] - seq
        probe["input_ids"] = pad(inputs["input_ids"], (0, more), value=7)
        probe["attention_mask"] = pad(inputs["attention_mask"], (0, more), value=1)
        probe["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, more))
    found = Lens(build_image_model("qwen2_5_vl"), probe=probe).generate(
        inputs=inputs, max_new_tokens=3
    )
    plain = Lens(build_image_model("qwen2_5_vl")).generate(inputs=inputs, max_new_tokens=3)
    assert found.token_ids.tolist() == plain.token_ids.tolist()


@pytest.mark.parametrize("tokens", [24, 63, 64])
def test_a_probe_that_leaves_little_room_does_not_hinder_and_is_measured_once(tokens: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                            bos_token_id=1, eos_token_id=2)  # fmt: skip
        model = GPT2LMHeadModel(config).eval()
    lens, ids = Lens(model, probe={"input_ids": prompt_ids("llama", tokens)}), prompt_ids("", 50)
    found = lens.generate(ids, max_new_tokens=3).token_ids
    assert found.tolist() == Lens(model).generate(ids, max_new_tokens=3).token_ids.tolist()
    passes: list[None] = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    lens.generate(ids, max_new_tokens=3)
    assert len(passes) == len(found)
