"""Direct logit attribution against hand-written norms, heads and neurons in float64."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens import Lens, demo_path
from trilens.analysis.direct_attribution import By, attribute, attribution_sites
from trilens.errors import CaptureError, NotStoredError, OutOfRangeError, TokenIdError, UsageError

TARGET, AGAINST = 17, 29
EPS = 2e-5  # float32 through a whole model, of the largest value


@dataclass(frozen=True)
class Names:
    """Where a family keeps what the reference reads."""

    blocks: str
    attention: str
    projection: str
    down: str
    norm: str


NAMES = {
    "llama": Names("model.layers", "self_attn", "self_attn.o_proj", "mlp.down_proj", "model.norm"),
    "gpt2": Names("transformer.h", "attn", "attn.c_proj", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": Names(
        "gpt_neox.layers", "attention", "attention.dense", "mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm",
    ),
    "gemma2": Names("model.layers", "self_attn", "self_attn.o_proj", "mlp.down_proj", "model.norm"),
}  # fmt: skip


def lens_of(kind: str) -> Lens:
    return Lens(build(kind))


def ran(lens: Lens, kind: str, by: By, **how: Any) -> Any:
    return lens.capture(prompt_ids(kind, 10)[0], sites=attribution_sites(lens, by), **how)


def seen(lens: Lens, kind: str, names: Names) -> dict[str, list[Tensor]]:
    """By plain hooks: what each projection reads and each block returns, [seq, width]."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for block in lens.model.get_submodule(names.blocks):
        for what in ("projection", "down"):
            module = block.get_submodule(getattr(names, what))
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, what=what: found[what].append(args[0][0].double())
                )
            )
        handles.append(
            block.register_forward_hook(
                lambda _m, _args, out: found["block"].append(
                    (out[0] if isinstance(out, tuple) else out)[0].double()
                )
            )
        )
    with torch.no_grad():
        lens.model(prompt_ids(kind, 10), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def direction(lens: Lens, kind: str, x: Tensor) -> Tensor:
    """d (logit difference) / d part, by the formulas of the families' norms."""
    norm = lens.model.get_submodule(NAMES[kind].norm)
    weight = norm.weight.detach().double() + (kind == "gemma2")
    rows = lens.model.get_output_embeddings().weight.detach().double()
    through = (rows[TARGET] - rows[AGAINST]) * weight
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if isinstance(norm, torch.nn.LayerNorm):
        through = through - through.mean()
        return through / (x.var(correction=0) + eps).sqrt()
    return through / (x.square().mean() + eps).sqrt()


def matrix(module: Any) -> Tensor:
    """[in, out] of a projection."""
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, torch.nn.Linear) else weight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_heads_and_neurons_by_hand(kind: str) -> None:
    lens, names = lens_of(kind), NAMES[kind]
    found = seen(lens, kind, names)
    way = direction(lens, kind, found["block"][-1][-1])
    blocks = lens.model.get_submodule(names.blocks)
    by_head = attribute(ran(lens, kind, "head"), lens, TARGET, AGAINST, by="head")
    by_neuron = attribute(ran(lens, kind, "neuron"), lens, TARGET, AGAINST, by="neuron", k=7)
    for layer, block in enumerate(blocks):
        heads = [p for p in by_head.parts if p.component == "attn.head" and p.layer == layer]
        z = found["projection"][layer][-1]
        each = matrix(block.get_submodule(names.projection)) @ way * z
        assert_near([p.value for p in heads], each.reshape(len(heads), -1).sum(-1), EPS, least=0.1)
        units = matrix(block.get_submodule(names.down)) @ way * found["down"][layer][-1]
        neurons = [p for p in by_neuron.parts if p.component == "mlp.neuron" and p.layer == layer]
        assert len(neurons) == min(7, len(units))
        assert_near([p.value for p in neurons], units[[p.index for p in neurons]], EPS, least=0.1)
        left = units.abs().clone()
        left[[p.index for p in neurons]] = 0
        assert float(left.max()) <= min(abs(p.value) for p in neurons) + EPS
    assert by_head.total == pytest.approx(by_neuron.total, abs=1e-9)


@pytest.mark.parametrize("kind", list(NAMES))
def test_layers_by_hand(kind: str) -> None:
    lens = lens_of(kind)
    blocks = seen(lens, kind, NAMES[kind])["block"]
    way = direction(lens, kind, blocks[-1][-1])
    found = attribute(ran(lens, kind, "component"), lens, TARGET, AGAINST)
    for layer in range(1, lens.n_layers):
        added = (blocks[layer] - blocks[layer - 1])[-1] @ way
        own = sum(part.value for part in found.parts if part.layer == layer)
        assert_near(np.array(own), added, EPS, least=0.1)


