"""Attention of eager functions: the form that fits best wins, and no sink is lost to rounding."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tinymodels import build, prompt_ids
from tolerances import largest, sum_error
from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.errors import AttentionPathError
from trilens.lens.lens import Lens
from trilens.taps.attention import pattern_of
from trilens.taps.registry import REGISTRY, AttentionCall, attention_keys

OPENED = ("gpt_oss", "granite_swa", "granitemoe_swa", "flint", "mimo_v2_flash")
HALVES = (torch.bfloat16, torch.float16)
# Mean and spread of the sinks' logits: small, random, without share, and with nearly all of it.
DRAWS = {"small": (-6, 0.5), "random": (0, 1), "large": (5, 2), "below rounding": (-20, 1)}


def families_with_sinks() -> list[str]:
    """Every family of the installed transformers whose eager function reads the module's sinks."""
    models = Path(transformers.__file__).parent / "models"
    found = []
    for file in sorted(models.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "module.sinks" in text and "def eager_attention_forward" in text:
            found.append(file.parent.name)
    return found


FAMILIES = families_with_sinks()


def draw(shape: Any, mean: float, spread: float, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + mean


def exact(call: AttentionCall, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and the sinks' share in float64, from the queries and keys of the call."""
    group = call.query.shape[1] // call.key.shape[1]
    keys = call.key.double().repeat_interleave(group, dim=1)
    scores = call.query.double() @ keys.transpose(2, 3) * call.options["scaling"]
    scores = scores + call.mask.double()
    column = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1).detach()
    return weights[..., :-1], weights[..., -1]


def held_to_exact(pattern: Pattern, call: AttentionCall, sinks: Tensor) -> None:
    """The sinks' share to float32, and weights no farther off than those that the model made."""
    weights, mass = exact(call, sinks)
    assert call.weights is not None
    theirs = call.weights.double()
    if bool((theirs.sum(-1) > 1 - 0.5 * mass).all()):
        theirs = theirs * (1 - mass)[..., None]  # the function puts its sinks on the output
    # exp turns a score's error into the same relative one, above and below the fraction.
    terms = call.query.double().abs().flatten(0, 2) @ call.key.double().abs().flatten(0, 2).T
    size = largest(terms * call.options["scaling"]) + largest(sinks)
    rtol = 2 * sum_error(call.query.shape[-1] + 1, size, torch.float32)
    rtol += sum_error(call.key.shape[-2] + 1, 1.0, torch.float32)
    assert rtol < 1e-3
    torch.testing.assert_close(pattern.sink_mass().double(), mass[0], rtol=rtol, atol=0.0)
    ours_off = (pattern.dense().double() - weights).abs().max()
    assert ours_off <= (theirs - weights).abs().max()


@pytest.mark.parametrize("model_type", OPENED)
@pytest.mark.parametrize("dtype", HALVES)
def test_captures_keep_their_sinks(model_type: str, dtype: torch.dtype) -> None:
    model = build(model_type, dtype=dtype)
    model.set_attn_implementation("eager")
    lens = Lens(model)
    for seed, (mean, spread) in enumerate(DRAWS.values()):
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.data.copy_(draw(parameter.shape, mean, spread, seed))
        for length in (5, 40):
            ids = prompt_ids(model_type, length, seed=seed)
            calls: list[AttentionCall] = []
            with REGISTRY.watch(attention_keys(model), calls.append), torch.no_grad():
                model(input_ids=ids)
            capture = lens.capture(ids, attention=True)
            assert capture.attention is not None
            assert len(calls) == lens.n_layers
            for layer, call in enumerate(calls):
                pattern = capture.attention.pattern(layer)
                if call.module.sinks is None:
                    assert "sinks" not in pattern.tensors()
                else:
                    held_to_exact(pattern, call, call.module.sinks)


def eager_of(family: str) -> Callable[..., Any]:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return module.eager_attention_forward


class Sinks(nn.Module):
    """What an eager function asks of its module, with another parameter of a sink's shape."""

    def __init__(self, sinks: Tensor, gain: Tensor | None = None) -> None:
        super().__init__()
        self.num_key_value_groups = 2
        if gain is not None:
            self.head_gain = nn.Parameter(gain, requires_grad=False)
        self.sinks = nn.Parameter(sinks, requires_grad=False)


def called(
    module: nn.Module,
    function: Callable[..., Any],
    dtype: torch.dtype,
    *,
    seq: int = 33,
    scale: float = 1.5,
    **options: Any,
) -> AttentionCall:
    query = draw((2, 4, seq, 16), 0, scale, 1).to(dtype)
    key, value = (draw((2, 2, seq, 16), 0, scale, seed).to(dtype) for seed in (2, 3))
    hidden = torch.ones(seq, seq, dtype=torch.bool).triu(1)[None, None]
    mask = torch.zeros(1, 1, seq, seq, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    options = {"scaling": 0.25, **options}
    with torch.no_grad():
        output, weights = function(module, query, key, value, mask, **options)
    return AttentionCall(
        module, "eager", function, query, key, mask, options, weights, value, output
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("draws", DRAWS)
def test_every_family_with_sinks(family: str, dtype: torch.dtype, draws: str) -> None:
    sinks = draw((4,), *DRAWS[draws], 4).to(dtype)
    module = Sinks(sinks, gain=draw((4,), 0, 1, 5).to(dtype)).eval()
    # Scores of 40, which half precision rounds by a tenth, and ordinary ones.
    for scale in (1.5, 4.0):
        call = called(module, eager_of(family), dtype, scale=scale, s_aux=module.sinks)
        pattern = pattern_of(call)
        assert torch.equal(pattern.tensors()["sinks"], sinks)
        held_to_exact(pattern, call, sinks)


def test_the_families_are_found() -> None:
    assert {*OPENED, "hy_v4", "deepseek_v4", "openai_privacy_filter"} <= {*FAMILIES}


def plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any):
    """Attention that uses no sink, whatever its module holds."""
    keys, values = (each.repeat_interleave(2, dim=1) for each in (key, value))
    scores = query @ keys.transpose(2, 3) * options["scaling"] + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ values).transpose(1, 2), weights


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_a_parameter_that_only_has_the_shape_of_sinks_is_none(dtype: torch.dtype) -> None:
    for mean in (-6.0, 0.0):
        module = SimpleNamespace(gain=draw((4,), mean, 0.5, 5).to(dtype))
        module.named_parameters = lambda recurse, own=module: [("gain", own.gain)]
        call = called(module, plain, dtype)
        assert "sinks" not in pattern_of(call).tensors()


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_sinks_that_the_function_leaves_alone_take_nothing(dtype: torch.dtype) -> None:
    call = called(Sinks(torch.zeros(4, dtype=dtype)), plain, dtype)
    assert "sinks" not in pattern_of(call).tensors()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_form_that_is_not_known_keeps_its_weights_on_a_long_prompt(dtype: torch.dtype) -> None:
    """Each weight of a long row is small: no single one tells that half of the keys are hidden."""

    def windowed(module: Any, query: Any, key: Any, value: Any, mask: Tensor, **options: Any):
        seq = query.shape[2]
        late = torch.ones(seq, seq, dtype=torch.bool).tril(-seq // 2)
        return plain(module, query, key, value, mask.masked_fill(late, float("-inf")), **options)

    call = called(nn.Module(), windowed, dtype, seq=300, scale=0.3)
    pattern = pattern_of(call)
    assert isinstance(pattern, DensePattern)
    assert torch.equal(pattern.dense(), call.weights)


def test_attention_that_left_the_registry_since_is_refused_by_its_reason() -> None:
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=100, reorder_and_upcast_attn=True
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.set_attn_implementation("sdpa")
    lens = Lens(model)
    model.set_attn_implementation("eager")
    with pytest.raises(AttentionPathError, match="attn_implementation was changed"):
        lens.capture([1, 2, 3, 4], attention=True)
    assert lens.capture([1, 2, 3, 4]).residual is not None
    model.set_attn_implementation("sdpa")
    assert lens.capture([1, 2, 3, 4], attention=True).attention is not None
