"""Why no chain of blocks leads to the last hidden state, in words of the model's code."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trilens.errors import AnatomyError, SeveralStreamsError
from trilens.io.messages import listed
from trilens.models.chain import Chain, chains_of
from trilens.models.trace import ModuleCall, Trace, parent_path

__all__ = ["why_not"]


def why_not(trace: Trace, chains: list[Chain]) -> AnatomyError:
    """The error for a trace in which no blocks were found, or none that lead to its end.

    Args:
        trace: what a probe of the model did.
        chains: the chains of blocks, none of which leads to the last hidden state.
    """
    if chains:
        return _not_rebuilt(trace, max(chains, key=lambda chain: len(chain.calls)))
    others = [chain for chain in chains_of(trace, _holds_other_rows) if len(chain.calls) > 1]
    for parent, length in _runs_of_other_length(trace, others):
        return AnatomyError(
            f"the blocks in {parent} run over {length} positions for {trace.seq} tokens: the model "
            "adds, repeats, pads or merges positions, so that a row of its residual stream is "
            "no token of the prompt"
        )
    rows = [(parent, calls) for parent, calls in _numbered(trace).items() if len(calls) > 1]
    turned = [parent for parent, calls in rows if _is_turned(calls[0], trace.seq)]
    if turned:
        return AnatomyError(
            f"the blocks in {turned[0]} hand on channels before positions, [1, d_model, "
            f"{trace.seq}]: a residual stream has its tokens first"
        )
    lists = [parent for parent, calls in rows if _gives_rows(calls[0], trace.seq)]
    if len(lists) > 1:
        return AnatomyError(
            f"no chain of blocks: a layer is spread over sibling lists ({listed(lists, 4)}), and "
            "no one module is a block whose output is the next one's input"
        )
    return AnatomyError(
        "no chain of blocks: there are no sibling modules whose outputs "
        f"[1, {trace.seq} tokens, d_model] are each the next one's input"
    )


def _not_rebuilt(trace: Trace, chain: Chain) -> AnatomyError:
    kind = SeveralStreamsError if chain.last.dim() == 4 else AnatomyError
    end = chain.calls[-1]
    beside = next((call.path for call in trace.calls if _mixes(call, chain)), None)
    why = (
        "no modules that read it alone lead from one to the other"
        if beside is None
        else f"{beside} reads the outputs of earlier blocks beside it, so that no readout of one "
        "block's output is there"
    )
    return kind(f"the last hidden state could not be rebuilt from {end.path}'s output: {why}")


def _mixes(call: ModuleCall, chain: Chain) -> bool:
    """Whether a module reads the last block's output, and several tensors like it at once."""
    last = chain.last
    if call.start < chain.calls[-1].end:
        return False
    floats = [tensor for tensor in call.read if tensor.is_floating_point()]
    reads = any(tensor.shape == last.shape for tensor in floats)
    several = any(
        tensor.dim() == last.dim() + 1 and tensor.shape[-1] == last.shape[-1] for tensor in floats
    )
    return reads and several


def _runs_of_other_length(trace: Trace, chains: list[Chain]) -> Iterator[tuple[str, int]]:
    """Parents of blocks, and over how many positions they run: more than the prompt has tokens."""
    for chain in sorted(chains, key=lambda chain: -len(chain.calls)):
        yield parent_path(chain.calls[0].path), int(chain.last.shape[1])
    for parent, calls in _numbered(trace).items():
        shapes = {tuple(call.made[0].shape) for call in calls}
        if len(calls) > 1 and len(shapes) == 1:
            shape = shapes.pop()
            if len(shape) == 3 and shape[0] == 1 and shape[1] > trace.seq != shape[2]:
                yield parent, shape[1]


def _numbered(trace: Trace) -> dict[str, list[ModuleCall]]:
    """The outermost numbered siblings that give floating-point tensors, by their parent."""
    found: dict[str, list[ModuleCall]] = {}
    for call in trace.calls:
        parent, _, name = call.path.rpartition(".")
        inner = any(part.isdigit() for part in parent.split("."))
        if name.isdigit() and not inner and call.made and call.made[0].is_floating_point():
            found.setdefault(parent, []).append(call)
    return found


def _is_turned(call: ModuleCall, seq: int) -> bool:
    shape = tuple(call.made[0].shape)
    return len(shape) == 3 and shape[0] == 1 and shape[2] == seq != shape[1]


def _gives_rows(call: ModuleCall, seq: int) -> bool:
    return tuple(call.made[0].shape[:2]) == (1, seq)


def _holds_other_rows(tensor: Tensor, seq: int) -> bool:
    shape = tuple(tensor.shape)
    return tensor.is_floating_point() and len(shape) == 3 and shape[0] == 1 and shape[1] > seq
