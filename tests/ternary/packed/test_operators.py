"""The products as operators of torch: compiled and exported graphs call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoint_cases import load, saved
from tolerances import assert_near
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.packed.operators import call_groups, call_multiply
from trilens.ternary.quantize import PerLayerQuant

IDS = torch.arange(1, 13)[None]


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(ids, use_cache=False).logits
        return found


def layer(rule: str = "planes", **options: Any) -> TernaryLinear:
    torch.manual_seed(0)
    quant = PerLayerQuant.quantize(torch.randn(20, 48), "w", rule=rule, group_size=16)
    return TernaryLinear.from_quant(quant, torch.randn(20), **options)


def filled(**options: Any) -> TernaryExperts:
    held = TernaryExperts(3, 48, 20, per_row=True, **options)
    torch.manual_seed(1)
    held.codes.copy_(torch.tensor([0x00, 0x55, 0x66, 0xA5])[torch.randint(4, held.codes.shape)])
    held.scale.copy_(torch.rand(held.scale.shape))
    return held


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_an_exported_model_gives_the_same_logits(model_type: str, tmp_path: Path) -> None:
    ternarize(saved(model_type, tmp_path / "src"), tmp_path / "out", plan=TernaryPlan(per="row"))
    model = Logits(load(tmp_path / "out").eval())
    with torch.no_grad():
        wanted = model(IDS)
    exported = torch.export.export(model, (IDS,), strict=False)
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    called = {str(node.target) for node in again.graph.nodes}
    assert "trilens.multiply.default" in called
    assert ("trilens.multiply_groups.default" in called) == (model_type == "mixtral")
    assert_near(again.module()(IDS), wanted, 1e-6)


def test_a_whole_model_compiles_to_one_graph(tmp_path: Path) -> None:
    ternarize(saved("mixtral", tmp_path / "src"), tmp_path / "out")
    model = Logits(load(tmp_path / "out").eval())
    graphs = []

    def keep(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(IDS), model(IDS), 1e-6)
    (graph,) = graphs
    assert "trilens.multiply.default" in graph.code
    assert "trilens.multiply_groups.default" in graph.code


@pytest.mark.parametrize(("rule", "rotated"), [("planes", True), ("asymmetric", False)])
def test_gradients_of_a_compiled_layer(rule: str, rotated: bool) -> None:
    held = layer(rule, rotated=rotated)
    compiled = torch.compile(held, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 48)
    found = []
    for function in (held, compiled):
        held.zero_grad()
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        y.square().sum().backward()
        assert held.bias is not None
        found.append((y.detach(), inputs.grad, held.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, 1e-5)


def test_autocast_is_compiled_in() -> None:
    held = layer()
    compiled = torch.compile(held, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 48)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted, found = held(x), compiled(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert_near(found.float(), wanted.float(), 1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_multiply_as_their_dense_parameter(transposed: bool) -> None:
    held = filled(transposed=transposed)
    dense = held.parameter()
    assert dense.shape == held.shape
    x, ends = torch.randn(7, 48, requires_grad=True), torch.tensor([3, 3, 6])
    y = held(x, ends)
    plain = dense.transpose(1, 2) if transposed else dense
    wanted = torch.cat([x[:3] @ plain[0].T, x[3:6] @ plain[2].T, torch.zeros(1, 20)])
    assert_near(y.detach(), wanted.detach(), 1e-6)
    (ours,) = torch.autograd.grad(y.square().sum(), x)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), x)
    assert_near(ours, theirs, 1e-5)
    called = call_groups(x, held.packed, ends)
    assert torch.equal(called, y)
    (by_operator,) = torch.autograd.grad(called.square().sum(), x)
    assert_near(by_operator, theirs, 1e-5)


def test_the_operators_keep_torch_s_rules() -> None:
    """Shapes without values, gradients and schemas, by torch's own checks."""
    held, many = layer(), filled()
    x = torch.randn(5, 48, requires_grad=True)
    multiply: Any = torch.ops.trilens.multiply.default
    parts = held.packed
    weight = (parts.codes, parts.scale, parts.offset, parts.second_codes, parts.second_scale)
    torch.library.opcheck(multiply, (x, held.bias, *weight, 48, 16))
    assert torch.equal(call_multiply(x, parts, held.bias), held(x))
    groups: Any = torch.ops.trilens.multiply_groups.default
    ends = torch.tensor([1, 4, 5])
    torch.library.opcheck(groups, (x, ends, many.codes, many.scale, None, None, None, 48, None))
