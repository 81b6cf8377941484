"""A linear probe: from which layer on does the model know that a bracket is open?"""

# %% Prompts that end inside a bracket, and prompts that do not
import itertools

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import trilens

lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
NAMES = ["name", "value", "path", "index", "text", "line"]
opened = [f"x = f({a}, {b}" for a, b in itertools.permutations(NAMES, 2)]
closed = [f"x = f({a}) + {b}" for a, b in itertools.permutations(NAMES, 2)]
labels = np.repeat([1, 0], [len(opened), len(closed)])

# %% One matrix: [prompt, layer, d_model], of each prompt's last token
features = lens.stack([*opened, *closed], site="resid_post", position=-1).numpy()
print("features", features.shape)

# %% Five-fold accuracy of a logistic regression, layer by layer
for layer in range(lens.n_layers):
    probe = LogisticRegression(max_iter=2000, C=0.01)
    accuracy = cross_val_score(probe, features[:, layer], labels, cv=5).mean()
    print(f"layer {layer}: accuracy {accuracy:.2f}")
