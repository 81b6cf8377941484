"""What is claimed as a gate, what is ruled out, and that neither is loud."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from tinymodels import build, prompt_ids
from trilens.errors import SilentSiteError, UnclaimedGateError
from trilens.lens.lens import Lens
from trilens.models.gates.kernels import KERNEL_GATES, is_recorded
from trilens.taps.kernels import kernel_calls


def llama(mlp_class: type[nn.Module], layers: tuple[int, ...] = (1,)) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in layers:
        model.model.layers[layer].mlp = mlp_class(32, 48)
    return model.eval()


class _Base(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)


class _Hidden(_Base):
    def forward(self, x):
        # Nothing that a module gives or takes holds what goes into the sigmoid.
        return self.down(torch.sigmoid(self.gate(x).square() + 0.5) * self.up(x))


class _Functional(_Base):
    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class _Ungated(_Base):
    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x))) + 0 * self.up(x).sum()


class _Quick(_Base):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.norm = nn.LayerNorm(inner)

    def forward(self, x):
        return self.down(self.norm(nn.functional.gelu(self.gate(x))))


IDS = list(range(3, 12))


def test_an_unknown_gate_is_an_error_that_names_class_and_function() -> None:
    lens = Lens(llama(_Hidden))
    with pytest.raises(UnclaimedGateError, match=r"layer 1 .* _Hidden calls sigmoid"):
        lens.capture(IDS, gates=True)
    assert lens.capture(IDS, gates=True, layers=[0, 2]).gates.layers("mlp.gate") == (0, 2)
    assert lens.capture(IDS).residual.n_layers == 3
    only = Lens(llama(_Hidden, (0, 1, 2)))
    with pytest.raises(SilentSiteError, match="_Hidden calls sigmoid"):
        only.capture(IDS, gates=True)


def test_an_activation_function_gates_like_a_module() -> None:
    model = llama(_Functional)
    lens = Lens(model)
    seen: list[torch.Tensor] = []
    mlp = model.model.layers[1].mlp
    mlp.gate.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    gates = lens.capture(IDS, gates=True).gates
    assert gates.layers("mlp.gate") == (0, 1, 2)
    assert torch.equal(gates.pre("mlp.gate", 1), seen[-1])
    assert torch.equal(gates.get("mlp.gate", 1), nn.functional.silu(seen[-1]))


@pytest.mark.parametrize("mlp", [_Ungated, _Quick])
def test_an_activation_that_multiplies_nothing_is_no_gate(mlp: type[nn.Module]) -> None:
    lens = Lens(llama(mlp))
    assert lens.gate_layers == {"mlp.gate": (0, 2)}
    lens.capture(IDS, gates=True)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx", "granitemoehybrid"])
def test_experts_are_left_out(model_type: str) -> None:
    """Their rows are sorted by expert: no site may read them."""
    lens = Lens(build(model_type))
    for site in lens._runner.proof.gates.gates.values():
        assert "experts" not in site.spec.where
        assert "block_sparse_moe.activation" not in site.spec.where


def test_a_convolutions_activation_is_no_gate() -> None:
    lens = Lens(build("mamba"))
    gates = lens.capture(prompt_ids("mamba", 6), gates=True).gates
    assert set(gates.names) == {"mixer.rate", "mixer.dt", "mixer.decay", "mixer.z"}
    mixer = build("mamba").backbone.layers[0].mixer
    assert gates.spec("mixer.z", 0).units == mixer.intermediate_size


def test_per_head_splits_and_interleaving_are_measured() -> None:
    """q_proj gives [q | gate] per head; one model interleaves x and z: no plain chunk of either."""
    model = build("qwen3_next")
    lens = Lens(model)
    [layer] = lens.gate_layers["attn.out_gate"]
    attention = model.model.layers[layer].self_attn
    seen: list[torch.Tensor] = []
    attention.q_proj.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    gates = lens.capture(prompt_ids("qwen3_next", 6), gates=True).gates
    heads = seen[-1].reshape(6, -1, 2 * attention.head_dim)
    ours = gates.pre("attn.out_gate", layer)
    assert torch.equal(ours, heads[..., attention.head_dim :].reshape(6, -1))
    assert not torch.equal(ours, seen[-1].chunk(2, -1)[1])


def test_multipliers_of_the_projection_are_in_the_gate() -> None:
    model = build("falcon_h1")
    lens = Lens(model)
    mixer = model.model.layers[0].mamba
    seen: list[torch.Tensor] = []
    mixer.in_proj.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    gates = lens.capture(prompt_ids("falcon_h1", 6), gates=True).gates
    units = gates.spec("mixer.z", 0).units
    scaled = (seen[-1] * mixer.mup_vector.reshape(1, -1))[:, :units]
    assert torch.equal(gates.pre("mixer.z", 0), scaled)
    assert not torch.equal(gates.pre("mixer.z", 0), seen[-1][:, :units])


def test_the_proof_notices_a_wrong_value() -> None:
    given = [torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    values = torch.cat(given)[[4, 0, 2], 5:9]
    assert is_recorded(values, given)
    assert is_recorded(values + 5e-7, given)
    assert not is_recorded(torch.cat([values.flatten(), torch.tensor([1.5])]), given)
    assert not is_recorded(values + 1e-4, given)
    assert not is_recorded(values, [])
    assert not is_recorded(values[:0], given)


@pytest.mark.parametrize("name", ["delta_bias", "delta_softplus"])
def test_a_step_read_wrongly_is_not_claimed(name: str) -> None:
    """Without its bias or its softplus dt is not what the model computed: no gate of it."""
    rate, step, decay = KERNEL_GATES["mamba_selective_scan"]
    model, ids = build("mamba"), prompt_ids("mamba", 6)
    outputs: dict[str, list[torch.Tensor]] = {"softplus": [], "exp": []}
    with _Outputs(outputs), torch.no_grad(), kernel_calls(model) as calls:
        model(input_ids=ids, use_cache=False)
    right = dict(calls[0].arguments)
    assert step.function(right, outputs) == "step"
    assert decay.function(right, outputs) == "step_decay"
    wrong = {**right, name: None}
    assert step.function(wrong, outputs) == ""
    assert decay.function(wrong, outputs) == ""
    assert rate.read(right).shape == (right["dt"].shape[1], right["B"].shape[1])


class _Outputs(TorchFunctionMode):
    def __init__(self, outputs: dict[str, list[torch.Tensor]]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__ in self.outputs:
            self.outputs[func.__name__].append(result)
        return result
