"""A linear probe from class means: two classes of documents, told apart by their means alone."""

# %% Two classes of labelled documents, and their means in one pass
import tempfile
from pathlib import Path

import torch

import trilens
from trilens.corpus import CorpusDocument

NAMES = ["name", "value", "path", "index", "text", "line", "key", "item"]
pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
documents = [
    CorpusDocument(content, f"pair {number}", label)
    for number, (a, b) in enumerate(pairs)
    for label, content in (("open", f"x = f({a}, {b}"), ("closed", f"x = f({a}) + {b}"))
]
folder = tempfile.TemporaryDirectory()
store = trilens.capture_corpus(
    trilens.demo_path("transformer"),
    documents,
    Path(folder.name) / "store",
    options=trilens.StoreOptions(dtype="float32", reduce=("class_means",)),
)
print(store)

# %% The direction between the means, and the middle between them as threshold
accuracies = []
for site, layer in store:
    means = store.reduced["class_means", site, layer]
    direction = means.difference("open", "closed").float()
    middle = means.last_means.mean(0).float()
    last = torch.stack([values[-1] for values in store[site, layer].documents()]).float()
    is_open = torch.tensor([store.label(n) == "open" for n in range(store.n_documents)])
    found = (last - middle) @ direction > 0
    accuracies.append(float((found == is_open).float().mean()))
    print(f"{site} of layer {layer}: accuracy {accuracies[-1]:.2f}")
folder.cleanup()
