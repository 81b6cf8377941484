"""Gates beyond what a probe of a few tokens reaches: limits, clipped activations, other values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    CTRLConfig,
    CTRLLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tinymodels import build, prompt_ids
from trilens import Lens
from trilens.errors import SilentSiteError, UnclaimedGateError
from trilens.models.trace import WIDE

IDS = prompt_ids("llama", 9)[0]


def llama(activation: str = "silu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, hidden_act=activation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Limited(nn.Module):
    """A GLU whose gate is limited after its activation, as Step 3.7's is."""

    def __init__(self, mlp: nn.Module, way: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = mlp.gate_proj, mlp.up_proj
        self.down_proj, self.act_fn, self.way = mlp.down_proj, nn.SiLU(), way

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x))
        if self.way == "clamp":
            gate = gate.clamp(max=2.0)
        elif self.way == "in place":
            gate.clamp_(max=2.0)
        elif self.way == "minimum":
            gate = torch.minimum(gate, torch.full_like(gate, 2.0))
        elif self.way == "where":
            gate = torch.where(gate > 2.0, 2.0, gate)
        elif self.way == "copy":
            gate = gate.double().contiguous().to(x.dtype)
        return self.down_proj(gate * self.up_proj(x))


@pytest.mark.parametrize("way", ["clamp", "in place", "minimum", "where"])
def test_a_limit_behind_the_activation_is_no_plain_activation(way: str) -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp = Limited(layer.mlp, way)
    with pytest.raises(SilentSiteError, match=r"act_fn \(SiLU\) is changed, as by a limit"):
        Lens(model).capture(IDS, gates=True)


@pytest.mark.parametrize("way", ["none", "copy"])
def test_an_output_and_its_copies_are_a_gate(way: str) -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp = Limited(layer.mlp, way)
    assert Lens(model).capture(IDS, gates=True).gates.layers("mlp.gate") == (0, 1)


@pytest.mark.parametrize("activation", ["relu6", "gelu_10", "mish"])
def test_activations_are_told_by_what_they_do_far_from_zero(activation: str) -> None:
    with pytest.raises(SilentSiteError, match=r"act_fn \(.*\) gates a GLU with a function that is"):
        Lens(llama(activation)).capture(IDS, gates=True)


class Sneaky(nn.SiLU):
    """Another function where no grid looks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 2 * WIDE[1], 7.0, super().forward(x))


def test_each_pass_proves_its_gates_anew() -> None:
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.act_fn = Sneaky()
    lens = Lens(model)
    assert lens.capture(IDS, gates=True).gates.layers("mlp.gate") == (0, 1)
    with torch.no_grad():
        mlp.gate_proj.weight[3] *= 1e5
    with pytest.raises(UnclaimedGateError, match=r"layer 1: model\.layers\.1\.mlp\.act_fn"):
        lens.capture(IDS, gates=True)
    assert lens.capture(IDS, gates=True, layers=[0]).gates.layers("mlp.gate") == (0,)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_gate_that_saturates_is_what_the_model_used() -> None:
    model = build("llama")
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight *= 1e3
    seen: list[Tensor] = []
    mlp.act_fn.register_forward_hook(lambda _m, _x, y: seen.append(y.detach()[0]))
    lens = Lens(model)
    seen.clear()
    found = lens.capture(IDS, gates=True).gates.get("mlp.gate", 0)
    assert torch.equal(found, seen[-1])
    assert float(found.max()) > WIDE[1]


def test_layers_that_are_numbered_but_not_several_are_no_experts() -> None:
    albert = AlbertConfig(
        vocab_size=120, embedding_size=16, hidden_size=32, intermediate_size=52,
        num_hidden_layers=4, num_hidden_groups=2, num_attention_heads=4,
    )  # fmt: skip
    ctrl = CTRLConfig(vocab_size=120, n_embd=32, dff=52, n_layer=2, n_head=4, n_positions=64)
    for model in (AlbertForMaskedLM(albert), CTRLLMHeadModel(ctrl)):
        with pytest.raises(SilentSiteError, match="no activation module whose output times") as e:
            Lens(model.eval()).capture(IDS, gates=True)
        assert "expert" not in str(e.value)
