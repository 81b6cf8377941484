"""Many edited runs of one prompt, a batch at a time: what sweeps are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from trilens.edits import Edit
from trilens.errors import MetricError
from trilens.lens.capture import Capture
from trilens.lens.gradients import Metric, scalar_of
from trilens.lens.lens import Lens
from trilens.models.tokens import PromptLike
from trilens.progress import Progress, Step

__all__ = ["measure", "measure_points", "prompt_again"]

Point = TypeVar("Point")


def measure(metric: Metric, capture: Capture) -> float:
    """A metric of the logits of one run.

    Raises:
        MetricError: no logits, or no finite scalar.
    """
    if capture.logits is None:
        raise MetricError("the model gives no logits: a metric of them has no value")
    return float(scalar_of(metric, capture.logits))


def prompt_again(lens: Lens, prompt: PromptLike, capture: Capture) -> PromptLike:
    """What gives a captured run again: its token ids, or the prompt that holds a source beside."""
    return prompt if lens.reads_source else capture.token_ids


def measure_points(
    lens: Lens,
    prompt: PromptLike,
    metric: Metric,
    points: Sequence[Point],
    edits_of: Callable[[Sequence[Point]], Sequence[Edit]],
    *,
    batch_size: int,
    what: str,
    progress: Progress | None = None,
    done: int = 0,
    total: int | None = None,
) -> list[float]:
    """A metric of one run for each point, with that point's edits; fewer where Ctrl-C ended it.

    Args:
        lens: the model.
        prompt: as `prompt_again` gives it.
        metric: of the logits [seq, vocab].
        points: what differs from run to run.
        edits_of: the edits of a batch of points; their positions are `PerPrompt`, an entry for
            each point.
        batch_size: points in one forward pass.
        what: how progress calls it.
        progress: called after each pass with the points done.
        done: points that were done before these.
        total: points in all, these where not given.
    """
    values: list[float] = []
    try:
        for start in range(0, len(points), batch_size):
            batch = points[start : start + batch_size]
            found = lens.capture_many(
                [prompt] * len(batch), batch_size=len(batch), residual=None, edits=edits_of(batch)
            )
            values += [measure(metric, capture) for capture in found]
            if progress is not None:
                progress(Step(done + len(values), total or len(points), what))
    except KeyboardInterrupt as stop:
        # What was run is worth keeping. A class of its own is another's request to end: it goes on.
        if type(stop) is not KeyboardInterrupt or not (values or done):
            raise
    return values
