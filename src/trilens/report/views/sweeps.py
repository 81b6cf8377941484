"""Patching, edits and attribution as charts."""

from __future__ import annotations

from typing import Any

from trilens.analysis.direct_attribution import Attribution
from trilens.analysis.effect_sweep import EffectSweep
from trilens.analysis.patch_result import PatchSweep
from trilens.report.page import Block, Chart, Section
from trilens.report.tables import Column, Table
from trilens.report.views.attribution import attribution_table, attribution_title
from trilens.report.views.patching import patch_points, patch_way
from trilens.report.words import four_digits, signed

__all__ = ["attribution_sections", "effect_sections", "patch_sections"]


def patch_sections(found: PatchSweep) -> list[Section]:
    """Effects by layer and place."""
    table = patch_points(found)
    column = "head" if found.by == "head" else "position"
    chart = Chart(
        kind="heatmap",
        table=table,
        x=column,
        row="layer",
        y=("effect",),
        label="" if found.by == "head" else "token",
        diverging=True,
        width="full",
        words="1: this patch alone brings the whole difference; 0: none of it.",
    )
    return [Section("Effect of each patch", (chart,), patch_way(found), name="effects")]


def effect_sections(found: EffectSweep) -> list[Section]:
    """Effects by layer, and by head or scale."""
    rows = found.table()
    names = [name for name in rows[0] if name not in {"value", "effect"}] if rows else []
    keys = [Column(name, spell=_plain) for name in names]
    table = Table(
        (
            *keys,
            Column("metric", note="with this edit", spell=four_digits),
            Column("effect", note="what the edit adds to the metric", spell=signed),
        ),
        tuple((*(row[name] for name in names), row["value"], row["effect"]) for row in rows),
        title=found.title,
        keys=len(keys),
    )
    other = next((name for name in names if name != "layer"), "")
    chart: Block = (
        Chart(kind="heatmap", table=table, x=other, row="layer", y=("effect",), diverging=True)
        if other
        else Chart(kind="bars", table=table, x="layer", y=("effect",))
    )
    words = (f"Metric without edits: {found.base:.4f}, the mean over {found.n_prompts} prompts.",)
    return [Section("Effect of each edit", (chart,), words, name="effects")]


def attribution_sections(found: Attribution) -> list[Section]:
    """What each part adds: bars, or a heatmap of layers and heads."""
    table = attribution_table(found)
    named = [
        (_part_name(part.component, part.layer, part.index), part.value) for part in found.parts
    ]
    columns = (
        Column("part", left=True),
        Column("adds", note="to the logit, or to the difference", spell=signed),
    )
    whole = (("sum", found.total), ("the model's own", found.logit_difference))
    bars = Table(columns, (*named, *whole), title="what each part adds")
    blocks: list[Block] = []
    if found.by == "head":
        rows = tuple(
            (part.layer, part.index, part.value)
            for part in found.parts
            if part.component == "attn.head"
        )
        heads = Table((Column("layer"), Column("head"), columns[1]), rows, title="by head", keys=2)
        blocks.append(
            Chart(kind="heatmap", table=heads, x="head", row="layer", y=("adds",), diverging=True)
        )
    blocks.append(Chart(kind="bars", table=bars, x="part", y=("adds",)))
    words = (attribution_title(found),)
    return [Section("What each part adds", (*blocks, table), words, name="attribution")]


def _part_name(component: str, layer: int | None, index: int | None) -> str:
    name = component if layer is None else f"{layer} {component}"
    return name if index is None else f"{name} {index}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
