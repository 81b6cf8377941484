"""State knockouts: which token's write to a recurrent state does the next word depend on?"""

# %% Two recurrent models, one prompt
import torch

import trilens
from trilens.edits import Knockout

PROMPT = "def total(price, tax):\n    return price +"
largest = {}
for name in ("rwkv7", "mamba"):
    lens = trilens.Lens.from_pretrained(trilens.demo_path(name), dtype="float32")
    whole = lens.capture(PROMPT, residual=None)
    before = whole.logits[-1].log_softmax(-1)
    print(f"{name}: {lens.tokenizer.decode([int(before.argmax())])!r} follows")

    # One token at a time writes nothing into the state of any layer
    effects = []
    for position in range(len(whole.tokens) - 1):
        cut = Knockout(keys=[position])
        after = lens.capture(PROMPT, residual=None, edits=cut).logits[-1].log_softmax(-1)
        effects.append(float((before.exp() * (before - after)).sum()))
    order = torch.tensor(effects).argsort(descending=True)[:4].tolist()
    for position in order:
        print(f"  without {whole.tokens[position]!r}: KL {effects[position]:.3f} nats")
    largest[name] = effects[order[0]]
