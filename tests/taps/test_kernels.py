"""The kernel tap: inner values of recurrences in prefill and decoding, always undone."""

from __future__ import annotations

import functools
import sys
import threading

import pytest
import torch

from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.errors import SilentSiteError
from trilens.lens.lens import Lens
from trilens.models.gates.kernels import DECODE_KERNELS, KERNEL_GATES
from trilens.taps.kernels import KERNELS, kernel_calls, kernel_places
from trilens.taps.recording import CaptureRequest
from trilens.taps.session import recording_of

NAMES = (*KERNEL_GATES, *DECODE_KERNELS.values())

# Type → its kernel function, and an argument with one value per token on the given axis.
CASES = {
    "mamba": ("mamba_selective_scan", "dt", 2),
    "mamba2": ("mamba2_chunk_scan", "dt", 1),
    "qwen3_next": ("torch_chunk_gated_delta_rule", "g", 1),
    "kimi_linear": ("chunk_kimi_delta_attention", "beta", 1),
}


def functions_of(model: torch.nn.Module) -> dict[tuple[int, str], object]:
    return {(id(space), name): space[name] for space, name in kernel_places(model, NAMES)}


@pytest.mark.parametrize("model_type", CASES)
def test_decoding_gives_the_values_of_prefill(model_type: str) -> None:
    kernel, argument, axis = CASES[model_type]
    model, ids = build(model_type), prompt_ids(model_type, 9)
    before = functions_of(model)
    assert before
    with torch.no_grad(), kernel_calls(model) as whole:
        model(input_ids=ids, use_cache=False)
    with torch.no_grad(), kernel_calls(model) as parts:
        first = model(input_ids=ids[:, :8], use_cache=True)
        cache = first.get("past_key_values", first.get("cache_params"))
        name = "past_key_values" if "past_key_values" in first else "cache_params"
        model(input_ids=ids[:, 8:], use_cache=True, **{name: cache})
    assert functions_of(model) == before
    prefill = [call for call in whole if call.function == kernel]
    steps = [call for call in parts if call.function == DECODE_KERNELS[kernel]]
    assert len(prefill) == len(steps) > 0
    for full, step in zip(prefill, steps, strict=True):
        last = full.arguments[argument].select(axis, -1)
        ours = step.arguments[argument].squeeze()
        if ours.dim() > last.squeeze().dim():
            ours = ours[..., 0]  # one value per head, repeated over its channels
        # The convolution before it sums in another order when it decodes.
        assert_near(ours, last.squeeze(), 1e-5, least=1.0)


def test_put_back_after_an_exception() -> None:
    model = build("mamba")
    before = functions_of(model)
    with pytest.raises(ZeroDivisionError), kernel_calls(model):
        assert functions_of(model) != before
        raise ZeroDivisionError
    assert functions_of(model) == before
    lens = Lens(model)
    lens.capture(prompt_ids("mamba", 5), gates=True)
    assert functions_of(model) == before


def test_nested_watchers_and_other_threads() -> None:
    model, ids = build("mamba"), prompt_ids("mamba", 5)
    before = functions_of(model)

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    with kernel_calls(model) as outer:
        with kernel_calls(model) as inner:
            run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert len(inner) == len(outer) == 4, "another thread's calls are not ours"
        run()
        assert len(outer) == 8
        assert len(inner) == 4
    assert functions_of(model) == before


def test_a_replacement_made_meanwhile_is_kept() -> None:
    model = build("mamba")
    [place] = [p for p in kernel_places(model, ["mamba_selective_scan"]) if p[0]]
    namespace, name = place
    original = namespace[name]
    other = functools.partial(original)
    try:
        with kernel_calls(model):
            namespace[name] = other
        assert namespace[name] is other
    finally:
        namespace[name] = original
    assert not KERNELS._overrides.active


def test_places_are_the_files_of_the_models_own_classes() -> None:
    places = kernel_places(build("jamba"), NAMES)
    files = {space["__name__"] for space, _ in places}
    assert files == {sys.modules[type(build("jamba")).__module__].__name__}
    assert not kernel_places(build("llama"), NAMES)


def test_a_session_gives_the_arguments_by_layer() -> None:
    model, ids = build("jamba"), prompt_ids("jamba", 6)
    lens = Lens(model)
    layers = lens.gate_layers["mixer.dt"]
    wanted = CaptureRequest(layers, None, (6,), (), {}, kernels=layers)
    with torch.no_grad(), recording_of(model, lens.anatomy, wanted) as recording:
        model(input_ids=ids, use_cache=False)
    with torch.no_grad(), kernel_calls(model) as calls:
        model(input_ids=ids, use_cache=False)
    assert tuple(recording.kernels) == layers
    for layer, plain in zip(layers, calls, strict=True):
        [ours] = recording.kernels[layer]
        assert ours.function == plain.function == "mamba_selective_scan"
        assert torch.equal(ours.arguments["B"], plain.arguments["B"])
        assert torch.equal(ours.result, plain.result)
    without = next(i for i in range(lens.n_layers) if i not in layers)
    missing = CaptureRequest((without,), None, (6,), (), {}, kernels=(without,))
    with (
        pytest.raises(SilentSiteError, match=f"recurrence of layer {without}"),
        torch.no_grad(),
        recording_of(model, lens.anatomy, missing),
    ):
        model(input_ids=ids, use_cache=False)
