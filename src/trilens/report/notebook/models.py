"""Pages of what holds values, or a model, and is no result: for a notebook alone."""

from __future__ import annotations

from functools import singledispatch

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.states import StateCache
from trilens.caches.storage import spell_layers
from trilens.lens.lens import Lens
from trilens.report.page import Block, Chart, Heads, Page, Section
from trilens.report.patterns import head_patterns
from trilens.report.tables import Column, Table
from trilens.report.views.capture import state_norms
from trilens.report.words import four_digits
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["model_page"]

_LONG = 2048  # tokens above which a notebook does not read every weight for a picture


@singledispatch
def model_page(shown: object) -> Page | None:
    """The page, or None for what has a report of its own."""
    return None


@model_page.register
def _lens(lens: Lens) -> Page:
    gates = {name: spell_layers(layers) for name, layers in lens.gate_layers.items()}
    anatomy = lens.anatomy
    rows = [
        ("softmax attention", spell_layers(tuple(anatomy.attention)) or "–"),
        ("effective attention", spell_layers(tuple(lens.effective_layers)) or "–"),
        ("recurrent states", spell_layers(tuple(lens.state_layers)) or "–"),
        *((f"gate {name}", layers) for name, layers in gates.items()),
    ]
    columns = (Column("what can be captured", left=True), Column("where", left=True))
    table = Table(columns, tuple(rows), title="what can be captured")
    return Page(
        title=type(lens.model).__name__,
        sections=(Section("What can be captured", (table,)),),
        facts={"layers": str(lens.n_layers), "d_model": str(lens.d_model)},
    )


@model_page.register
def _attention(cache: AttentionCache) -> Page | None:
    if cache.is_empty:
        return None
    rows = []
    for layer in cache.layers:
        pattern = cache.pattern(layer)
        kind = "effective, signed" if pattern.signed else "sums to 1, less a sink"
        rows.append((layer, pattern.heads, pattern.seq_q, pattern.seq_k, kind))
    columns = (
        Column("layer"),
        Column("heads"),
        Column("queries"),
        Column("keys"),
        Column("weights", left=True),
    )
    table = Table(columns, tuple(rows), title="patterns")
    blocks: list[Block] = [table]
    one = cache.pattern(cache.layers[0])
    square = all(
        cache.pattern(i).seq_q == cache.pattern(i).seq_k == one.seq_k for i in cache.layers
    )
    if square and one.seq_k <= _LONG:
        patterns = head_patterns(cache, "effective" if one.signed else "softmax", cache.layers)
        blocks.append(Heads(patterns, table))
    return Page(title="attention", sections=(Section("Patterns", tuple(blocks)),))


@model_page.register(ActivationCache)
@model_page.register(FullActivationCache)
def _residual(cache: ActivationCache | FullActivationCache) -> Page | None:
    if cache.is_empty:
        return None
    rows = []
    for layer in cache.layers:
        # PROMOTE: a norm in half precision overflows where the residual is large.
        norms = cache[layer].float().norm(dim=-1).reshape(-1)
        rows.append((layer, float(norms[-1]), float(norms.mean())))
    table = Table(
        (
            Column("layer"),
            Column("norm, last token", key="last", spell=four_digits),
            Column("norm, mean over tokens", key="mean", spell=four_digits),
        ),
        tuple(rows),
        title="residual stream",
    )
    chart = Chart(kind="lines", table=table, x="layer", y=("last", "mean"))
    return Page(title="residual stream", sections=(Section("Norms", (chart,)),))


@model_page.register
def _states(cache: StateCache) -> Page | None:
    if cache.is_empty:
        return None
    return Page(title="recurrent states", sections=(state_norms(cache),))


@model_page.register
def _quant(found: PerLayerQuant) -> Page:
    counts = {trit: int((found.trits == trit).sum()) for trit in (-1, 0, 1)}
    total = sum(counts.values()) or 1
    table = Table(
        (
            Column("trit", left=True),
            Column("weights", spell="{:,}".format),
            Column("share", spell="{:.1%}".format),
        ),
        tuple((f"{trit:+d}" if trit else "0", n, n / total) for trit, n in counts.items()),
        title="trits",
    )
    chart = Chart(kind="bars", table=table, x="trit", y=("share",))
    facts = {"shape": "×".join(map(str, found.shape)), "zeros": f"{found.sparsity:.1%}"}
    return Page(title=found.name, sections=(Section("Trits", (chart,)),), facts=facts)
