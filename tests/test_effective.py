"""Effective attention of recurrent layers: W·v is what the kernel gave, on every known family."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinymodels import build, prompt_ids
from trilens.caches.channel_pattern import ChannelPattern, DecayedSoftmaxPattern
from trilens.caches.patterns import Pattern
from trilens.capture import Capture
from trilens.errors import AttentionPathError, CaptureError, UsageError
from trilens.lens import Lens
from trilens.models.gates.effective import EFFECTIVE_KERNELS, effective_of
from trilens.models.rwkv7 import RWKV7ForCausalLM
from trilens.models.rwkv7_config import RWKV7Config
from trilens.taps.kernels import KernelRecord, kernel_calls, kernel_places

# Longer than a chunk of the tiny models' scans, and no multiple of one.
TOKENS = 37
LENGTHS = (9, 4, 13)
# Float32 sums over 37 tokens in another order; the contract's own bound.
TOLERANCE = 1e-5

# Type → layers with an effective attention.
FAMILIES = {
    "mamba": (0, 1, 2, 3),
    "falcon_mamba": (0, 1, 2, 3),
    "jamba": (0, 2, 3),
    "mamba2": (0, 1, 2, 3),
    "bamba": (0, 2),
    "zamba2": (0, 1, 2, 3, 4, 5),
    "nemotron_h": (0, 4),
    "granitemoehybrid": (0, 2),
    "falcon_h1": (0, 1, 2, 3),
    "qwen3_next": (0, 1, 2),
    "qwen3_5_text": (0, 1, 2),
    "olmo_hybrid": (0, 2),
    "kimi_linear": (0, 2),
    "bailing_hybrid": (0, 2),
    "rwkv": (0, 1, 2, 3),
    "rwkv7": (0, 1, 2),
}
# One of each kernel.
KERNELS = ("mamba", "mamba2", "qwen3_next", "kimi_linear", "rwkv", "rwkv7")
SIGNED = tuple(name for name in KERNELS if name != "rwkv")


@pytest.fixture(autouse=True)
def quiet():
    """The families' own deprecation warnings are not ours to answer for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of(model_type: str) -> torch.nn.Module:
    if model_type != "rwkv7":
        return build(model_type)
    config = RWKV7Config(vocab_size=120, hidden_size=32, num_hidden_layers=3, head_size=8)
    model = RWKV7ForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Its initialisation has zero output projections, which would hide every mistake.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * 0 + 0.3 * noise)
    return model.eval()


def known_calls(calls: list[KernelRecord]) -> list[KernelRecord]:
    return [call for call in calls if call.function in EFFECTIVE_KERNELS]


def channel_patterns(pattern: Pattern) -> list[Pattern]:
    """The pattern of each channel alone, made of the tensors that a capture holds."""
    if isinstance(pattern, ChannelPattern):
        return [pattern.channels(c, c + 1) for c in range(pattern.n_channels)]
    parts = pattern.tensors()
    return [
        DecayedSoftmaxPattern(
            parts["k"][..., c : c + 1],
            log_w=parts["log_w"][c : c + 1],
            bonus=parts["bonus"][c : c + 1],
        )
        for c in range(parts["k"].shape[2])
    ]


