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

from benchmarks.common import peak_memory, ratios, save
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="keep the result")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["delta", "scalar", "channel"])
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {kind: measure(kind, options) for kind in options.kinds}
    if options.json:
        setting = {name: getattr(options, name) for name in ("tokens", "layers", "rounds")}
        save("recurrent_states", {"setting": setting, "results": results})
        return
    for kind, result in results.items():
        print(kind, result)


if __name__ == "__main__":
    main()
