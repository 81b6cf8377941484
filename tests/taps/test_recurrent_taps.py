"""Knockouts in recurrent layers: the token's write is gone from the state, and nothing else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recurrent_cases import error_of_decays
from test_states import ALL, BOUNDARIES, cached, lens_of, off
from tinymodels import prompt_ids
from tolerances import assert_near
from trilens.edits import Knockout
from trilens.errors import EditError, UntouchedEditError
from trilens.lens.lens import Lens
from trilens.models.gates.kernels import KERNEL_GATES
from trilens.models.gates.recurrent_states import STATE_KINDS
from trilens.models.gates.writes import WRITES, without_writes
from trilens.taps.edits import Compiled, compile_edits
from trilens.taps.hooks import hooked
from trilens.taps.kernels import KERNELS, KernelWatcher, kernel_places
from trilens.taps.recurrent_taps import WRITING_KERNELS, RecurrentTaps
from trilens.taps.span import Span
from write_cases import REFERENCES

TOKENS = 21
CUT = (0, 3, 4, 16, 20)
# Recurrences in float32, of the largest value of the state: the bar of tests/test_states.py.
TOLERANCE = 1e-5
FAMILIES = (*ALL, "falcon_h1", "jamba", "qwen3_5_text", "bamba")
# One of each decoding kernel. The caches of the others want more than a next token, or do not fit
# the tiny model; an RG-LRU is decoded by hand below.
DECODED = ("mamba", "mamba2", "qwen3_next", "kimi_linear", "rwkv", "rwkv7", "zamba", "minimax",
           "falcon_h1", "jamba")  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Run:
    span: Span
    layer: int | None = None
    gradients: bool = False
    active: bool = True

    def mine(self) -> bool:
        return self.active

    def keep_site(self, key: Any, value: Tensor) -> None:
        raise AssertionError("nothing is recorded here")

    keep_pattern = keep_site


Calls = dict[int, list[tuple[str, Mapping[str, Any]]]]


@contextmanager
def knocked(lens: Lens, edits: Compiled, span: Span) -> Iterator[tuple[Run, Calls]]:
    """The knockouts in the model while the block runs; what recurrences would have been given."""
    run, calls, names = Run(span), Calls(), WRITING_KERNELS
    numbers = {id(block.module): i for i, block in enumerate(lens.anatomy.blocks)}
    boundaries = lens._runner.proof.gates.boundaries(lens.state_layers)
    taps = RecurrentTaps(run, edits)

    def note(name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        calls.setdefault(run.layer, []).append((name, dict(arguments)))
        return arguments

    def entered(layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        note(boundaries[layer].function, {**bound, "module": module})

    def gave(layer: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
        note(boundaries[layer].function, {"output": output, "module": boundaries[layer].module})

    def watcher(edit: Any) -> KernelWatcher:
        return KernelWatcher(lambda _name: None, lambda *_: None, edit)

    places = kernel_places(lens.model, names)
    with hooked(lens.model) as hooks:
        for block in lens.anatomy.blocks:
            hooks.before(block.module, lambda module, _: setattr(run, "layer", numbers[id(module)]))
        for layer, boundary in boundaries.items():
            if boundary.enter.event == "input":
                call = functools.partial(entered, layer)
                hooks.before(boundary.enter.module, call, with_kwargs=True)
            else:
                hooks.after(boundary.enter.module, functools.partial(gave, layer))
        taps.place(hooks)
        with KERNELS.watch(places, watcher(note)), KERNELS.watch(places, watcher(taps.edit)):
            yield run, calls


def compiled(lens: Lens, knockout: Knockout, tokens: int, new_tokens: int = 0) -> Compiled:
    proof = lens._runner.proof
    return compile_edits(
        knockout,
        proof.sites,
        model=lens._runner.info,
        prompts=(tokens,),
        new_tokens=new_tokens,
        attention=tuple(lens.anatomy.attention),
        recurrent=lens.state_layers,
        boundaries=proof.gates.boundaries(lens.state_layers),
    )


def prefill(tokens: int, prompt: int | None = None) -> Span:
    return Span(0, tokens, (tokens,), (tokens if prompt is None else prompt,))


def state_of(function: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The first part of a state as the model holds it, without the factor that it is divided by."""
    first = next(iter(parts.values())).double()
    if function == "rwkv_linear_attention":
        return first * parts["maximum"].double().exp()
    return first * parts["m"].double().exp()[:, None, None] if function == "mlstm" else first


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_state_in_the_models_own_cache_lacks_the_writes(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, TOKENS)
    cut = torch.zeros(1, TOKENS, dtype=torch.bool)
    cut[0, list(CUT)] = True
    edits = compiled(lens, Knockout(keys=CUT, layers=lens.state_layers), TOKENS)
    with knocked(lens, edits, prefill(TOKENS)) as (_, calls):
        held = cached(lens.model, ids)
    plain = cached(lens.model, ids)
    for layer in lens.state_layers:
        function = calls[layer][0][0]
        # A model that was run twice in the block (mLSTM's cache) was given the same twice.
        times = sum(each[0] == function for each in calls[layer])
        given = [arguments for _, arguments in calls[layer]][:times]
        wanted = [REFERENCES[function](arguments, cut)[0] for arguments in given]
        ours = state_of(function, held[layer])
        expected = torch.stack(wanted) if ours.dim() > wanted[0].dim() else wanted[0]
        assert off(ours, expected) <= TOLERANCE + error_of_decays(given[0])
        assert off(state_of(function, plain[layer]), expected) > 100 * TOLERANCE
    edits.check_touched()


