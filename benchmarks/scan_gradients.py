"""Gradients through a Mamba's loop over tokens: as torch takes them, and with steps read once.

One prompt of the Mamba demo, gradients of a logit at every resid_post; seconds, median of three
rounds in turn, and the ratio. The gradients are equal.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from unittest.mock import patch

import torch
import transformers

from benchmarks.common import save
from trilens import Lens
from trilens.demo import demo_path

ROUNDS = 3


def seconds(lens: Lens, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Of one run forward and back, and what it found."""
    began = time.perf_counter()
    found = lens.gradients(ids, lambda logits: logits[-1, 7], sites=["resid_post"])
    return time.perf_counter() - began, found.gradients["resid_post", 0]


def main() -> None:
    """Measure, print and keep."""
    transformers.logging.set_verbosity_error()
    lens = Lens.from_pretrained(str(demo_path("mamba")))
    figures: dict[str, dict[str, float]] = {}
    for length in (128, 256, 512):
        ids = torch.randint(1, 2000, (length,), generator=torch.Generator().manual_seed(0))
        taken: dict[str, list[float]] = {"plain": [], "steps": []}
        for _ in range(ROUNDS):
            spent, found = seconds(lens, ids)
            taken["steps"].append(spent)
            with patch("trilens.lens.gradients.StepReads", nullcontext):
                spent, plain = seconds(lens, ids)
            taken["plain"].append(spent)
            if not torch.equal(found, plain):
                raise SystemExit(f"{length} tokens: other gradients")
        middle = {name: statistics.median(each) for name, each in taken.items()}
        figures[f"{length} tokens"] = {
            "plain_s": round(middle["plain"], 2),
            "steps_s": round(middle["steps"], 2),
            "ratio": round(middle["plain"] / middle["steps"], 1),
        }
        print(length, figures[f"{length} tokens"], flush=True)
    save("scan_gradients", figures)


if __name__ == "__main__":
    main()
