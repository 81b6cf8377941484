"""Everything about attention at 4,096 tokens: 12 layers × 12 heads, all layers captured.

Capture, then for the last position the row, the column and the top ten of every layer, and the
entropy of every head, against the plain SDPA forward. The floor is one more pass over q and k per
layer: what the forward's own attention costs, without the values.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.common import llama_88m, paired, peak_memory, save
from trilens import Lens

ROUNDS = 3


def main(tokens: int = 4096) -> None:
    """Measure and keep."""
    model = llama_88m(tokens)
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)

    def plain() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def everything() -> None:
        attention = lens.capture(ids, attention=True).attention
        assert attention is not None
        for layer in attention.layers:
            attention.attention_from_position(layer, tokens - 1)
            attention.attention_to_position(layer, tokens - 1)
            attention.top_attended_positions(layer, tokens - 1, 10)
            attention.entropy(layer)

    def one_row() -> None:
        attention = captured.attention
        assert attention is not None
        for layer in attention.layers:
            attention.attention_from_position(layer, tokens - 1)

    plain()
    everything()
    with peak_memory() as before:
        plain()
    with peak_memory() as after:
        everything()
    captured = lens.capture(ids, attention=True)
    medians = paired({"plain": plain, "everything": everything, "one row": one_row}, ROUNDS)
    extra = (after.extra_bytes - before.extra_bytes) / 1e6
    save(
        "long_attention",
        {
            "tokens": tokens,
            "ratio_to_plain": {k: round(v / medians["plain"], 4) for k, v in medians.items()},
            "plain_seconds": medians["plain"],
            "peak_extra_mb": {
                "plain": round(before.extra_bytes / 1e6, 1),
                "everything": round(after.extra_bytes / 1e6, 1),
                "over_plain": round(extra, 1),
            },
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
