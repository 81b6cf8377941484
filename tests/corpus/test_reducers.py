"""Reducers over shards give what one pass over all values gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trilens
from corpus_cases import id_documents, tiny_lens, tiny_store
from trilens.corpus import CorpusDocument, Moments
from trilens.corpus.reducers import ContextReducer, MomentReducer, Rows
from trilens.errors import NonFiniteError, NotStoredError

KINDS = ("mean", "covariance", "class_means", "top_contexts", "gating", "attention")
DOCUMENTS = [
    CorpusDocument(ids, "", label=None if number == 3 else ("odd", "even")[number % 2 == 0])
    for number, ids in enumerate(id_documents(40))
]
KEY = ("resid_post", 1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[trilens.Store, trilens.Store]:
    """In many shards, and in one."""
    folder = tmp_path_factory.mktemp("stores")
    many = tiny_store(folder / "many", DOCUMENTS, reduce=KINDS, top_k=4)
    one = tiny_store(folder / "one", DOCUMENTS, reduce=KINDS, top_k=4, shard_tokens=10**6)
    assert len(many.manifest.shards) > 9
    assert len(one.manifest.shards) == 1
    return many, one


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = torch.as_tensor(wanted).double()
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def test_moments(stores: tuple[trilens.Store, ...]) -> None:
    for store in stores:
        values = store[KEY].to_torch().double()
        found: Moments = store.reduced["covariance", *KEY]
        assert found.count == store.n_tokens
        assert relative(found.mean, values.mean(0)) < 1e-6
        assert relative(found.covariance, values.T.cov(correction=0)) < 1e-6
        assert relative(found.second_moment, values.T @ values / len(values)) < 1e-6
        small = store.reduced["mean", *KEY]
        assert relative(small.variance, values.var(0, correction=0)) < 1e-6
        with pytest.raises(NotStoredError, match="covariances were not reduced"):
            small.second_moment


def test_many_shards_are_one(stores: tuple[trilens.Store, ...]) -> None:
    many, one = (store.reduced for store in stores)
    assert set(many) == set(one)
    for key in many:
        for name in ("mean", "variance", "means", "avg_gate", "values"):
            if hasattr(many[key], name):
                a, b = (torch.asarray(getattr(found[key], name)) for found in (many, one))
                # Batches differ, and so does the rounding of what went in.
                assert relative(a, b) < 2e-5, key


def test_class_means(stores: tuple[trilens.Store, ...]) -> None:
    store = stores[0]
    found = store.reduced["class_means", *KEY]
    assert found.labels == ("even", "odd")
    for number, label in enumerate(found.labels):
        chosen = [n for n, document in enumerate(DOCUMENTS) if document.label == label]
        assert {store.label(n) for n in chosen} == {label}
        parts = [store[KEY].document(n).double() for n in chosen]
        assert int(found.counts[number]) == sum(map(len, parts))
        assert int(found.last_counts[number]) == len(chosen)
        assert relative(found.means[number], torch.cat(parts).mean(0)) < 1e-6
        last = torch.stack([part[-1] for part in parts]).mean(0)
        assert relative(found.last_means[number], last) < 1e-6
    assert store.label(3) is None
    steering = found.difference("even", "odd")
    assert torch.equal(steering, found.last_means[0] - found.last_means[1])
    with pytest.raises(NotStoredError, match="label 'blue'"):
        found.difference("blue", "odd")


def test_top_contexts(stores: tuple[trilens.Store, ...]) -> None:
    store = stores[0]
    values = store[KEY].to_torch()
    found = store.reduced["top_contexts", *KEY]
    assert torch.equal(found.values, values.T.topk(4).values)
    assert torch.equal(values[found.tokens[5]][:, 5], found.values[5])
    documents, positions = store.locate(found.tokens)
    assert documents.shape == positions.shape == found.tokens.shape


def test_equal_values_keep_the_earlier_token() -> None:
    def rows(tokens: list[int]) -> Rows:
        n = len(tokens)
        at = torch.tensor(tokens)
        return Rows(torch.ones(n, 1), at, torch.full((n,), -1), torch.zeros(n, dtype=torch.bool))

    first, second = ContextReducer(1, 2), ContextReducer(1, 2)
    first.update(rows([7, 9, 8]))
    second.update(rows([5, 3]))
    first.absorb(second)
    assert first.tokens.tolist() == [[3, 5]]


def test_gating_is_the_accumulators(stores: tuple[trilens.Store, ...]) -> None:
    store = stores[0]
    for layer in (0, 1):
        tally = trilens.GatingAccumulator(0.1)
        for document in DOCUMENTS:
            ids = document.content
            for at in range(0, len(ids), 16):
                capture = tiny_lens().capture(ids[at : at + 16], gates=True, layers=[layer])
                tally.update(capture.gates.openness("mlp.gate", layer))
        found, wanted = store.reduced["gating", "mlp.gate", layer], tally.result()
        assert found.n_steps == wanted.n_steps == store.n_tokens
        np.testing.assert_allclose(found.avg_gate, wanted.avg_gate, rtol=1e-4)
    averages = [r for r in store.metrics().to_pylist() if r["metric"] == "gating.average"]
    assert [r["layer"] for r in averages] == [0, 1]
    assert averages[1]["value"] == pytest.approx(
        store.reduced["gating", "mlp.gate", 1].avg_gate.mean()
    )


def test_heads(stores: tuple[trilens.Store, ...]) -> None:
    store = stores[0]
    sums: dict[str, Any] = {}
    for document in DOCUMENTS:
        ids = document.content
        for at in range(0, len(ids), 16):
            attention = tiny_lens().capture(ids[at : at + 16], attention=True).attention
            for name, values in (
                ("entropy_nats", attention.entropy(1)),
                ("mean_distance_tokens", attention.mean_distance(1)),
                ("sink_mass", attention.sink_mass(1)),
            ):
                sums[name] = sums.get(name, 0) + values.astype(float).sum(1)
            weight = attention.get_layer(1)[0, :, :, 0].double().sum(1).numpy()
            sums["first_key_weight"] = sums.get("first_key_weight", 0) + weight
    found = store.reduced["attention", "attn.pattern", 1]
    assert found.count == store.n_tokens
    for name, total in sums.items():
        np.testing.assert_allclose(
            found[name].numpy(), total / store.n_tokens, rtol=1e-4, atol=1e-7
        )
    with pytest.raises(NotStoredError, match="is no statistic"):
        found["colour"]
    rows = store.metrics().to_pylist()
    entropies = [r["value"] for r in rows if (r["metric"], r["layer"]) == ("entropy_nats", 1)]
    assert entropies == found["entropy_nats"].tolist()


def test_reducers_alone(stores: tuple[trilens.Store, ...], tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "s", DOCUMENTS, reduce=("mean",), values=False)
    assert store.sites == ()
    assert store.nbytes < 0.2 * stores[0].nbytes
    wanted = stores[0].reduced["mean", *KEY]
    assert torch.equal(store.reduced["mean", *KEY].mean, wanted.mean)
    with pytest.raises(NotStoredError, match="reducers alone"):
        store[KEY]
    with pytest.raises(NotStoredError, match="was not reduced"):
        store.reduced["covariance", *KEY]
    with pytest.raises(NotStoredError, match="no reducers"):
        tiny_store(tmp_path / "t", [[1, 2, 3]]).reduced


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_keep_their_digits(offset: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(3000, 3, dtype=torch.float64) + offset
    whole, parts = MomentReducer(3, pairs=True), MomentReducer(3, pairs=True)
    about = torch.arange(3000), torch.full((3000,), -1), torch.zeros(3000, dtype=torch.bool)
    whole.update(Rows(values, *about))
    for start in range(0, 3000, 700):
        rows = slice(start, start + 700)
        part = MomentReducer(3, pairs=True)
        part.update(Rows(values[rows], *(each[rows] for each in about)))
        parts.absorb(MomentReducer.rebuilt(part.state()))
    assert parts.count == 3000
    assert relative(parts.squares, whole.squares) < 1e-9
    assert relative(whole.squares / 3000, values.T.cov(correction=0)) < 1e-6
    with pytest.raises(NonFiniteError):
        whole.update(Rows(values * torch.nan, *about))
