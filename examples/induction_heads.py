"""Induction heads: found by their pattern, knocked out, and the loss on repeats rises.

Run it whole, or cell by cell in an editor that knows `# %%`.
"""

# %% A model, and how long a stretch of random tokens is before it comes again
import numpy as np

import trilens
from trilens.edits import Ablate

lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
HALF = 40

# %% Which heads look at the token after the last occurrence of the current one?
scores: dict[tuple[int, int], float] = {}
for seed in range(8):
    text = trilens.repeated_tokens(lens, HALF, seed=seed)
    capture = lens.capture(text, attention=True, logits=None)
    for row in trilens.head_scores(capture).table():
        place = row["layer"], row["head"]
        scores[place] = scores.get(place, 0.0) + row["induction"] / 8
found = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
for layer, head in found:
    print(f"layer {layer} head {head}: induction score {scores[layer, head]:.2f}")

# %% The loss on the second half, whole and without some heads
texts = [trilens.repeated_tokens(lens, HALF, seed=100 + seed) for seed in range(16)]


def loss(heads: list[tuple[int, int]]) -> float:
    """Mean negative log-likelihood of the repeated tokens, in nats."""
    edits = [Ablate("attn.z", layers=layer, heads=head) for layer, head in heads]
    total = 0.0
    for capture in lens.capture_many(texts, batch_size=8, residual=None, edits=edits):
        logits = capture.logits[HALF:-1].log_softmax(-1)
        total -= float(logits.gather(1, capture.token_ids[HALF + 1 :, None]).mean())
    return total / len(texts)


whole = loss([])
rise = loss(found) - whole
print(f"loss {whole:.2f}; without the induction heads {whole + rise:.2f} (+{rise:.2f})")

# %% As many other heads, drawn ten times
rng = np.random.default_rng(0)
others = [place for place in scores if place not in found]
rises = []
for _ in range(10):
    picked = rng.choice(len(others), len(found), replace=False)
    rises.append(loss([others[i] for i in picked]) - whole)
print(f"without {len(found)} random heads: {np.mean(rises):+.2f} on average")
