"""Gradients through a Mamba's loop over tokens: as torch takes them, and with steps read once.

One prompt of the Mamba demo, gradients of a logit at every resid_post; seconds, median of three
rounds in turn, and the ratio. The gradients are equal.
"""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch
import transformers

from benchmarks.common import paired, save
from trilens import Lens
from trilens.demo import demo_path

LENGTHS = (128, 256, 512)
ROUNDS = 3


def steps(lens: Lens, ids: torch.Tensor) -> torch.Tensor:
    """A gradient, from one run forward and back."""
    found = lens.gradients(ids, lambda logits: logits[-1, 7], sites=["resid_post"])
    return found.gradients["resid_post", 0]


def plain(lens: Lens, ids: torch.Tensor) -> torch.Tensor:
    """The same as torch takes it."""
    with patch("trilens.lens.gradients.reading_steps", lambda run: run()):
        return steps(lens, ids)


def main() -> None:
    """Measure, print and keep."""
    transformers.logging.set_verbosity_error()
    lens = Lens.from_pretrained(str(demo_path("mamba")))
    figures: dict[str, dict[str, float]] = {}
    for length in LENGTHS:
        ids = torch.randint(1, 2000, (length,), generator=torch.Generator().manual_seed(0))
        if not torch.equal(steps(lens, ids), plain(lens, ids)):
            raise SystemExit(f"{length} tokens: other gradients")
        runs = {"steps": partial(steps, lens, ids), "plain": partial(plain, lens, ids)}
        middle = paired(runs, ROUNDS)
        figures[f"{length} tokens"] = {
            "plain_s": round(middle["plain"], 2),
            "steps_s": round(middle["steps"], 2),
            "ratio": round(middle["plain"] / middle["steps"], 1),
        }
    save("scan_gradients", figures)


if __name__ == "__main__":
    main()