@pytest.mark.parametrize("by", ["component", "head", "neuron"])
@pytest.mark.parametrize("kind", [*NAMES, "cohere", "olmo2", "opt", "phi", "granite"])
def test_the_parts_sum_to_the_logit_difference(kind: str, by: By) -> None:
    lens = lens_of(kind)
    for position in (-1, 3):
        cap = ran(lens, kind, by, residual="all")
        found = attribute(cap, lens, TARGET, AGAINST, by=by, position=position)
        assert cap.logits is not None
        logits = cap.logits[position].double()
        bound = getattr(lens.model.config, "final_logit_softcapping", None)
        if bound:
            logits = bound * torch.atanh(logits / bound)
        assert abs(found.total - float(logits[TARGET] - logits[AGAINST])) <= 1e-4
        assert abs(found.total - found.logit_difference) <= 1e-4
        assert sum(row["value"] for row in found.table()[:-1]) == pytest.approx(found.total)


@pytest.mark.parametrize("kind", ["mamba", "rwkv7", "gpt2"])
def test_the_logit_of_one_token(kind: str) -> None:
    lens = lens_of(kind)
    found = attribute(ran(lens, kind, "component"), lens, TARGET)
    cap = lens.capture(prompt_ids(kind, 10)[0])
    assert cap.logits is not None
    assert_near(np.array(found.total), cap.logits[-1, TARGET], 1e-4, least=1.0)


@pytest.mark.parametrize("kind", ["transformer", "mamba", "rwkv7"])
def test_the_demos(kind: str) -> None:
    lens = Lens.from_pretrained(demo_path(kind), dtype="float32")
    cap = lens.capture("def area(r):", sites=attribution_sites(lens))
    found = attribute(cap, lens, " are", "(")
    assert (found.target_text, found.against_text) == (" are", "(")
    assert abs(found.total - found.logit_difference) <= 1e-4
    half = Lens.from_pretrained(demo_path(kind))
    cap = half.capture("def area(r):", sites=attribution_sites(half))
    found = attribute(cap, half, " are", "(")
    assert cap.logits is not None
    size = float(cap.logits[-1].abs().max())
    assert abs(found.total - found.logit_difference) <= 4 * torch.finfo(torch.bfloat16).eps * size


def test_a_norm_after_a_part_is_a_factor() -> None:
    lens = lens_of("gemma2")
    found = attribute(ran(lens, "gemma2", "head"), lens, TARGET, AGAINST, by="head")
    rests = [abs(part.value) for part in found.parts if part.component == "attn.rest"]
    assert len(rests) == lens.n_layers and max(rests) < 1e-5
    assert any("before the cap" in note for note in found.notes)


def test_models_without_parts_are_refused() -> None:
    bert = lens_of("bert")
    with pytest.raises(CaptureError, match="do not sum to the last residual stream"):
        attribute(ran(bert, "bert", "component"), bert, TARGET)
    mamba = lens_of("mamba")
    with pytest.raises(CaptureError, match=r"no layer can be told apart by head.*softmax"):
        attribute(ran(mamba, "mamba", "component"), mamba, TARGET, by="head")


def test_a_norm_that_is_none_is_refused() -> None:
    lens = lens_of("llama")
    cap = ran(lens, "llama", "component")
    norm = lens.model.model.norm
    plain = norm.forward
    norm.forward = lambda x: plain(x).tanh()
    with pytest.raises(CaptureError, match="the final norm cannot be folded"):
        attribute(cap, lens, TARGET)


def test_bad_input_is_named() -> None:
    lens = lens_of("llama")
    cap = ran(lens, "llama", "component")
    with pytest.raises(NotStoredError, match="head_out"):
        attribute(cap, lens, TARGET, by="head")
    with pytest.raises(NotStoredError, match="resid_pre"):
        attribute(lens.capture([11, 12]), lens, TARGET)
    with pytest.raises(NotStoredError, match="residual='all'"):
        attribute(cap, lens, TARGET, position=0)
    with pytest.raises(OutOfRangeError, match="position 10"):
        attribute(cap, lens, TARGET, position=10)
    with pytest.raises(TokenIdError):
        attribute(cap, lens, 10**6)
    with pytest.raises(UsageError, match="'layer' is unknown"):
        attribution_sites(lens, "layer")  # type: ignore[arg-type]
