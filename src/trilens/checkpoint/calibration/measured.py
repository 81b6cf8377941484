"""What one text says about the dense and the ternary model, from their residual streams."""

from __future__ import annotations

from collections.abc import Sequence

from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.options import Apart
from trilens.checkpoint.calibration.streams import Batch, Stream
from trilens.checkpoint.format.sample import SampleReport
from trilens.evaluation.output import OutputAccumulator

__all__ = ["measure_text"]


def measure_text(
    runner: BlockRunner,
    text: Apart,
    batches: Sequence[Batch],
    dense: Stream,
    ternary: Stream,
    shift: int,
) -> SampleReport:
    """Compare both models' predictions of a text, in float32.

    Args:
        runner: makes logits of residual streams.
        text: the text.
        batches: its blocks, where they stand in `dense`.
        dense: the dense model's residual stream after its last block.
        ternary: the ternary model's.
        shift: how far back the batches stand in `ternary`.

    Raises:
        NonFiniteError: a model gives NaN or infinities.

    Memory: the logits of a batch, twice.
    """
    found = OutputAccumulator()
    for batch in batches:
        before = runner.logits(batch.ids, dense.read(batch))
        after = runner.logits(batch.ids, ternary.read(Batch(batch.ids, batch.start - shift)))
        for row in zip(before, after, batch.ids, strict=True):
            found.add(*row)
    result = found.result()
    assert result.perplexity_before is not None and result.perplexity_after is not None
    return SampleReport(
        text.name,
        result.n_tokens,
        result.perplexity_before,
        result.perplexity_after,
        max(batch.ids.shape[1] for batch in batches),
        text.own_kind,
        result.kl_nats_mean,
        result.same_top1,
    )
