"""What keeping recurrent states costs a capture, against the same capture without them.

Three kinds of recurrence, random weights, float32, as in `effective_attention`:

    delta    RWKV-7, width 768       scalar   Mamba-2, width 768       channel   Mamba, width 768

    last     the state after the last token
    several  the states after sixteen tokens

Ratios are within one round, medians over the rounds. `python -m benchmarks.recurrent_states --json`
keeps the result.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.common import main_of_kinds, peak_memory, ratios
from benchmarks.effective_attention import model
from trilens.lens.lens import Lens


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    lens = Lens(model(kind, options.layers).eval())
    ids = torch.randint(0, 4096, (1, options.tokens))
    places = tuple(range(0, options.tokens, -(-options.tokens // 16)))
    asked: dict[str, Any] = {"without": False, "last": True, "several": places}

    def capture(states: Any) -> Any:
        return lens.capture(ids, residual=None, logits="last", states=states)

    figures: dict[str, Any] = ratios(
        {name: lambda states=states: capture(states) for name, states in asked.items()},
        options.rounds,
    )
    for name, states in asked.items():
        with peak_memory() as memory:
            held = capture(states)
        figures[name]["peak_extra_mib"] = round(memory.extra_bytes / 2**20, 1)
        kept = held.states.nbytes if held.has("states") else 0
        figures[name]["states_mib"] = round(kept / 2**20, 2)
        del held
    return figures


if __name__ == "__main__":
    main_of_kinds(__doc__ or "", "recurrent_states", measure)