def kernel_sides(args: Mapping[str, Any], output: Tensor) -> tuple[Tensor, ...]:
    """v, the kernel's output, its skip and gate, [units, seq, d], by the arguments' own names."""
    if "use_mambapy" in args:
        x, z = args["hidden_states"][0, ..., None].double(), args["z"]
        gate = torch.ones_like(x) if z is None else F.silu(z[0].double())[..., None]
        return x, output[0, ..., None].double(), args["D"].double()[:, None, None] * x, gate
    if "time_first" in args:
        v, y = args["value"][0].T[..., None].double(), output[0].T[..., None].double()
    else:
        name = next(n for n in ("hidden_states", "value", "v") if n in args)
        v, y = args[name][0].transpose(0, 1).double(), output[0].transpose(0, 1).double()
    skip = args["D"].double()[:, None, None] * v if "D" in args else torch.zeros_like(v)
    return v, y, skip, torch.ones_like(y)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_times_values_are_the_kernels_output(model_type: str) -> None:
    model, ids = model_of(model_type), prompt_ids(model_type, TOKENS)
    lens = Lens(model)
    assert lens.effective_layers == FAMILIES[model_type]
    cap = lens.capture(ids, effective=True)
    assert cap.attention is not None
    assert cap.attention.layers == FAMILIES[model_type]
    with torch.no_grad(), kernel_calls(model) as calls:
        plain = model(input_ids=ids, use_cache=False)
    assert torch.equal(cap.logits, plain.logits[0])
    for layer, call in zip(lens.effective_layers, known_calls(calls), strict=True):
        result = call.result[0] if isinstance(call.result, tuple) else call.result
        v, y, skip, gate = kernel_sides(call.arguments, result)
        pattern = cap.attention.pattern(layer)
        dense = pattern.dense()[0].double()
        if pattern.heads != len(v):
            channels = torch.cat([each.dense()[0] for each in channel_patterns(pattern)]).double()
            assert relative(dense[0], channels.mean(0)) <= TOLERANCE
            dense = channels
        mixed = dense @ v
        assert relative((mixed + skip) * gate, y) <= TOLERANCE
        # The skip and the gate must not hide the weights: their share is proven to 1e-3.
        assert float(mixed.abs().max()) >= 0.01 * float(y.abs().max())


@pytest.mark.parametrize("model_type", KERNELS)
def test_many_prompts_give_what_single_ones_give(model_type: str) -> None:
    lens = Lens(model_of(model_type))
    prompts = [prompt_ids(model_type, n)[0] for n in LENGTHS]
    many = lens.capture_many(prompts, batch_size=3, effective=True)
    for prompt, batched in zip(prompts, many, strict=True):
        alone = lens.capture(prompt, effective=True)
        assert batched.attention.layers == alone.attention.layers == lens.effective_layers
        for layer in lens.effective_layers:
            ours, theirs = batched.attention.get_layer(layer), alone.attention.get_layer(layer)
            assert ours.shape[-1] == len(prompt)
            assert relative(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("model_type", KERNELS)
def test_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    cap = Lens(model_of(model_type)).capture(prompt_ids(model_type, 9), effective=True)
    again = Capture.load(cap.save(tmp_path / "capture.safetensors"))
    for layer in cap.attention.layers:
        assert torch.equal(again.attention.get_layer(layer), cap.attention.get_layer(layer))


@pytest.mark.parametrize("model_type", SIGNED)
def test_statistics_need_the_unsigned_view(model_type: str) -> None:
    cap = Lens(model_of(model_type)).capture(prompt_ids(model_type, 9), effective=True)
    for question in ("entropy", "mean_distance", "received", "sink_mass"):
        with pytest.raises(UsageError, match=r"relu_l1\(\)"):
            getattr(cap.attention, question)(0)
    dense = cap.attention.get_layer(0)
    row = torch.from_numpy(cap.attention.attention_from_position(0, -1))
    assert relative(row, dense[0, :, -1].mean(0)) <= TOLERANCE
    view = cap.attention.relu_l1()
    entropy = view.entropy(0)
    assert entropy.shape == dense.shape[1:3]
    assert np.isfinite(entropy).all()
    positive = dense[0].double().relu()
    rows = positive / positive.sum(-1, keepdim=True).clamp(min=1e-300)
    assert np.abs(entropy - torch.special.entr(rows).sum(-1).numpy()).max() <= 1e-5


def test_a_softmax_per_channel_has_statistics_without_a_view() -> None:
    cap = Lens(build("rwkv")).capture(prompt_ids("rwkv", 9), effective=True)
    assert np.abs(cap.attention.get_layer(1).sum(-1) - 1).max() <= 1e-5
    assert cap.attention.entropy(1).shape == (1, 9)


@pytest.mark.parametrize("model_type", ["jamba", "bamba", "qwen3_next", "kimi_linear"])
def test_softmax_and_effective_layers_share_a_cache(model_type: str) -> None:
    lens, ids = Lens(build(model_type)), prompt_ids(model_type, 9)
    softmax = set(lens.attention_layers)
    assert softmax
    both = lens.capture(ids, attention=True, effective=True).attention
    assert both.layers == tuple(sorted(softmax | set(lens.effective_layers)))
    assert {i for i in both.layers if not both.pattern(i).signed} == softmax
    alone = lens.capture(ids, effective=True).attention
    assert alone.layers == lens.effective_layers
    one = lens.effective_layers[-1]
    assert lens.capture(ids, effective=True, layers=[one]).attention.layers == (one,)
    assert np.isfinite(both.relu_l1().received(one)).all()
    without = next(i for i in range(lens.n_layers) if i not in lens.effective_layers)
    with pytest.raises(AttentionPathError, match=r"no layer asked of .* is recurrent"):
        lens.capture(ids, effective=True, layers=[without])


@pytest.mark.parametrize("model_type", KERNELS)
def test_gates_of_the_same_kernel_stay_what_they_are(model_type: str) -> None:
    lens, ids = Lens(model_of(model_type)), prompt_ids(model_type, 9)
    both, alone = lens.capture(ids, gates=True, effective=True), lens.capture(ids, gates=True)
    assert both.attention.layers == lens.effective_layers
    assert alone.attention is None
    for name, layers in lens.gate_layers.items():
        for layer in layers:
            assert torch.equal(both.gates.get(name, layer), alone.gates.get(name, layer))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama", "no layer asked of LlamaForCausalLM is recurrent"),
        ("recurrent_gemma", "RecurrentGemmaRecurrentBlock calls no known kernel"),
        ("xlstm", "calls no known kernel"),
        ("zamba", "calls mamba_selective_scan 2 times"),
    ],
)
def test_refused_by_name(model_type: str, reason: str) -> None:
    lens = Lens(build(model_type))
    assert lens.effective_layers == ()
    with pytest.raises(AttentionPathError, match=reason):
        lens.capture(prompt_ids(model_type, 9), effective=True)


