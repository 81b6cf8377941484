"""Recurrent states in captures: what transformers' own caches hold, on every known family."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recurrent_cases import error_of_decays, tamper
from test_effective import model_of
from tinymodels import prompt_ids
from trilens.errors import (
    CorruptFileError,
    NotStoredError,
    OutOfRangeError,
    RecurrentStateError,
    UsageError,
)
from trilens.io.tensors import read_tensors, write_tensors
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.gates.kernels import DECODE_KERNELS, KERNEL_GATES
from trilens.models.gates.recurrent_states import STATE_KINDS, states_of
from trilens.taps.kernels import kernel_calls, kernel_places

# Longer than a chunk of the tiny models' scans, and no multiple of one.
TOKENS = 37
LENGTHS = (9, 4, 13)
# The same recurrence over the same inputs, in float32 and in another order.
TOLERANCE = 1e-5
# A prompt alone and as the beginning of a longer one are not the same bits in a model: matrix
# products of other shapes round differently, and random layers magnify it (the residual stream
# itself is off by up to 1.5e-5).
PREFIX = 1e-4
PREFIX_DOUBLE = 1e-12

# Type → layers with a recurrent state, and the axes of its first part.
CHANNELS, MATRIX = ("inner", "state"), ("heads", "k", "v")
CHUNKED = ("heads", "head_dim", "state")
FAMILIES: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "mamba": ((0, 1, 2, 3), CHANNELS),
    "falcon_mamba": ((0, 1, 2, 3), CHANNELS),
    "jamba": ((0, 2, 3), CHANNELS),
    "zamba": ((0, 1, 2, 3, 4, 5), ("heads", *CHANNELS)),
    "mamba2": ((0, 1, 2, 3), CHUNKED),
    "bamba": ((0, 2), CHUNKED),
    "zamba2": ((0, 1, 2, 3, 4, 5), CHUNKED),
    "falcon_h1": ((0, 1, 2, 3), CHUNKED),
    "nemotron_h": ((0, 4), CHUNKED),
    "granitemoehybrid": ((0, 2), CHUNKED),
    "qwen3_next": ((0, 1, 2), MATRIX),
    "qwen3_5_text": ((0, 1, 2), MATRIX),
    "olmo_hybrid": ((0, 2), MATRIX),
    "kimi_linear": ((0, 2), MATRIX),
    "bailing_hybrid": ((0, 2), MATRIX),
    "rwkv7": ((0, 1, 2), MATRIX),
    "rwkv": ((0, 1, 2, 3), ("hidden",)),
    "recurrent_gemma": ((0, 1, 3, 4), ("width",)),
    "xlstm": ((0, 1, 2, 3), MATRIX),
    "minimax": ((1, 3), MATRIX),
}
# One of each kernel, and the one that calls its kernel once per head.
KERNELS = ("mamba", "mamba2", "qwen3_next", "kimi_linear", "rwkv", "rwkv7", "zamba")
# Recurrences that no kernel function carries.
BOUNDARIES = ("recurrent_gemma", "xlstm", "minimax")
ALL = KERNELS + BOUNDARIES
# Those whose kernels compute in float64 when the model does.
DOUBLE = ("mamba", "zamba", "rwkv", "rwkv7")

# The families' own deprecation warnings are not ours to answer for.
pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def lens_of(model_type: str) -> Lens:
    """One lens for all tests that only look."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Lens(model_of(model_type))


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def cached(model: torch.nn.Module, ids: Tensor) -> dict[int, dict[str, Tensor]]:
    """What the model itself hands to its decoding: layer → part → state of the one prompt."""
    backends = [m for name, m in model.named_modules() if name.endswith(".mlstm_backend")]
    if backends:
        # Its cache class is made for heads whose keys are as wide as their values: these are not.
        return _returned(model, ids, backends)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    if "state" in output:
        names = ("numerator", "denominator", "maximum")
        parts = dict(zip(names, output["state"][2:5], strict=True))
        n = parts["maximum"].shape[-1]
        return {i: {name: part[0, :, i] for name, part in parts.items()} for i in range(n)}
    cache = output.get("past_key_values", output.get("cache_params"))
    if cache is None:
        # This family keeps its state in the modules.
        units = [(name, m) for name, m in model.named_modules() if name.endswith(".rg_lru")]
        return {int(name.split(".")[2]): {"": m.recurrent_states[0]} for name, m in units}
    if hasattr(cache, "linear_cache"):
        held = enumerate(cache.linear_cache)
        return {i: {"": state[0]} for i, state in held if isinstance(state, Tensor)}
    found = {}
    for number, layer in enumerate(cache.layers):
        held: Any = getattr(layer, "recurrent", None)
        if held is None:
            held = getattr(layer, "recurrent_states", None)
        if isinstance(held, Mapping):
            held = held[0]
        if isinstance(held, Tensor):
            found[number] = {"": held[0]}
    return found


