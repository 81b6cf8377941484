"""Blocks in which several modules attend: LongCat has two attentions and two MLPs in one block."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trilens.models.trace import AttentionSite, ModuleCall, Trace

__all__ = ["attend_over_same", "attention_parts"]


def attend_over_same(inside: Sequence[AttentionSite]) -> bool:
    """Whether several modules attend, each once, over the same tokens."""
    sizes = {(site.seq_q, site.seq_k) for site in inside}
    return len(sizes) == 1 and len({site.path for site in inside}) == len(inside)


def attention_parts(
    trace: Trace, calls: Sequence[ModuleCall], attention: Collection[int]
) -> dict[int, tuple[str, ...]]:
    """The modules that attend, in the layers where several do."""
    found: dict[int, tuple[str, ...]] = {}
    for layer in attention:
        inside = trace.attention_in(calls[layer])
        paths = tuple(dict.fromkeys(site.path for site in inside))
        if len(paths) > 1:
            found[layer] = paths
    return found
