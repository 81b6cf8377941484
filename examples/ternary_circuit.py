"""The same circuit before and after the weights become ternary: which edges survive?"""

# %% A ternary model beside its source
import tempfile
from pathlib import Path

import numpy as np
import torch

import trilens
from trilens.edits import Knockout

source = trilens.demo_path("transformer")
folder = tempfile.TemporaryDirectory()
ternary = Path(folder.name) / "ternary"
trilens.ternarize(source, ternary, plan=trilens.TernaryPlan(rule="exact", group_size=128))
lenses = {
    "before": trilens.Lens.from_pretrained(source, dtype="float32"),
    "after": trilens.Lens.from_pretrained(ternary, dtype="float32"),
}

# %% The edges of induction: from a repeated token to the one after its first occurrence
HALF = 24
generator = torch.Generator().manual_seed(1)
once = torch.randint(10, lenses["before"].model.config.vocab_size, (HALF,), generator=generator)
ids = torch.cat([once, once])
QUERIES = range(HALF, 2 * HALF - 1)


def edges(lens: trilens.Lens) -> np.ndarray:
    """Mean weight on the induction edges, [layers, heads]."""
    attention = lens.capture(ids, attention=True, logits=None).attention
    steps = torch.arange(HALF - 1)
    return np.stack(
        [
            attention.pattern(layer).rows(QUERIES)[:, steps, steps + 1].mean(-1).numpy()
            for layer in attention.layers
        ]
    )


before, after = (edges(lens) for lens in lenses.values())
for place in np.argsort(-before.ravel())[:4]:
    layer, head = divmod(int(place), before.shape[1])
    print(f"layer {layer} head {head}: weight {before[layer, head]:.2f} → {after[layer, head]:.2f}")

# %% What the edges do: cut them, and see how much less the repeat is expected
target = int(ids[HALF + 10])


def drop(lens: trilens.Lens, layer: int, head: int) -> float:
    """By how many nats cutting one edge makes the repeated token less likely."""
    position, key = HALF + 9, 10
    cut = Knockout(layers=layer, heads=head, queries=position, keys=key)
    whole, without = (
        lens.capture(ids, residual=None, edits=edits).logits[position].log_softmax(-1)[target]
        for edits in ((), cut)
    )
    return float(whole - without)


strongest = np.argsort(-before.ravel())[:3]
for place in strongest:
    layer, head = divmod(int(place), before.shape[1])
    values = [drop(lens, layer, head) for lens in lenses.values()]
    print(f"layer {layer} head {head}: cutting it costs {values[0]:.2f} → {values[1]:.2f} nats")
folder.cleanup()
