"""Everything about attention at 4,096 tokens: 12 layers × 12 heads, all layers captured.

Capture, then for the last position the row, the column and the top ten of every layer, and the
entropy of every head, against the plain SDPA forward. The floor is one more pass over q and k per
layer: what the forward's own attention costs, without the values.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks.common import llama_88m, peak_bytes, ratios, save
from trilens import Lens

ROUNDS = 3
# glibc raises its threshold for separate mappings as it runs, and aligned blocks in one heap leave
# holes; with a fixed threshold the figure is what the capture really holds.
ALLOCATORS = {
    "glibc default": {},
    "glibc, fixed mmap threshold": {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4194304"},
}


def main(tokens: int = 4096, only: str = "") -> None:
    """Measure and keep."""
    model = llama_88m(tokens)
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)

    def plain() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def everything() -> None:
        attention = lens.capture(ids, attention=True).attention
        for layer in attention.layers:
            attention.attention_from_position(layer, tokens - 1)
            attention.attention_to_position(layer, tokens - 1)
            attention.top_attended_positions(layer, tokens - 1, 10)
            attention.entropy(layer)

    def one_row() -> None:
        attention = captured.attention
        for layer in attention.layers:
            attention.attention_from_position(layer, tokens - 1)

    if only:
        plain()
        if only == "everything":
            everything()
        print(peak_bytes())
        return
    captured = lens.capture(ids, attention=True)
    runs = ratios({"plain": plain, "everything": everything, "one row": one_row}, ROUNDS)
    figures = {"tokens": tokens, "rounds": ROUNDS, "runs": runs}
    memory = {name: _over_plain(tokens, env) for name, env in ALLOCATORS.items()}
    save("long_attention", {**figures, "peak_over_plain_mb": memory})


def _over_plain(tokens: int, environment: dict[str, str]) -> float:
    """Peak memory of everything over that of the plain pass, in MB.

    Each in a process of its own: an allocator that has grown once hides the next peak.
    """
    peaks = []
    for only in ("plain", "everything"):
        command = [sys.executable, "-m", "benchmarks.long_attention", str(tokens), only]
        env = {**os.environ, **environment}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        peaks.append(int(done.stdout))
    return round((peaks[1] - peaks[0]) / 1e6, 1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096, *sys.argv[2:3])
