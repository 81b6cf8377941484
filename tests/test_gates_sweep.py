"""Gates of every gated family: proven, equal to what the model computed, the same in a batch.

The reference is independent of the library's own recorder: a function mode written here notes what
every sigmoid, silu, gelu, softplus, exp and softmax of a plain run gave, and hooks note what every
module gave; each captured gate must be among them, unit by unit, over all tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import rwkv7_cases
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens

# Other lengths than the probe's: what it measured must hold for any prompt.
TOKENS = 7
SHORT = (9, 3, 5)
TOLERANCE = 1e-6  # one float32 rounding of values of order 1
MANY = 2e-5  # other batch shapes reorder float32 sums, through all layers below
STATISTICS = 1e-5
WINDOW = 16

SSM = {"mixer.rate", "mixer.dt", "mixer.decay", "mixer.z"}
DELTA = {"mixer.decay", "mixer.beta"}

# Type → every gate that it has.
FAMILIES = {
    "llama": {"mlp.gate"},
    "phi3": {"mlp.gate"},
    "gemma3_text": {"mlp.gate"},
    "gemma4": {"mlp.gate", "block.gate"},
    "mamba": SSM,
    "falcon_mamba": SSM,
    "jamba": SSM | {"mlp.gate", "router"},
    "zamba": SSM | {"mlp.gate"},
    "mamba2": SSM,
    "bamba": SSM | {"mlp.gate"},
    "zamba2": SSM | {"mlp.gate"},
    "nemotron_h": SSM | {"router"},
    "granitemoehybrid": SSM | {"mlp.gate", "router"},
    "falcon_h1": SSM | {"mlp.gate"},
    "rwkv": {"mixer.decay", "mixer.receptance", "mlp.receptance"},
    "rwkv7": {"mixer.decay", "mixer.in_context_rate", "mixer.value_mix", "mixer.out_gate"},
    "recurrent_gemma": {
        "mixer.input", "mixer.recurrence", "mixer.decay", "mixer.z", "mlp.gate",
    },
    "xlstm": {"mixer.decay", "mixer.out_gate", "mlp.gate"},
    "qwen3_next": DELTA
    | {"mixer.z", "attn.out_gate", "mlp.gate", "mlp.shared_gate", "router"},
    "qwen3_5_text": DELTA | {"mixer.z", "attn.out_gate", "mlp.gate"},
    "olmo_hybrid": DELTA | {"mixer.z", "mlp.gate"},
    "kimi_linear": DELTA | {"mixer.out_gate", "mlp.gate", "router"},
    "bailing_hybrid": DELTA | {"mixer.out_gate", "attn.out_gate", "mlp.gate", "router"},
    "minimax": {"mixer.decay", "mixer.out_gate", "router"},
    "lfm2": {"mixer.input", "mixer.out_gate", "mlp.gate"},
    "lfm3": {"mixer.input", "mixer.out_gate", "mlp.gate", "attn.out_gate"},
    "afmoe": {"attn.out_gate", "mlp.gate", "router"},
    "beam": {"attn.out_gate", "mlp.gate", "router"},
    "laguna": {"attn.out_gate", "mlp.gate", "router"},
    "mixtral": {"router"},
    "qwen2_moe": {"router", "mlp.gate", "mlp.shared_gate"},
    "gpt_oss": {"router"},
    "deepseek_v3": {"router", "mlp.gate"},
    "llama4_text": {"router", "mlp.gate"},
    "phimoe": {"router"},
    "inkling_text": {"router", "mlp.gate"},
    "jetmoe": {"router", "attn.router"},
}  # fmt: skip

# Types whose activations belong to ungated MLPs: nothing may be claimed.
UNGATED = ("gpt2", "nemotron", "arcee", "apertus", "jais2")

_OPERATIONS = {
    "sigmoid", "silu", "gelu", "softplus", "exp", "softmax", "log_sigmoid", "logsigmoid",
    "clamp",
}  # fmt: skip

# The families' own deprecation warnings are not ours to answer for.
pytestmark = pytest.mark.filterwarnings("ignore")


model_of = functools.partial(rwkv7_cases.model_of, noise=0.1, own=1.0)


class _Outputs(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, list[torch.Tensor]] = {name: [] for name in _OPERATIONS}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _OPERATIONS and isinstance(result, torch.Tensor):
            self.given[name].append(result)
        return result


def plain_run(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What every gating function and, under "module", every module of a plain run gave."""
    modules: list[torch.Tensor] = []
    keep = lambda _m, _a, out: modules.extend(t for t in [out] if isinstance(t, torch.Tensor))  # noqa: E731
    handles = [module.register_forward_hook(keep) for module in model.modules()]
    with _Outputs() as outputs, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    given = outputs.given
    given["logsigmoid"] = given["logsigmoid"] + given.pop("log_sigmoid")
    return {**given, "module": modules}


