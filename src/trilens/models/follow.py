"""Where a tensor of a probe goes: through modules that read nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trilens.models.trace import ModuleCall, Trace, same

__all__ = ["way", "ways"]

_LONGEST_WAY = 4


def way(trace: Trace, tensor: Tensor, after: int) -> Iterator[tuple[tuple[str, ...], Tensor, int]]:
    """Follow a tensor through modules that read nothing else, outermost modules first.

    Yields:
        The paths so far, what the last of them gave, and the tick at which it ended.
    """
    path: tuple[str, ...] = ()
    while len(path) < _LONGEST_WAY:
        later = (call for call in trace.calls if call.start > after and call.outputs)
        step = next((call for call in later if _reads(call, tensor)), None)
        if step is None or not _reads_only(step, tensor):
            return
        path = (*path, step.path)
        tensor, after = step.outputs[0], step.end
        yield path, tensor, after


def ways(trace: Trace, tensor: Tensor, after: int) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Each way that begins at a reader of a tensor: a pooler may read it before the head does."""
    for first in (c for c in trace.calls if c.start > after and c.outputs and _reads(c, tensor)):
        if _reads_only(first, tensor):
            yield (first.path,), first.outputs[0]
            for path, output, _ in way(trace, first.outputs[0], first.end):
                yield (first.path, *path), output


def _reads(call: ModuleCall, tensor: Tensor) -> bool:
    return any(_is_read_as(item, tensor) for item in call.inputs)


def _reads_only(call: ModuleCall, tensor: Tensor) -> bool:
    return all(_is_read_as(item, tensor) for item in call.inputs if item.is_floating_point())


def _is_read_as(item: Tensor, tensor: Tensor) -> bool:
    """The tensor itself, or cast: Mamba keeps a float32 stream under half-precision weights."""
    cast = tensor if item.dtype == tensor.dtype else tensor.to(item.dtype)
    return item.is_floating_point() and same(item, cast)
