"""Which attention calls of a decoder's blocks look at what its encoder made of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.own_code import why_not_inline
from trilens.models.trace import AttentionSite, ModuleCall, Trace

__all__ = ["CrossAttention", "cross_attention", "source_in", "without_cross_attention"]


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Attention of a decoder's block to the source.

    Attributes:
        module: that computes it.
        product: of attention in the module's own code, which of its products gives the scores, -1
            for a fused function; None where it goes through the registry.
    """

    module: nn.Module
    product: int | None = None


def without_cross_attention(
    trace: Trace, source: int | None
) -> tuple[Trace, tuple[AttentionSite, ...]]:
    """A trace without the attention calls that look at the source's positions, and these calls.

    Args:
        trace: of a probe whose target is of another length than what its encoder gave.
        source: positions that the encoder gave; None for a model without one.
    """
    if source is None:
        return trace, ()
    crossing = (source, source + trace.seq)
    cross = tuple(
        site for site in trace.attention if site.seq_q == trace.seq and site.seq_k in crossing
    )
    ticks = {site.tick for site in cross}
    own = tuple(site for site in trace.attention if site.tick not in ticks)
    return replace(trace, attention=own, cross=cross), cross


def source_in(trace: Trace) -> int | None:
    """How many positions that are no tokens of the text are attended to; None where there are none.

    Of a model whose text attends to images beside it: all images together.
    """
    lengths = {site.seq_k for site in trace.attention if site.seq_q == trace.seq} - {trace.seq}
    return lengths.pop() if len(lengths) == 1 else None


def cross_attention(
    trace: Trace, sites: Sequence[AttentionSite], anatomy: Anatomy, source: int | None
) -> tuple[dict[int, CrossAttention], dict[int, str]]:
    """Per layer, its one cross attention call, where the pattern can be read.

    Args:
        trace: of the probe.
        sites: the attention calls whose keys are the source's positions.
        anatomy: the decoder's blocks.
        source: positions of the source; None for a model without one.

    Returns:
        What was found; and of other layers why there is none, in words.
    """
    if source is None:
        return {}, {}
    modules = {call.path: call.module for call in trace.calls}
    found: dict[int, CrossAttention] = {}
    reasons: dict[int, str] = {}
    for layer, call in enumerate(_calls(trace, anatomy)):
        inside = [site for site in sites if call.start < site.tick < call.end]
        joint = [site for site in inside if site.seq_k != source]
        unread = [site.key for site in inside if not site.readable]
        if unread:
            reasons[layer] = (
                f"attention implementation {unread[0]!r} gives neither weights nor arguments that "
                "can be read; load the model with attn_implementation='sdpa' or 'eager'"
            )
        elif joint:
            reasons[layer] = (
                f"{joint[0].path} attends to target and source in one softmax: it has no pattern "
                "of either alone"
            )
        elif len(inside) == 1:
            why = "" if inside[0].product is None else why_not_inline(inside[0])
            if why:
                reasons[layer] = why
            else:
                found[layer] = CrossAttention(modules[inside[0].path], inside[0].product)
        elif inside:
            paths = listed(site.path for site in inside)
            reasons[layer] = f"{len(inside)} cross attention calls in one block ({paths})"
        else:
            reasons[layer] = "no attention that can be followed looks at the source's positions"
    return found, reasons


def _calls(trace: Trace, anatomy: Anatomy) -> list[ModuleCall]:
    """The call of each block, of one that runs several times each in its turn."""
    modules = {id(block.module) for block in anatomy.blocks}
    return [call for call in trace.calls if id(call.module) in modules][: anatomy.n_layers]
