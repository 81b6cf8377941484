"""Blocks of a stack that run on another number of positions than the stack gives."""

from __future__ import annotations

from dataclasses import replace

from trilens.errors import AnatomyError
from trilens.models.anatomy import Anatomy, chains
from trilens.models.trace import Trace, parent_path

__all__ = ["check_lengths"]


def check_lengths(trace: Trace, anatomy: Anatomy) -> None:
    """Refuse a stack that shortens its positions between two rows of attending blocks.

    Args:
        trace: of a probe of this stack alone.
        anatomy: the blocks that run on the number of positions that the stack gives.

    Raises:
        AnatomyError: blocks that attend run on another number.
    """
    own = parent_path(anatomy.blocks[0].path)
    lengths = {
        n
        for call in trace.calls
        if call.path.rpartition(".")[2].isdigit()
        for tensor in call.outputs[:1]
        if tensor.dim() == 3
        for n in tensor.shape[:2]
    }
    for length in sorted(lengths - {1, trace.seq}):
        for calls in chains(replace(trace, seq=length)):
            attends = [s for s in trace.attention if any(c.start < s.tick < c.end for c in calls)]
            parent = parent_path(calls[0].path)
            if len(calls) > 1 and len(attends) >= len(calls) and parent != own:
                raise AnatomyError(
                    f"the number of positions changes on the way: {parent} runs {len(calls)} "
                    f"blocks on {length} of them, {own} {anatomy.n_layers} on {trace.seq}; one row "
                    "of blocks on the same positions is needed"
                )
