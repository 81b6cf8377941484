"""A sparse autoencoder, trained from a store of activations, and what its features fire on."""

# %% The residual stream of a whole text, on disk
import tempfile
from pathlib import Path

import torch

import trilens

MODEL, SITE, LAYER = trilens.demo_path("transformer"), "resid_post", 2
WIDTH, ACTIVE, EPOCHS, BATCH = 1024, 24, 6, 512
folder = tempfile.TemporaryDirectory()
options = trilens.StoreOptions(sites=(SITE,), layers=(LAYER,), max_tokens=24_000, reduce=("mean",))
store = trilens.capture_corpus(MODEL, "stdlib", Path(folder.name) / "store", options=options)
print(store)
values = store[SITE, LAYER]
moments = store.reduced["mean", SITE, LAYER]
mean, scale = moments.mean.float(), float(moments.variance.sum().sqrt())

# %% Encoder and decoder; of each token the ACTIVE largest features
torch.manual_seed(0)
d_model = values.shape[1]
decoder = torch.nn.functional.normalize(torch.randn(WIDTH, d_model), dim=1).requires_grad_()
encoder = decoder.detach().T.clone().requires_grad_()
bias = torch.zeros(WIDTH, requires_grad=True)
optimizer = torch.optim.Adam([encoder, decoder, bias], lr=1e-3)


def features(x: torch.Tensor) -> torch.Tensor:
    """Activations of the features, [tokens, WIDTH], nearly all of them 0."""
    found = torch.relu(x @ encoder + bias)
    top = found.topk(ACTIVE)
    return torch.zeros_like(found).scatter(1, top.indices, top.values)


# %% Every epoch gives each token once, in another order
for epoch in range(EPOCHS):
    error = 0.0
    for batch in values.iter_batches(BATCH, shuffle=epoch):
        x = (batch.values.float() - mean) / scale
        loss = (features(x) @ decoder - x).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        error += float(loss.detach()) * len(batch)
    explained = 1 - error / store.n_tokens
    print(f"epoch {epoch}: {explained:.1%} of the variance explained")

# %% Tokens on which the most used features are largest
tokenizer = trilens.Lens.from_pretrained(MODEL).tokenizer
with torch.no_grad():
    some = features((values.to_torch(0, 8000).float() - mean) / scale)
active = (some > 0).sum(0)
print(f"{int((active > 0).sum())} of {WIDTH} features are in use")
for feature in active.argsort(descending=True)[20:26].tolist():
    places = some[:, feature].topk(5).indices.tolist()
    words = [tokenizer.decode(store.token_ids_of(max(0, at - 3), at + 1)) for at in places]
    print(f"feature {feature}: {words}")
folder.cleanup()
