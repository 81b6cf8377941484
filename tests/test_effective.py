"""Effective attention of recurrent layers: W·v is what the kernel gave, on every known family."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rwkv7_cases
from recurrent_cases import tamper
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.caches.patterns.channel.heads import ChannelHeadsPattern
from trilens.caches.patterns.channel.pattern import ChannelPattern, DecayedSoftmaxPattern
from trilens.caches.patterns.protocol import Pattern
from trilens.errors import AttentionPathError, CaptureError, NotStoredError, UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.gates.effective import EFFECTIVE_KERNELS, effective_of
from trilens.models.gates.kernels import KernelRecord
from trilens.taps.kernels import kernel_calls

# Longer than a chunk of the tiny models' scans, and no multiple of one.
TOKENS = 37
LENGTHS = (9, 4, 13)
# Float32 sums over 37 tokens in another order; the contract's own bound.
TOLERANCE = 1e-5
MANY = 2e-5  # other batch shapes reorder float32 sums, through all layers below

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
# Recurrences that no kernel function carries.
BOUNDED = {
    "recurrent_gemma": (0, 1, 3, 4),
    "xlstm": (0, 1, 2, 3),
    "minimax": (1, 3),
}
# One of each kernel.
KERNELS = ("mamba", "mamba2", "qwen3_next", "kimi_linear", "rwkv", "rwkv7")
EVERY_KIND = (*KERNELS, *BOUNDED, "zamba")
SIGNED = tuple(name for name in EVERY_KIND if name != "rwkv")

# The families' own deprecation warnings are not ours to answer for.
pytestmark = pytest.mark.filterwarnings("ignore")


model_of = functools.partial(rwkv7_cases.model_of, noise=0.3, own=0.0)


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


def seen_by_hooks(model: torch.nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """v and y of each recurrence without a kernel function, [units, seq, d], in order."""
    found: list[tuple[Tensor, Tensor]] = []
    inputs: list[Tensor] = []

    def rg_lru(_m: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0] if args else kwargs["activations"]
        found.append((x[0].T[..., None].double(), out[0].T[..., None].double()))

    def mlstm(_m: Any, _args: Any, kwargs: Any, out: Any) -> None:
        found.append((kwargs["value"][0].double(), out[0][0].double()))

    def activated(_m: Any, _args: Any, _kwargs: Any, out: Tensor) -> None:
        inputs.append(out)

    def normed(module: Any, args: Any, _kwargs: Any, _out: Any) -> None:
        heads, y = len(module.owner.slope_rate), args[0][0]
        both = inputs[-1][0].reshape(len(y), heads, -1).chunk(3, -1)[2]
        y = y.reshape(len(y), heads, -1)
        found.append((both.transpose(0, 1).double(), y.transpose(0, 1).double()))

    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".rg_lru"):
            hooks.append(module.register_forward_hook(rg_lru, with_kwargs=True))
        elif name.endswith(".mlstm_backend"):
            hooks.append(module.register_forward_hook(mlstm, with_kwargs=True))
        elif hasattr(module, "slope_rate"):
            object.__setattr__(module.norm, "owner", module)
            hooks.append(module.act_fn.register_forward_hook(activated, with_kwargs=True))
            hooks.append(module.norm.register_forward_hook(normed, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())


def captured(model: nn.Module, ids: Tensor, layers: tuple[int, ...]) -> Capture:
    lens = Lens(model)
    assert lens.effective_layers == layers
    cap = lens.capture(ids, effective=True)
    assert cap.effective.layers == cap.attention.layers == layers
    return cap


def dense_weights(pattern: Pattern, *, per_channel: bool) -> Tensor:
    dense = pattern.dense()[0].double()
    if not per_channel:
        return dense
    channels = torch.cat([each.dense()[0] for each in channel_patterns(pattern)]).double()
    assert relative(dense[0], channels.mean(0)) <= TOLERANCE
    return channels


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_times_values_are_the_kernels_output(model_type: str) -> None:
    model, ids = model_of(model_type), prompt_ids(model_type, TOKENS)
    cap = captured(model, ids, FAMILIES[model_type])
    with torch.no_grad(), kernel_calls(model) as calls:
        plain = model(input_ids=ids, use_cache=False)
    assert torch.equal(cap.logits, plain.logits[0])
    for layer, call in zip(FAMILIES[model_type], known_calls(calls), strict=True):
        result = call.result[0] if isinstance(call.result, tuple) else call.result
        v, y, skip, gate = kernel_sides(call.arguments, result)
        pattern = cap.attention.pattern(layer)
        mixed = dense_weights(pattern, per_channel=pattern.heads != len(v)) @ v
        assert relative((mixed + skip) * gate, y) <= TOLERANCE
        # The skip and the gate must not hide the weights: their share is proven to 1e-3.
        assert float(mixed.abs().max()) >= 0.01 * float(y.abs().max())


@pytest.mark.parametrize("model_type", BOUNDED)
def test_weights_times_values_are_what_the_recurrence_gave(model_type: str) -> None:
    model, ids = build(model_type), prompt_ids(model_type, TOKENS)
    cap = captured(model, ids, BOUNDED[model_type])
    with torch.no_grad():
        assert torch.equal(cap.logits, model(input_ids=ids, use_cache=False).logits[0])
    found = seen_by_hooks(model, ids)
    for layer, (v, y) in zip(BOUNDED[model_type], found, strict=True):
        pattern = cap.effective.pattern(layer)
        dense = dense_weights(pattern, per_channel=isinstance(pattern, ChannelPattern))
        assert relative(dense @ v, y) <= TOLERANCE


def test_one_kernel_call_per_head() -> None:
    model, ids = build("zamba"), prompt_ids("zamba", TOKENS)
    cap = Lens(model).capture(ids, effective=True)
    assert cap.effective.layers == (0, 1, 2, 3, 4, 5)
    with torch.no_grad(), kernel_calls(model) as calls:
        model(input_ids=ids, use_cache=False)
    scans = iter(known_calls(calls))
    for layer in cap.effective.layers:
        pattern = cap.effective.pattern(layer)
        assert isinstance(pattern, ChannelHeadsPattern)
        assert pattern.heads == 2
        for head, part in enumerate(pattern.parts):
            call = next(scans)
            v, y, skip, gate = kernel_sides(call.arguments, call.result)
            channels = torch.cat([each.dense()[0] for each in channel_patterns(part)]).double()
            mixed = channels @ v
            assert relative((mixed + skip) * gate, y) <= TOLERANCE
            assert float(mixed.abs().max()) >= 0.01 * float(y.abs().max())
            dense = pattern.dense()[0, head]
            assert relative(dense, channels.mean(0)) <= TOLERANCE
            assert relative(pattern.rows([-1], head)[0, 0], dense[-1]) <= TOLERANCE
            columns = pattern.columns([2, 5], head)[0]
            assert relative(columns, dense[:, [2, 5]]) <= TOLERANCE
    assert next(scans, None) is None


@pytest.mark.parametrize("model_type", EVERY_KIND)
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
            assert relative(ours, theirs) <= MANY


# How many tokens are too few for a weight to be a sum that one term does not make small.
SHORT = 2
# A key divided by its own small norm is off by more than the sum that it was.
NORMALISED = 1e-4


def size_of_terms(pattern: Pattern) -> float:
    """The largest Σ|q||k| of a pattern: what the rounding of a weight is relative to.

    A weight is a product q·k that may cancel. Among a row's many weights the largest has not
    cancelled; of one or two tokens all may have.
    """
    parts = {
        name: part.abs() if name.rpartition(".")[2] in {"q", "k"} else part
        for name, part in pattern.tensors().items()
    }
    return float(type(pattern).rebuild(parts, pattern.params()).dense().abs().max())


@pytest.mark.parametrize("model_type", [*FAMILIES, *BOUNDED, "zamba"])
def test_prompts_of_one_and_two_tokens_in_a_batch(model_type: str) -> None:
    """What differs is the model's own float32 sums, never the way from tensors to weights."""
    lens = Lens(model_of(model_type))
    prompts = [prompt_ids(model_type, n)[0] for n in (1, SHORT, 9)]
    many = lens.capture_many(prompts, batch_size=3, effective=True)
    for prompt, batched in zip(prompts, many, strict=True):
        alone = lens.capture(prompt, effective=True)
        for layer in lens.effective_layers:
            ours, theirs = batched.attention.pattern(layer), alone.attention.pattern(layer)
            assert ours.params() == theirs.params()
            for name, part in theirs.tensors().items():
                pair = ours.tensors()[name], part
                if name.rpartition(".")[2] in {"log_w", "step"}:  # −∞ forgets, e^log_w is used
                    pair = torch.exp(-pair[0].abs()), torch.exp(-pair[1].abs())
                assert_near(*pair, NORMALISED)
            gap = (ours.dense() - theirs.dense()).abs().max()
            scale = size_of_terms(theirs) if len(prompt) <= SHORT else theirs.dense().abs().max()
            assert float(gap) <= NORMALISED * float(scale)
            # From the same tensors come the same weights, whatever batch they are of.
            again = type(ours).rebuild(theirs.tensors(), theirs.params())
            assert torch.equal(again.dense(), theirs.dense())


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    cap = Lens(model_of(model_type)).capture(prompt_ids(model_type, 9), effective=True)
    again = Capture.load(cap.save(tmp_path / "capture.safetensors"))
    for layer in cap.attention.layers:
        parts = again.attention.pattern(layer).tensors()
        for name, part in cap.attention.pattern(layer).tensors().items():
            assert torch.equal(parts[name], part)
        # The same parts are contiguous now, and may be added up otherwise.
        ours, theirs = again.attention.get_layer(layer), cap.attention.get_layer(layer)
        assert relative(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("model_type", SIGNED)
def test_statistics_need_the_unsigned_view(model_type: str) -> None:
    cap = Lens(model_of(model_type)).capture(prompt_ids(model_type, 9), effective=True)
    first = cap.attention.layers[0]
    for question in ("entropy", "mean_distance", "received", "sink_mass"):
        with pytest.raises(UsageError, match=r"relu_l1\(\)"):
            getattr(cap.attention, question)(first)
    dense = cap.attention.get_layer(first)
    row = torch.from_numpy(cap.attention.attention_from_position(first, -1))
    assert relative(row, dense[0, :, -1].mean(0)) <= TOLERANCE
    view = cap.attention.relu_l1()
    entropy = view.entropy(first)
    assert entropy.shape == dense.shape[1:3]
    assert np.isfinite(entropy).all()
    positive = dense[0].double().relu()
    mass = positive.sum(-1, keepdim=True).clamp(min=1e-300)
    rows = positive / mass
    gap = np.abs(entropy - torch.special.entr(rows).sum(-1).numpy())
    # Weights are as good as a row's largest, which its positive part may be a small share of.
    size = (dense[0].double().abs().amax(-1) / mass[..., 0]).clamp(min=1, max=1e9)
    assert (gap <= TOLERANCE * size.numpy()).all()


def test_a_softmax_per_channel_has_statistics_without_a_view() -> None:
    cap = Lens(build("rwkv")).capture(prompt_ids("rwkv", 9), effective=True)
    assert np.abs(cap.attention.get_layer(1).sum(-1) - 1).max() <= TOLERANCE
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


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_gates_of_the_same_kernel_stay_what_they_are(model_type: str) -> None:
    lens, ids = Lens(model_of(model_type)), prompt_ids(model_type, 9)
    both, alone = lens.capture(ids, gates=True, effective=True), lens.capture(ids, gates=True)
    assert both.attention.layers == lens.effective_layers
    assert not alone.has("attention")
    for name, layers in lens.gate_layers.items():
        for layer in layers:
            assert torch.equal(both.gates.get(name, layer), alone.gates.get(name, layer))


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_a_model_without_a_recurrence_is_refused_by_name(model_type: str) -> None:
    lens = Lens(build(model_type))
    assert lens.effective_layers == ()
    with pytest.raises(AttentionPathError, match=r"no layer asked of \w+ is recurrent"):
        lens.capture(prompt_ids(model_type, 9), effective=True)


def test_a_layer_without_a_pattern_says_why(tmp_path: Path) -> None:
    lens, ids = Lens(build("nemotron_h")), prompt_ids("nemotron_h", 9)
    recurrent, softmax = set(lens.effective_layers), set(lens.attention_layers)
    neither = set(range(lens.n_layers)) - recurrent - softmax
    assert recurrent and softmax and neither
    some = min(recurrent)
    captured = {
        "attention": (lens.capture(ids, attention=True), "attention", softmax),
        "effective": (lens.capture(ids, effective=True), "attention", recurrent),
        "effective alone": (
            lens.capture(ids, attention=True, effective=True),
            "effective",
            recurrent,
        ),
        "one": (lens.capture(ids, effective=True, layers=[some]), "attention", {some}),
    }
    words = {
        "attention": (recurrent, "recurrent, NemotronHMamba2Mixer: capture with effective=True"),
        "effective": (softmax, "its softmax attention was not asked for"),
        "effective alone": (softmax, "no recurrence: softmax attention"),
        "one": (recurrent - {some}, "layers= left it out"),
    }
    for name, (cap, kind, held) in captured.items():
        saved = Capture.load(cap.save(tmp_path / "capture.safetensors"))
        layers, why = words[name]
        for each in (cap, saved, cap.to("cpu")):
            cache = getattr(each, kind)
            assert set(cache.layers) == held
            assert set(cache.reasons) == set(range(lens.n_layers)) - held
            assert all(why in cache.reasons[layer] for layer in layers)
            without = min(set(cache.reasons) & neither)
            with pytest.raises(NotStoredError, match=f"{min(held)}") as caught:
                cache.attention_from_position(without, -1)
            assert cache.reasons[without] in str(caught.value)
    with pytest.raises(AttentionPathError, match=r"have it: .*recurrent, NemotronHMamba2Mixer"):
        lens.capture(ids, attention=True, layers=[some])


class _NotLinear(torch.nn.Module):
    """A mixer with the child by which an sLSTM is known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slstm_cell = torch.nn.Linear(width, width)

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return torch.tanh(self.slstm_cell(x)), None


class _Again(torch.nn.Module):
    """A mixer that runs twice, the second time on what the first gave."""

    def __init__(self, mixer: torch.nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        first = self.mixer(*args, **kwargs)
        return self.mixer(first, *args[1:], **{**kwargs, **_replaced(kwargs, first)})


def _replaced(kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Tensor]:
    return {"hidden_states": x} if "hidden_states" in kwargs else {}


def test_recurrences_without_effective_attention_are_refused_by_name() -> None:
    model = build("xlstm")
    width = model.config.hidden_size
    model.backbone.blocks[1].mlstm_layer = _NotLinear(width)
    lens = Lens(model.eval())
    assert lens.effective_layers == (0, 2, 3)
    with pytest.raises(AttentionPathError, match=r"layer 1 of .*_NotLinear: .* is not linear"):
        lens.capture(prompt_ids("xlstm", 9), effective=True)
    some = lens.capture(prompt_ids("xlstm", 9), effective=True, layers=[0, 2])
    assert some.attention.layers == (0, 2)

    model = build("mamba2")
    model.backbone.layers[2].mixer = _Again(model.backbone.layers[2].mixer)
    lens = Lens(model.eval())
    assert lens.effective_layers == (0, 1, 3)
    with pytest.raises(AttentionPathError, match=r"calls mamba2_chunk_scan 2 times, and not as"):
        lens.capture(prompt_ids("mamba2", 9), effective=True)


@pytest.mark.parametrize("model_type", ["falcon_h1", "zamba2"])
def test_both_kinds_of_one_layer(model_type: str, tmp_path: Path) -> None:
    lens, ids = Lens(build(model_type)), prompt_ids(model_type, 9)
    twofold = set(lens.attention_layers) & set(lens.effective_layers)
    assert twofold
    both = lens.capture(ids, attention=True, effective=True)
    softmax, alone = lens.capture(ids, attention=True), lens.capture(ids, effective=True)
    assert not softmax.has("effective")
    saved = Capture.load(both.save(tmp_path / "capture.safetensors"))
    batch = [ids[0], ids[0, :5]]
    batched = next(iter(lens.capture_many(batch, attention=True, effective=True)))
    for cap in (both, saved, both.to("cpu"), batched):
        assert cap.effective.layers == alone.effective.layers == lens.effective_layers
        for layer in range(lens.n_layers):
            kind = softmax if layer in lens.attention_layers else alone
            ours, theirs = cap.attention.get_layer(layer), kind.attention.get_layer(layer)
            assert relative(ours, theirs) <= TOLERANCE
            assert cap.attention.pattern(layer).signed == (layer not in lens.attention_layers)
            if layer in lens.effective_layers:
                ours, theirs = cap.effective.get_layer(layer), alone.effective.get_layer(layer)
                assert relative(ours, theirs) <= TOLERANCE
                same = cap.attention.pattern(layer) is cap.effective.pattern(layer)
                assert same == (layer not in twofold)
    # What stands in both caches is held, written and counted once.
    assert alone.nbytes == lens.capture(ids).nbytes + alone.attention.nbytes


@pytest.mark.parametrize("model_type", KERNELS)
def test_a_kernel_that_computes_something_else_is_not_claimed(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = Lens(model_of(model_type))
    tamper(monkeypatch, lens.model, EFFECTIVE_KERNELS)
    ids = prompt_ids(model_type, 9)
    with pytest.raises(CaptureError, match=r"layer 0 is not proven: W·v differs from the output"):
        lens.capture(ids, effective=True)
    monkeypatch.undo()
    assert lens.capture(ids, effective=True).attention.layers == lens.effective_layers


@pytest.mark.parametrize("model_type", [name for name in EVERY_KIND if name != "xlstm"])
def test_half_precision(model_type: str) -> None:
    # xLSTM itself does not run in half precision on this device.
    model = model_of(model_type).to(torch.bfloat16)
    cap = Lens(model).capture(prompt_ids(model_type, TOKENS), effective=True)
    dense = cap.attention.get_layer(cap.attention.layers[0])
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
