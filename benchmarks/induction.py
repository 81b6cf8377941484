"""What the demo transformer loses on repeated random tokens without its induction heads.

Heads are found on eight texts by their weight on the token after the last occurrence of the
current one; the loss on the second half is measured on sixteen others, with the two found heads
ablated (zero), and with as many other heads, drawn twenty times.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.common import save
from trilens import Lens, head_scores, repeated_tokens
from trilens.demo import demo_path
from trilens.edits import Ablate

HALF = 40
FIND, MEASURE, DRAWS = range(8), range(100, 116), 20
HEADS = 2


def main() -> None:
    """Measure and keep."""
    lens = Lens.from_pretrained(demo_path("transformer"), dtype="float32")
    scores: dict[tuple[int, int], float] = {}
    for seed in FIND:
        capture = lens.capture(repeated_tokens(lens, HALF, seed=seed), attention=True, logits=None)
        for row in head_scores(capture).table():
            place = row["layer"], row["head"]
            scores[place] = scores.get(place, 0.0) + row["induction"] / len(FIND)
    found = sorted(scores, key=lambda place: -scores[place])[:HEADS]
    texts = [repeated_tokens(lens, HALF, seed=seed) for seed in MEASURE]

    def loss(heads: list[tuple[int, int]]) -> float:
        edits = [Ablate("attn.z", layers=layer, heads=head) for layer, head in heads]
        total = 0.0
        for capture in lens.capture_many(texts, batch_size=8, residual=None, edits=edits):
            logits = capture.logits
            assert logits is not None
            ids = capture.token_ids[HALF + 1 :]
            following = logits[HALF:-1].log_softmax(-1).gather(1, ids[:, None])
            total -= float(following.mean())
        return total / len(texts)

    whole, without = loss([]), loss(found)
    rng = np.random.default_rng(0)
    others = [place for place in scores if place not in found]
    rises = []
    for _ in range(DRAWS):
        drawn = rng.choice(len(others), HEADS, replace=False)
        rises.append(loss([others[int(i)] for i in drawn]) - whole)
    save(
        "induction",
        {
            "heads": {f"{layer}.{head}": round(scores[layer, head], 3) for layer, head in found},
            "loss_nats": round(whole, 3),
            "rise_without_them_nats": round(without - whole, 3),
            "rise_without_random_heads_nats": {
                "mean": round(float(np.mean(rises)), 3),
                "largest": round(float(np.max(rises)), 3),
            },
            "seeds": {"find": list(FIND), "measure": list(MEASURE), "draws": 0},
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    main()
