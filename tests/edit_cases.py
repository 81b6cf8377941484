"""A made-up model's sites, and captures of it, to check edits without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilens.models.gates.site import Layout
from trilens.models.sites.claims import SiteClaims
from trilens.models.sites.site import Site, Tap
from trilens.taps.edits import Compiled, compile_edits
from trilens.taps.span import Span

LAYERS, D_MODEL, HEADS, D_HEAD, UNITS, EXPERTS = 3, 8, 4, 2, 6, 5


@dataclass(frozen=True)
class Model:
    name: str = "made-up"
    model_class: str = "MadeUp"
    n_layers: int = LAYERS
    d_model: int = D_MODEL


MODEL = Model()
SHAPES = {
    "resid_pre": (D_MODEL,),
    "resid_post": (D_MODEL,),
    "attn.z": (HEADS, D_HEAD),
    "attn.out": (D_MODEL,),
    "attn.pattern": (HEADS,),
    "attn.v": (HEADS, D_HEAD),
    "mlp.post": (UNITS,),
    "mlp.out": (D_MODEL,),
    "router": (EXPERTS,),
}


def claims() -> SiteClaims:
    module, layout = nn.Identity(), Layout("batched")
    sites = {
        (name, layer): Site(
            name,
            layer,
            Tap("output", module),
            layout,
            shape,
            closed=-math.inf if name == "router" else 0.0,
        )
        for name, shape in SHAPES.items()
        for layer in range(LAYERS)
    }
    del sites["attn.z", 1]
    embed = Site("embed", None, Tap("output", module), layout, (D_MODEL,))
    reasons: dict[Any, str] = {
        ("attn.z", 1): "the layer is recurrent",
        ("mlp.gate", 0): "the MLP has no gate",
    }
    return SiteClaims({**sites, embed.key: embed}, reasons)


CLAIMS = claims()


@dataclass(frozen=True)
class Source:
    """What a capture gives to an edit."""

    tokens: list[str]
    sites: dict[Any, Tensor] = field(default_factory=dict)
    model: Any = MODEL


def source(tokens: int, seed: int = 0, **model: Any) -> Source:
    drawn = torch.Generator().manual_seed(seed)
    values = {
        key: torch.randn(tokens, *site.shape, generator=drawn) for key, site in CLAIMS.sites.items()
    }
    return Source([str(i) for i in range(tokens)], values, replace(MODEL, **model))


def compiled(edits: Any, prompts: Sequence[int] = (7,), new_tokens: int = 0) -> Compiled:
    return compile_edits(
        edits,
        CLAIMS,
        model=MODEL,
        prompts=prompts,
        new_tokens=new_tokens,
        attention=[0, 2],
        recurrent=[1],
    )


def prefill(*prompts: int) -> Span:
    return Span(0, max(prompts), prompts, prompts)


def value_of(name: str, span: Span, seed: int = 5) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(len(span.lengths), span.seq, *SHAPES[name], generator=drawn)


def edited(edits: Any, name: str, value: Tensor, span: Span, layer: int = 0) -> Tensor:
    """The value after the edits, where every prompt is a row; the same one where none touched."""
    new = compiled(edits, span.prompts).apply((name, layer), value, span)
    return value if new is None else new
