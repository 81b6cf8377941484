"""Induction heads: found by their pattern, knocked out, and the loss on repeats rises.

Run it whole, or cell by cell in an editor that knows `# %%`.
"""

# %% A text of random tokens, twice
import numpy as np
import torch

import trilens
from trilens.edits import Ablate

lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
HALF = 40
VOCAB = lens.model.config.vocab_size


def repeated(seed: int) -> torch.Tensor:
    """Random tokens [2 · HALF]: the second half is the first once more."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(10, VOCAB, (HALF,), generator=generator)
    return torch.cat([once, once])


# %% Which heads look at the token after the last occurrence of the current one?
HEADS = lens.model.config.num_attention_heads
scores = np.zeros((lens.n_layers, HEADS))
for seed in range(8):
    attention = lens.capture(repeated(seed), attention=True, logits=None).attention
    for layer in attention.layers:
        for head in range(HEADS):
            row = attention.pattern(layer).rows(range(HALF, 2 * HALF - 1), head)[0]
            after = torch.arange(1, HALF)
            scores[layer, head] += float(row[torch.arange(HALF - 1), after].mean()) / 8
order = np.argsort(-scores.ravel())[:2]
found = [(int(i) // HEADS, int(i) % HEADS) for i in order]
for layer, head in found:
    print(f"layer {layer} head {head}: induction score {scores[layer, head]:.2f}")

# %% The loss on the second half, whole and without some heads
texts = [repeated(100 + seed) for seed in range(16)]


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
others = [(i, j) for i in range(lens.n_layers) for j in range(HEADS) if (i, j) not in found]
rises = []
for _ in range(10):
    picked = rng.choice(len(others), len(found), replace=False)
    rises.append(loss([others[i] for i in picked]) - whole)
print(f"without {len(found)} random heads: {np.mean(rises):+.2f} on average")