def columns(tensor: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """The tensor as [tokens, anything], in every way in which an axis can be the tokens'."""
    found = []
    if tensor.dim() >= 2 and tensor.shape[0] % tokens == 0:
        found.append(tensor.reshape(tokens, -1))
    for axis in range(tensor.dim()):
        # Chunked kernels pad the tokens to a whole chunk.
        if tensor.shape[axis] >= tokens:
            found.append(tensor.movedim(axis, 0)[:tokens].reshape(tokens, -1))
    return [form.double() for form in found]


def worst_unit(values: torch.Tensor, given: list[torch.Tensor]) -> float:
    """Of all units, the largest distance to the nearest recorded column, over all tokens."""
    tokens = values.shape[0]
    forms = [form for tensor in given for form in columns(tensor, tokens)]
    if tokens == 1 or not forms:
        # A parameter, or a recurrence that runs token by token: number by number.
        values = values.reshape(1, -1)
        forms = [tensor.double().reshape(1, -1) for tensor in given]
    table, ours = torch.cat(forms, dim=1).T, values.double().T
    # A random sum of each column orders them: only neighbours in that order are compared in full.
    # A match outside the window would be missed, which fails; none is ever invented.
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(table.shape[1], generator=generator, dtype=torch.float64)
    keys, order = (table @ weights).nan_to_num(0.0, 0.0, 0.0).sort()
    middle = torch.searchsorted(keys, ours @ weights)
    window = (middle[:, None] + torch.arange(-WINDOW, WINDOW)).clamp(0, len(order) - 1)
    distance = (table[order[window]] - ours[:, None]).abs().amax(-1)
    return float(distance.nan_to_num(float("inf")).amin(1).max())


def reference_difference(cap: Capture, name: str, layer: int, given: dict) -> float:
    gates, spec = cap.gates, cap.gates.spec(name, layer)
    value = gates.get(name, layer)
    if spec.kind == "decay":
        ways = [(torch.cumprod(value.double(), 0), given["exp"]), (value, given["exp"])]
        ways.append((gates.pre(name, layer), given["module"] + given["exp"]))
        if spec.static:
            # A power of the decay is what the model uses: its log, or that over one chunk.
            log = gates.pre(name, layer)
            ways += [(torch.exp(TOKENS * log), given["exp"]), (-log, given["exp"])]
        if given["logsigmoid"]:
            ways = [(torch.log(value.double()), given["logsigmoid"])]
        return min(worst_unit(ours, theirs) for ours, theirs in ways if theirs)
    if spec.kind == "step":
        return worst_unit(value, given["softplus"] + given["clamp"])
    if "leaves out" in spec.formula:
        kept = [(y > 0) * value for y in given["softmax"] if y.shape == value.shape]
        pairs = zip(kept, [y for y in given["softmax"] if y.shape == value.shape], strict=True)
        return min(float((k / k.sum(-1, keepdim=True) - y).abs().max()) for k, y in pairs)
    if "renormalises" in spec.formula:
        return chosen_difference(value, given["softmax"])
    if "chosen" in spec.formula:
        # What was not chosen became σ(−∞) = 0.
        scores = [y.T if y.shape[0] != TOKENS else y for y in given["sigmoid"] if y.dim() == 2]
        scores = [y for y in scores if y.shape == value.shape]
        return min(float((value - y)[y > 0].abs().max()) for y in scores)
    if spec.kind == "router":
        return worst_unit(value, given["softmax"] + given["sigmoid"])
    if spec.function == "doubled":
        return worst_unit(value / 2, given["sigmoid"])
    pools = {"sigmoid": "sigmoid", "unit": "sigmoid", "silu": "silu", "softplus": "softplus"}
    pools |= {"gelu": "gelu", "gelu_tanh": "gelu"}
    return worst_unit(value, given[pools.get(spec.function, "module")])


def chosen_difference(value: torch.Tensor, given: list[torch.Tensor]) -> float:
    """Routers that take the softmax over the chosen experts: the same numbers, renormalised."""
    worst = []
    for theirs in given:
        if theirs.dim() == 2 and theirs.shape[0] == value.shape[0]:
            top = value.topk(theirs.shape[1]).values
            worst.append(float((top / top.sum(-1, keepdim=True) - theirs).abs().max()))
    return min(worst)


def test_the_reference_notices_a_wrong_value() -> None:
    values = torch.rand(TOKENS, 30, generator=torch.Generator().manual_seed(0))
    given = [values.reshape(1, TOKENS, 5, 6), torch.rand(1, 12, TOKENS)]
    assert worst_unit(values, given) == 0.0
    wrong = values.clone()
    wrong[3, 17] += 1e-4
    assert worst_unit(wrong, given) > TOLERANCE
    assert worst_unit(values.flip(0), given) > TOLERANCE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gates_are_what_the_model_computed(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    lens = Lens(model)
    assert set(lens.gate_layers) == FAMILIES[model_type]
    ids = prompt_ids(model_type, TOKENS)
    given = plain_run(model, ids)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    cap = lens.capture(ids, gates=True)
    assert torch.equal(cap.logits, plain[0])
    assert set(cap.gates.names) == FAMILIES[model_type]
    for name, layers in lens.gate_layers.items():
        assert cap.gates.layers(name) == layers
        for layer in layers:
            spec, value = cap.gates.spec(name, layer), cap.gates.get(name, layer)
            assert value.shape == (1 if spec.static else TOKENS, spec.units)
            low, high = spec.range
            assert float(value.min()) >= low - TOLERANCE
            assert float(value.max()) <= high + TOLERANCE
            if name == "mixer.rate" or (spec.kind == "linear" and spec.function == "identity"):
                continue  # test_linear_gates_… and the decays, which need the rate
            worst = reference_difference(cap, name, layer, given)
            scale = max(1.0, float(value.abs().max()))
            assert worst <= TOLERANCE * scale, f"{name} of layer {layer} is off by {worst}"
    back = Capture.load(cap.save(tmp_path / "a.tlc"))
    for name, layers in lens.gate_layers.items():
        for layer in layers:
            ours, theirs = back.gates.get(name, layer), cap.gates.get(name, layer)
            assert torch.equal(back.gates.pre(name, layer), cap.gates.pre(name, layer))
            # A saved tensor is contiguous, and gelu rounds otherwise for another layout.
            assert_near(ours, theirs, TOLERANCE, least=1.0)
            assert back.gates.spec(name, layer) == cap.gates.spec(name, layer)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_batch_gives_the_same_gates_and_statistics(model_type: str) -> None:
    lens = Lens(model_of(model_type))
    prompts = [prompt_ids(model_type, n, seed=n)[0].tolist() for n in SHORT]
    for prompt, many in zip(prompts, lens.capture_many(prompts, gates=True), strict=True):
        one = lens.capture(prompt, gates=True)
        for name, layers in lens.gate_layers.items():
            for layer in layers:
                ours, theirs = many.gates.get(name, layer), one.gates.get(name, layer)
                assert ours.shape == theirs.shape
                scale = max(1.0, float(theirs.abs().max()))
                assert float((ours - theirs).abs().max()) <= MANY * scale, (name, layer)
                if one.gates.spec(name, layer).kind == "linear":
                    continue
                opened = one.gates.openness(name, layer)
                assert float(opened.min()) >= 0.0
                assert float(opened.max()) <= 1.0
                a, b = (cap.gates.analyse(name, layer) for cap in (many, one))
                # An openness rises by 1/4 of its argument at most.
                assert abs(a.avg_gate - b.avg_gate).max() <= STATISTICS * max(1.0, scale / 4)


@pytest.mark.parametrize("model_type", ["mamba", "zamba", "qwen3_next", "rwkv", "mixtral", "lfm2"])
def test_a_single_token_has_gates(model_type: str) -> None:
    """No axis of a one-token prompt can be told from a batch of one by its size."""
    lens = Lens(build(model_type))
    ids = prompt_ids(model_type, TOKENS)
    long = lens.capture(ids, gates=True).gates
    short = lens.capture(ids[:, :1], gates=True).gates
    for name, layers in lens.gate_layers.items():
        ours, theirs = short.get(name, layers[0]), long.get(name, layers[0])
        assert ours.shape[0] == 1
        scale = max(1.0, float(theirs.abs().max()))
        assert float((ours[0] - theirs[0]).abs().max()) <= MANY * scale


@pytest.mark.parametrize("model_type", UNGATED)
def test_an_ungated_mlp_has_no_gate(model_type: str) -> None:
    assert not Lens(build(model_type)).gate_layers


def test_linear_gates_rebuild_the_convolution() -> None:
    """C ⊙ conv(B ⊙ x) is the output projection's input, with the captured B and C."""
    model = build("lfm2")
    lens = Lens(model)
    layer = lens.gate_layers["mixer.input"][0]
    mixer = model.model.layers[layer].conv
    seen: dict[str, torch.Tensor] = {}
    handles = [
        mixer.in_proj.register_forward_hook(lambda m, a, o: seen.update(all=o[0])),
        mixer.out_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0][0])),
    ]
    gates = lens.capture(prompt_ids("lfm2", TOKENS), gates=True).gates
    for handle in handles:
        handle.remove()
    enters, leaves = gates.get("mixer.input", layer), gates.get("mixer.out_gate", layer)
    x = seen["all"].chunk(3, dim=-1)[2]
    weight, bias = mixer.conv.weight, mixer.conv.bias
    padded = F.pad((enters * x).T[None], (weight.shape[-1] - 1, 0))
    mixed = F.conv1d(padded, weight, bias, groups=weight.shape[0])[0].T
    assert_near(leaves * mixed, seen["out"], TOLERANCE, least=1.0)


