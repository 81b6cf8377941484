"""The attention registry tap: right function, right modules, nothing left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_cases import llama_config
from tinymodels import build, prompt_ids
from trilens.lens.lens import Lens
from trilens.taps.registry import REGISTRY, attention_keys


def registry_state() -> dict:
    return dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(
        ALL_ATTENTION_FUNCTIONS._global_mapping
    )


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_capture_leaves_registry_and_hooks_as_they_were(implementation: str) -> None:
    model = build("llama")
    model.set_attn_implementation(implementation)
    before = registry_state()
    lens = Lens(model)
    assert registry_state() == before
    assert hook_count(model) == 0
    lens.capture(prompt_ids("llama"), attention=True, gates=True)
    assert registry_state() == before
    assert hook_count(model) == 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_undone_after_an_exception(implementation: str) -> None:
    model = build("llama")
    model.set_attn_implementation(implementation)
    lens = Lens(model)
    before = registry_state()
    model.train()

    def fail(_module: object, _args: object) -> None:
        raise RuntimeError("the model failed")

    handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the model failed"):
        lens.capture(prompt_ids("llama"), attention=True, gates=True)
    handle.remove()
    assert registry_state() == before
    assert hook_count(model) == 0
    assert model.training, "the mode is put back"
    assert all(module.training for module in model.modules())


def test_a_function_that_somebody_registered_is_put_back() -> None:
    def mine(module, query, key, value, attention_mask, **kwargs):
        raise AssertionError("never called here")

    ALL_ATTENTION_FUNCTIONS["sdpa_of_mine"] = mine
    try:
        model = build("llama")
        modules = attention_keys(model)
        module = next(iter(modules))
        with REGISTRY.watch({module: "sdpa_of_mine"}, lambda call: None):
            assert ALL_ATTENTION_FUNCTIONS["sdpa_of_mine"] is not mine
        assert ALL_ATTENTION_FUNCTIONS["sdpa_of_mine"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa_of_mine"]


def test_models_that_nobody_watches_pass_through_in_eager() -> None:
    """While a capture runs, another model's eager attention is its own file's function."""
    watched, other = build("llama"), build("gpt_oss")
    watched.set_attn_implementation("eager")
    ids = prompt_ids("gpt_oss")
    with torch.no_grad():
        plain = other(input_ids=ids, use_cache=False).logits
        calls = []
        with REGISTRY.watch(attention_keys(watched), calls.append):
            inside = other(input_ids=ids, use_cache=False).logits
    assert torch.equal(plain, inside)
    assert not calls


def test_two_threads_on_two_lenses() -> None:
    lenses = [Lens(build("llama", seed=s)) for s in (0, 1)]
    ids = prompt_ids("llama")
    expected = [lens.capture(ids, residual="all", attention=True, gates=True) for lens in lenses]
    before = registry_state()
    wrong: list[str] = []

    def work(lens: Lens, reference) -> None:
        for _ in range(15):
            cap = lens.capture(ids, residual="all", attention=True, gates=True)
            same = torch.equal(cap.logits, reference.logits)
            for layer in reference.residual.layers:
                ours, theirs = cap.residual.get_layer(layer), reference.residual.get_layer(layer)
                same &= torch.equal(ours, theirs)
                same &= torch.equal(
                    cap.attention.get_layer(layer), reference.attention.get_layer(layer)
                )
                same &= torch.equal(
                    cap.gates.pre("mlp.gate", layer), reference.gates.pre("mlp.gate", layer)
                )
            if not same:
                wrong.append("differs")

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(lenses, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert registry_state() == before


def test_one_lens_from_several_threads_takes_turns() -> None:
    lens = Lens(build("llama"))
    prompts = [prompt_ids("llama", seed=seed) for seed in range(4)]
    expected = [lens.capture(ids).logits for ids in prompts]
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = lens.capture(prompts[index], attention=True).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_a_plain_run_in_another_thread_is_not_recorded() -> None:
    """Two threads, one model: what the other thread runs must not land in the capture."""
    model = build("llama")
    lens = Lens(model)
    ids, others = prompt_ids("llama"), prompt_ids("llama", seed=3)
    reference = lens.capture(ids, residual="all").residual
    stop = threading.Event()

    def plain() -> None:
        with torch.no_grad():
            while not stop.is_set():
                model(input_ids=others, use_cache=False)

    thread = threading.Thread(target=plain)
    thread.start()
    try:
        for _ in range(10):
            residual = lens.capture(ids, residual="all", attention=True).residual
            for layer in reference.layers:
                assert torch.equal(residual.get_layer(layer), reference.get_layer(layer))
    finally:
        stop.set()
        thread.join()


def test_two_models_built_from_one_config_object() -> None:
    config = llama_config(32, 64, layers=2, heads=4, vocab=64, num_key_value_heads=2)
    torch.manual_seed(0)
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert first.config is second.config
    one, two = Lens(first), Lens(second)
    ids = torch.arange(10)
    with torch.no_grad():
        plain = [m(input_ids=ids[None], use_cache=False).logits[0] for m in (first, second)]
    assert torch.equal(one.capture(ids, attention=True).logits, plain[0])
    assert torch.equal(two.capture(ids, attention=True).logits, plain[1])
    assert not torch.equal(plain[0], plain[1])
