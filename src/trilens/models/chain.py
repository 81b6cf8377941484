"""Runs of blocks in a probe: sibling modules, each one's output the next one's input.

A model may run its stacks several times (hierarchical recurrence): then the runs follow each other,
and each begins with a sum of what earlier ones gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from trilens.models.final_norm import carried
from trilens.models.follow import way
from trilens.models.trace import ModuleCall, Trace, parent_path, same

__all__ = ["Chain", "chains_of", "rounds_of"]

_Holds = Callable[[Tensor, int], bool]


@dataclass(frozen=True, slots=True)
class Chain:
    """Calls of blocks in their order.

    Attributes:
        output_index: of each call, which of its outputs is the stream.
        starts: numbers of the calls that begin another round.
    """

    calls: tuple[ModuleCall, ...]
    output_index: tuple[int, ...]
    starts: tuple[int, ...] = ()

    @property
    def last(self) -> Tensor:
        """What the last block hands on."""
        return self.calls[-1].outputs[self.output_index[-1]]

    @property
    def fact(self) -> str:
        """What links the blocks, in words."""
        first = parent_path(self.calls[0].path) or "the model"
        linked = "each block's output is the next one's input, bit for bit"
        if not self.starts:
            return f"{len(self.calls)} blocks in {first}: {linked}"
        return (
            f"{len(self.calls)} runs of blocks in {len(self.starts) + 1} rounds: {linked}; each "
            "round begins with a sum of what earlier ones gave"
        )


def chains_of(trace: Trace, holds: _Holds) -> list[Chain]:
    """The sibling modules that run in one chain.

    Args:
        trace: the probe.
        holds: whether a tensor of a probe of so many tokens may be a stream.
    """
    groups = _groups(trace, holds)
    runs = [_runs(calls, trace.seq, holds) for calls in groups.values()]
    return [found[0] for found in runs if len(found) == 1]


def rounds_of(trace: Trace, holds: _Holds) -> Chain | None:
    """One chain of all rounds of a model that runs blocks several times; None where it is none."""
    runs = [
        run for calls in _groups(trace, holds).values() for run in _runs(calls, trace.seq, holds)
    ]
    calls = [call for run in runs for call in run.calls]
    runs = [run for run in runs if not any(each.encloses(run.calls[0]) for each in calls)]
    runs.sort(key=lambda run: run.calls[0].start)
    joined = tuple(call for run in runs for call in run.calls)
    repeats = len({call.path for call in joined}) < len(joined)
    if len(runs) < 2 or not repeats:
        return None
    for number, run in enumerate(runs[1:], 1):
        if run.calls[0].start < runs[number - 1].calls[-1].end:
            return None
        if not _is_of_earlier(run, runs[:number], trace):
            return None
    ends = [sum(len(run.calls) for run in runs[: number + 1]) for number in range(len(runs) - 1)]
    index = tuple(i for run in runs for i in run.output_index)
    return Chain(joined, index, tuple(ends))


def _groups(trace: Trace, holds: _Holds) -> dict[str, list[ModuleCall]]:
    """The calls of numbered sibling modules that give a stream, by their parent."""
    groups: dict[str, list[ModuleCall]] = {}
    for call in trace.calls:
        parent, _, name = call.path.rpartition(".")
        if name.isdigit() and any(holds(tensor, trace.seq) for tensor in call.outputs):
            groups.setdefault(parent, []).append(call)
    return groups


def _runs(calls: Sequence[ModuleCall], seq: int, holds: _Holds) -> list[Chain]:
    """The calls, cut wherever one's output is not the next one's input."""
    runs: list[list[ModuleCall]] = [[calls[0]]]
    index: list[list[int]] = [[]]
    for call, following in pairwise(calls):
        streams = [(i, t) for i, t in enumerate(call.outputs) if holds(t, seq)]
        linked = next((i for i, tensor in streams if carried(tensor, following) is not None), None)
        if linked is None or following.start < call.end:
            runs.append([following])
            index.append([])
        else:
            runs[-1].append(following)
            index[-1].append(linked)
    found = []
    for run, own in zip(runs, index, strict=True):
        outputs = run[-1].outputs
        fallback = next(i for i, t in enumerate(outputs) if holds(t, seq))
        own.append(own[-1] if own and own[-1] < len(outputs) else fallback)
        found.append(Chain(tuple(run), tuple(own)))
    return found


def _is_of_earlier(run: Chain, earlier: Sequence[Chain], trace: Trace) -> bool:
    """Whether a round begins with a sum of which an earlier round gave an operand."""
    given: list[Tensor] = []
    for each in earlier:
        given.append(each.last)
        given += [output for _, output, _ in way(trace, each.last, each.calls[-1].end)]
    first = run.calls[0]
    for each_sum in trace.sums:
        if each_sum.tick > first.start or not any(same(each_sum.result, x) for x in first.read):
            continue
        if any(same(side, made) for side in (each_sum.left, each_sum.right) for made in given):
            return True
    return False