def _returned(
    model: torch.nn.Module, ids: Tensor, backends: list[torch.nn.Module]
) -> dict[int, dict[str, Tensor]]:
    """The last states that an mLSTM's own kernel returns beside its output."""
    found: dict[int, dict[str, Tensor]] = {}

    def keep(number: int, _module: Any, _args: Any, output: Any) -> None:
        c, n, m = output[1]
        found[number] = {"C": c[0], "n": n[0], "m": m[0].reshape(-1)}

    handles = [m.register_forward_hook(functools.partial(keep, i)) for i, m in enumerate(backends)]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def assert_same_states(ours: Capture, theirs: Capture, position: int, tolerance: float) -> None:
    """The last state of one capture is another's at a position."""
    assert ours.states.layers == theirs.states.layers
    for layer in ours.states.layers:
        for part in ours.states.spec(layer).parts:
            one = ours.states.get(layer, -1, part.name)
            assert off(one, theirs.states.get(layer, position, part.name)) <= tolerance


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_last_state_is_the_one_in_the_models_own_cache(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, TOKENS)
    model = lens.model
    layers, axes = FAMILIES[model_type]
    assert lens.state_layers == layers
    cap = lens.capture(ids, states=(0, 5, 20, -1))
    with torch.no_grad(), kernel_calls(model) as calls:
        plain = model(input_ids=ids, use_cache=False)
    decays = max((error_of_decays(call.arguments) for call in calls), default=0.0)
    assert torch.equal(cap.logits, plain.logits[0])
    assert cap.states.layers == layers
    assert cap.states.positions == (0, 5, 20, TOKENS - 1)
    theirs = cached(model, ids)
    assert set(layers) <= set(theirs)
    for layer in layers:
        spec = cap.states.spec(layer)
        assert spec.axes == axes
        for name, state in theirs[layer].items():
            ours = cap.states.get(layer, part=name or None)
            assert ours.dtype == torch.float32
            assert float(ours.abs().max()) > 0
            assert off(ours, state) <= TOLERANCE + decays
        assert tuple(cap.states.get(layer).shape) == spec.shape
    # What comes after a position is not in its state.
    for position in (0, 5, 20):
        before = lens.capture(ids[:, : position + 1], states=True)
        assert_same_states(before, cap, position, PREFIX)


@pytest.mark.parametrize("model_type", DOUBLE)
def test_a_state_is_the_last_one_of_the_prompt_that_ends_there(model_type: str) -> None:
    lens, ids = Lens(model_of(model_type).double()), prompt_ids(model_type, TOKENS)
    cap = lens.capture(ids, states=range(TOKENS))
    assert cap.states.positions == tuple(range(TOKENS))
    for position in (0, 1, 15, 16, 17, 36):
        before = lens.capture(ids[:, : position + 1], states=True)
        assert before.states.get(0).dtype == torch.float64
        assert_same_states(before, cap, position, PREFIX_DOUBLE)


