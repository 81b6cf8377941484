"""Which layer and token carry a name: an exact patching sweep, and its twin by gradients."""

# %% Two prompts that differ in one name
import numpy as np
import torch

import trilens

lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
CLEAN = "def add(first, second):\n    return first +"
CORRUPTED = "def add(third, fourth):\n    return third +"
clean, corrupted = lens.capture(CLEAN), lens.capture(CORRUPTED)
right, wrong = (int(each.logits[-1].argmax()) for each in (clean, corrupted))
print("clean goes on with", repr(lens.tokenizer.decode([right])))
print("corrupted goes on with", repr(lens.tokenizer.decode([wrong])))


def metric(logits: torch.Tensor) -> torch.Tensor:
    """How much more the clean prompt's token is expected than the corrupted one's."""
    return logits[-1, right] - logits[-1, wrong]


# %% Clean values into the corrupted run, one layer and token at a time
exact = trilens.patch_sweep(lens, CLEAN, CORRUPTED, metric)
for row in exact.best(5):
    print(f"layer {row['layer']} {row['token']!r}: effect {row['effect']:.2f}")

# %% The same in two passes forward and one back
estimate = trilens.attribution_patch(lens, CLEAN, CORRUPTED, metric)
steps = trilens.integrated_gradients(lens, CLEAN, CORRUPTED, metric, steps=16)
there = ~np.isnan(exact.values)
for name, sweep in (("gradient", estimate), ("integrated gradients", steps)):
    rank = trilens.rank_correlation(exact.values[there], sweep.values[there])
    print(f"{name}: rank correlation with the exact sweep {rank:.2f}")

# %% Heads
heads = trilens.patch_sweep(lens, CLEAN, CORRUPTED, metric, site="attn.z", by="head")
for row in heads.best(3):
    print(f"layer {row['layer']} head {row['head']}: effect {row['effect']:.2f}")