def test_one_pattern_per_layer() -> None:
    lens, ids = Lens(build("falcon_h1")), prompt_ids("falcon_h1", 9)
    with pytest.raises(AttentionPathError, match="softmax attention and a recurrence side by side"):
        lens.capture(ids, attention=True, effective=True)
    assert not lens.capture(ids, attention=True).attention.pattern(0).signed
    assert lens.capture(ids, effective=True).attention.pattern(0).signed


@pytest.mark.parametrize("model_type", KERNELS)
def test_a_kernel_that_computes_something_else_is_not_claimed(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = Lens(model_of(model_type))
    for namespace, name in kernel_places(lens.model, EFFECTIVE_KERNELS):
        original = namespace[name]

        @functools.wraps(original)
        def other(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            result = _original(*args, **kwargs)
            if isinstance(result, tuple):
                return (result[0] * 1.001, *result[1:])
            return result * 1.001

        monkeypatch.setitem(namespace, name, other)
    ids = prompt_ids(model_type, 9)
    with pytest.raises(CaptureError, match=r"layer 0 is not proven: W·v differs from the output"):
        lens.capture(ids, effective=True)
    monkeypatch.undo()
    assert lens.capture(ids, effective=True).attention.layers == lens.effective_layers


@pytest.mark.parametrize("model_type", KERNELS)
def test_half_precision(model_type: str) -> None:
    model = model_of(model_type).to(torch.bfloat16)
    cap = Lens(model).capture(prompt_ids(model_type, TOKENS), effective=True)
    dense = cap.attention.get_layer(0)
    assert dense.dtype == torch.float32
    assert torch.isfinite(dense).all()


def test_a_state_from_before_and_an_unknown_kernel_are_refused() -> None:
    model, ids = build("mamba2"), prompt_ids("mamba2", 9)
    with torch.no_grad(), kernel_calls(model) as calls:
        model(input_ids=ids, use_cache=False)
    call = known_calls(calls)[0]
    state = torch.ones(1, 2, 3)
    with pytest.raises(AttentionPathError, match="initial_states that is not empty"):
        effective_of(call.function, {**call.arguments, "initial_states": state}, call.result)
    with pytest.raises(AttentionPathError, match="kernel other has no known effective attention"):
        effective_of("other", call.arguments, call.result)