@pytest.mark.parametrize("model_type", ALL)
def test_many_prompts_give_what_single_ones_give(model_type: str) -> None:
    lens = lens_of(model_type)
    prompts = [prompt_ids(model_type, n)[0] for n in LENGTHS]
    many = lens.capture_many(prompts, batch_size=3, states=iter((2, -1)))
    for prompt, batched in zip(prompts, many, strict=True):
        alone = lens.capture(prompt, states=(2, -1))
        assert batched.states.positions == alone.states.positions == (2, len(prompt) - 1)
        assert batched.states.seq == len(prompt)
        for position in (2, -1):
            for layer in lens.state_layers:
                ours, theirs = (
                    batched.states.get(layer, position),
                    alone.states.get(layer, position),
                )
                assert off(ours, theirs) <= PREFIX
        # A row keeps its own states alive, not the batch's.
        assert batched.states.nbytes == alone.states.nbytes


@pytest.mark.parametrize("model_type", ALL)
def test_saved_loaded_and_moved(model_type: str, tmp_path: Path) -> None:
    cap = lens_of(model_type).capture(
        prompt_ids(model_type, 9), states=(0, -1), residual=None, logits=None
    )
    assert cap.nbytes == cap.states.nbytes + cap.token_ids.nbytes
    assert "states" in repr(cap)
    again = Capture.load(cap.save(tmp_path / "capture.safetensors"))
    assert again.states.params() == cap.states.params()
    for layer, part, tensor in cap.states.tensors():
        for position in (0, -1):
            place = cap.states.positions.index(position % 9)
            assert torch.equal(again.states.get(layer, position, part), tensor[place])
    assert cap.to("meta").states.get(layer).device.type == "meta"


def test_a_file_that_lacks_a_state_is_damaged(tmp_path: Path) -> None:
    cap = lens_of("mamba2").capture(prompt_ids("mamba2", 9), states=True)
    path = cap.save(tmp_path / "capture.safetensors")
    tensors, manifest = read_tensors(path, "trilens.capture", 1)
    write_tensors(path, {k: v for k, v in tensors.items() if k != "states.1.S"}, manifest)
    with pytest.raises(CorruptFileError, match="not a whole capture"):
        Capture.load(path)
    # A capture from before there were states.
    rest = {k: v for k, v in tensors.items() if not k.startswith("states.")}
    write_tensors(path, rest, {k: v for k, v in manifest.items() if k != "states"})
    assert not Capture.load(path).has("states")


def test_no_states_unless_asked() -> None:
    lens, ids = lens_of("mamba2"), prompt_ids("mamba2", 9)
    assert not lens.capture(ids).has("states")
    assert not lens.capture(ids, states=False).has("states")


def test_layers_without_a_state_say_so() -> None:
    lens, ids = Lens(model_of("jamba")), prompt_ids("jamba", 9)
    cap = lens.capture(ids, states=True)
    with pytest.raises(
        NotStoredError, match=r"layer 1 is not stored \(the layer is not recurrent\)"
    ):
        cap.states.get(1)
    some = lens.capture(ids, states=True, layers=[1, 2])
    assert some.states.layers == (2,)
    with pytest.raises(NotStoredError, match=r"layer 0 is not stored .* not among those captured"):
        some.states.get(0)
    with pytest.raises(RecurrentStateError, match=r"no layer asked .* layers 0, 2, 3"):
        lens.capture(ids, states=True, layers=[1, 4])


def test_a_model_without_recurrence_says_so() -> None:
    lens = Lens(model_of("llama"))
    assert lens.state_layers == ()
    with pytest.raises(
        RecurrentStateError, match="no layer asked of LlamaForCausalLM is recurrent"
    ):
        lens.capture(prompt_ids("llama", 9), states=True)


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ((9,), OutOfRangeError, "position 9 is out of range: a prompt of 9 tokens has positions"),
        ((0, -10), OutOfRangeError, "positions −9–8"),
        ((), UsageError, "states is empty"),
        (5, UsageError, "states 5 is not an option"),
        ("all", OutOfRangeError, "position 'a' is not an integer"),
        ((True,), OutOfRangeError, "position True is not an integer"),
        ((0.0,), OutOfRangeError, "position 0.0 is not an integer"),
    ],
)
def test_positions_that_are_none(states, error, message) -> None:
    lens, ids = lens_of("mamba2"), prompt_ids("mamba2", 9)
    with pytest.raises(error, match=message):
        lens.capture(ids, states=states)