def test_output_gate_of_rwkv7_is_its_low_rank_projection() -> None:
    model = model_of("rwkv7")
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].attn.g_lora.register_forward_hook(
        lambda m, a, o: seen.append(o[0])
    )
    lens = Lens(model)
    cap = lens.capture(prompt_ids("rwkv7", TOKENS), gates=True)
    handle.remove()
    assert torch.equal(cap.gates.get("mixer.out_gate", 1), seen[-1])
    assert 0 not in cap.gates.layers("mixer.value_mix")


def test_decay_and_rate_of_a_state_space_model() -> None:
    """exp(dt·A) from the model's own parameters, and dt's openness from it."""
    model = build("mamba")
    gates = Lens(model).capture(prompt_ids("mamba", TOKENS), gates=True).gates
    mixer = model.backbone.layers[2].mixer
    rate = -torch.exp(mixer.A_log.detach().double())
    dt = gates.get("mixer.dt", 2).double()
    decay = torch.exp(dt[:, :, None] * rate)
    assert gates.spec("mixer.decay", 2).shape == tuple(rate.shape)
    assert (gates.get("mixer.decay", 2) - decay.flatten(1)).abs().max() <= TOLERANCE
    assert (gates.openness("mixer.dt", 2) - (1 - decay.mean(-1))).abs().max() <= TOLERANCE
    horizon, half = gates.horizon_tokens("mixer.decay", 2), gates.half_life_tokens("mixer.decay", 2)
    assert torch.allclose(horizon, 1 / (1 - decay.flatten(1)), rtol=1e-4)
    assert torch.allclose(half, -0.6931471805599453 / torch.log(decay).flatten(1), rtol=1e-5)


def test_beta_of_olmo_hybrid_is_doubled() -> None:
    gates = Lens(build("olmo_hybrid")).capture(prompt_ids("olmo_hybrid", TOKENS), gates=True).gates
    layer = gates.layers("mixer.beta")[0]
    spec = gates.spec("mixer.beta", layer)
    assert spec.range == (0.0, 2.0)
    assert torch.allclose(
        gates.openness("mixer.beta", layer) * 2, gates.get("mixer.beta", layer), atol=TOLERANCE
    )


@pytest.mark.parametrize(
    "model_type", ["qwen3_next", "bamba", "mixtral", "falcon_h1", "llama4_text"]
)
def test_half_precision(model_type: str) -> None:
    """In bfloat16 the gates are claimed as in float32, and nothing the model computes changes."""
    model = build(model_type, dtype=torch.bfloat16)
    ids = prompt_ids(model_type, TOKENS)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    lens = Lens(model)
    assert set(lens.gate_layers) == FAMILIES[model_type]
    cap = lens.capture(ids, gates=True)
    assert torch.equal(cap.logits, plain[0])
    for name, layers in lens.gate_layers.items():
        assert bool(torch.isfinite(cap.gates.get(name, layers[0]).float()).all())