@pytest.mark.parametrize("model_type", DECODED)
def test_decoding_with_a_knockout_is_the_whole_text_with_it(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, 12)
    knockout = Knockout(keys=[2, 9, 11], layers=lens.state_layers)
    edits = compiled(lens, knockout, 8, 4)
    with torch.no_grad():
        plain = lens.model(input_ids=ids, use_cache=False).logits
        with knocked(lens, edits, prefill(12, 8)):
            whole = lens.model(input_ids=ids, use_cache=False).logits
        with knocked(lens, edits, prefill(8)) as (run, _):
            output = lens.model(input_ids=ids[:, :8], use_cache=True)
            steps = [output.logits]
            for start in range(8, 12):
                names = ("past_key_values", "cache_params", "state")
                name = next(n for n in names if output.get(n) is not None)
                run.span = Span(start, 1, (1,), (8,))
                step = {"input_ids": ids[:, start : start + 1], name: output[name]}
                output = lens.model(**step, use_cache=True)
                steps.append(output.logits)
    joined = torch.cat([each[:, -1:] for each in steps], dim=1)
    assert_near(joined, whole[:, 7:], 1e-4)
    assert off(whole, plain) > 1e-3


@torch.no_grad()
def test_a_unit_that_carries_its_own_state_decodes_as_the_whole_text() -> None:
    lens = lens_of("recurrent_gemma")
    unit = next(m for name, m in lens.model.named_modules() if name.endswith(".rg_lru"))
    x = torch.randn(1, 12, unit.recurrent_param.numel(), generator=torch.Generator().manual_seed(1))
    places, cut = torch.arange(12)[None], torch.zeros(1, 12, dtype=torch.bool)
    cut[0, [2, 9, 11]] = True
    edits = compiled(lens, Knockout(keys=[2, 9, 11], layers=0), 8, 4)
    given = {"module": unit, "activations": x}
    with knocked(lens, edits, prefill(8)) as (run, _):
        run.layer, unit.recurrent_states = 0, None
        steps = [unit(x[:, :8], places[:, :8])]
        for start in range(8, 12):
            run.span = Span(start, 1, (1,), (8,))
            steps.append(unit(x[:, start : start + 1], places[:, start : start + 1]))
            done = slice(0, start + 1)
            part = {**given, "activations": x[:, done], "position_ids": places[:, done]}
            wanted = REFERENCES["rg_lru"](part, cut[:, done])
            assert_near(unit.recurrent_states, wanted, TOLERANCE)
            assert_near(steps[-1][:, 0], wanted, TOLERANCE)


@pytest.mark.parametrize("model_type", ("mamba", "rwkv7", *BOUNDARIES))
def test_a_pass_without_a_named_token_keeps_its_bits_and_nothing_stays(model_type: str) -> None:
    lens, ids = lens_of(model_type), prompt_ids(model_type, 6)
    places = kernel_places(lens.model, WRITING_KERNELS)
    before = [space[name] for space, name in places]
    edits = compiled(lens, Knockout(keys=[9], layers=lens.state_layers), 6, 8)
    with torch.no_grad():
        plain = lens.model(input_ids=ids, use_cache=False).logits
        with knocked(lens, edits, prefill(6)):
            inside = lens.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(plain, inside)
    with pytest.raises(UntouchedEditError, match="touched nothing at layers"):
        edits.check_touched()
    with pytest.raises(ZeroDivisionError), knocked(lens, edits, prefill(6)):
        raise ZeroDivisionError
    assert all(space[name] is old for (space, name), old in zip(places, before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lens.model.modules())


def test_a_row_of_a_padded_batch_is_as_alone() -> None:
    lens = lens_of("mamba2")
    ids = prompt_ids("mamba2", 9)
    edits = compile_edits(
        Knockout(keys=[2], layers=lens.state_layers),
        lens._runner.proof.sites,
        model=lens._runner.info,
        prompts=(9, 5),
        recurrent=lens.state_layers,
    )
    batch = torch.cat([ids, ids.clone()])
    mask = torch.ones_like(batch)
    mask[1, 5:] = 0
    with torch.no_grad(), knocked(lens, edits, Span(0, 9, (9, 5), (9, 5))):
        both = lens.model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    alone = compiled(lens, Knockout(keys=[2], layers=lens.state_layers), 5)
    with torch.no_grad(), knocked(lens, alone, prefill(5)):
        one = lens.model(input_ids=ids[:, :5], use_cache=False).logits
    assert_near(both[1, :5], one[0], 1e-5)


def test_every_state_has_a_known_write_and_others_are_refused() -> None:
    assert set(STATE_KINDS) - {"rg_lru"} <= set(WRITES)
    assert set(KERNEL_GATES) <= set(WRITING_KERNELS)
    with pytest.raises(EditError, match="the state of other is not known"):
        without_writes("other", {}, torch.zeros(1, 2, dtype=torch.bool))
    given = {"beta": torch.ones(1, 3, 2)}
    with pytest.raises(EditError, match="beta of 1 × 3 tokens in a pass of 1 × 2"):
        without_writes("torch_chunk_gated_delta_rule", given, torch.ones(1, 2, dtype=torch.bool))