def test_a_position_that_a_short_prompt_lacks() -> None:
    lens = lens_of("mamba2")
    prompts = [prompt_ids("mamba2", n)[0] for n in LENGTHS]
    with pytest.raises(OutOfRangeError, match="a prompt of 4 tokens has positions −4–3"):
        list(lens.capture_many(prompts, states=(5,)))


@pytest.mark.parametrize("model_type", ALL)
def test_states_beside_everything_else(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, 9)
    effective = bool(lens.effective_layers)
    alone = lens.capture(ids, states=True)
    both = lens.capture(ids, states=True, gates=True, effective=effective, residual="all")
    assert_same_states(both, alone, -1, 0.0)
    for name, layers in lens.gate_layers.items():
        for layer in layers:
            assert both.gates.get(name, layer).shape[0] in (1, 9)


# transformers' own mLSTM does not run in half precision on a CPU.
@pytest.mark.parametrize("model_type", [name for name in ALL if name != "xlstm"])
def test_half_precision(model_type: str) -> None:
    ids = prompt_ids(model_type, TOKENS)
    cap = Lens(model_of(model_type).to(torch.bfloat16)).capture(ids, states=True)
    for layer in cap.states.layers:
        state = cap.states.get(layer)
        assert state.dtype == torch.float32
        assert torch.isfinite(state).all()


@pytest.mark.parametrize("model_type", KERNELS)
def test_a_kernel_that_computes_something_else_is_not_claimed(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, 9)
    tamper(monkeypatch, lens.model, STATE_KINDS)
    names = (*KERNEL_GATES, *DECODE_KERNELS.values())
    before = {(id(space), name): space[name] for space, name in kernel_places(lens.model, names)}
    with pytest.raises(RecurrentStateError, match=r"layer 0: .* is not proven: what is read of it"):
        lens.capture(ids, states=True)
    # Nothing stays behind, also after an exception.
    after = {(id(space), name): space[name] for space, name in kernel_places(lens.model, names)}
    assert after == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lens.model.modules())
    monkeypatch.undo()
    assert lens.capture(ids, states=True).states.layers == lens.state_layers


@pytest.mark.parametrize("model_type", BOUNDARIES)
def test_a_recurrence_that_computes_something_else_is_not_claimed(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, 9)

    def other(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] * 1.001, *output[1:]) if isinstance(output, tuple) else output * 1.001

    handles = []
    for name, module in lens.model.named_modules():
        if name.endswith((".rg_lru", ".mlstm_backend")):
            handles.append(module.register_forward_hook(other))
        elif hasattr(module, "slope_rate"):
            scaled = lambda _module, args: (args[0] * 1.001,)  # noqa: E731
            handles.append(module.norm.register_forward_pre_hook(scaled))
    assert len(handles) == len(lens.state_layers)
    with pytest.raises(RecurrentStateError, match=r"is not proven: what is read of it"):
        lens.capture(ids, states=True)
    for handle in handles:
        handle.remove()
    # Nothing else stays behind, also after an exception.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lens.model.modules())
    assert lens.capture(ids, states=True).states.layers == lens.state_layers


def test_a_state_from_before_and_an_unknown_kernel_are_refused() -> None:
    model, ids = model_of("mamba2"), prompt_ids("mamba2", 9)
    with torch.no_grad(), kernel_calls(model) as calls:
        model(input_ids=ids, use_cache=False)
    call = next(call for call in calls if call.function in STATE_KINDS)
    where = {"positions": [[8]], "lengths": [9]}
    given = {**call.arguments, "initial_states": torch.ones(1, 2, 3)}
    with pytest.raises(RecurrentStateError, match="initial_states that is not empty"):
        states_of(call.function, given, call.result, **where)
    with pytest.raises(RecurrentStateError, match="state of other is not known"):
        states_of("other", call.arguments, call.result, **where)
