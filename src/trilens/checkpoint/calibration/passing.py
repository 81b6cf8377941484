"""Let a model run with blocks that hand on what they are told, and stop at one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trilens.checkpoint.calibration.handover import Made

__all__ = ["Passed", "Reached", "passing"]

Passed = tuple[Made, Sequence[Tensor]]
"""The form of what a block hands on, and the tensors."""


class Reached(Exception):  # noqa: N818 - no error
    """A block was reached: the arguments it would have got."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_given, self.kwargs = args, kwargs


@contextmanager
def passing(
    blocks: Sequence[nn.Module],
    made: Callable[[int], Passed],
    stop: int | None = None,
    seen: Callable[[int, Any], None] = lambda _step, _nest: None,
) -> Iterator[None]:
    """Replace the blocks' computation for the length of the context.

    Args:
        blocks: in the order in which they run, one that runs several times as often.
        made: what each hands on, by its place.
        stop: the place of the block whose call raises `Reached`.
        seen: told of each call before it.
    """
    at = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal at
        step, at = at, at + 1
        if step == stop:
            raise Reached(args, kwargs)
        seen(step, (args, kwargs))
        template, tensors = made(step)
        return template.put((args, kwargs), tensors)

    distinct = list({id(block): block for block in blocks}.values())
    for block in distinct:
        block.forward = forward
    try:
        yield
    finally:
        for block in distinct:
            block.__dict__.pop("forward", None)
