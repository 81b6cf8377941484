"""The loader gives every token once, in an order that a seed fixes, from any position."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
import torch

import trilens
from corpus_cases import id_documents, tiny_store
from trilens.errors import NotStoredError, UsageError, ValueRangeError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> trilens.Store:
    folder = tmp_path_factory.mktemp("stores") / "store"
    documents = id_documents(100, longest=60)
    return tiny_store(folder, documents, sites=("resid_pre", "resid_post"), shard_tokens=600)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("size", [7, 64, 100, 10**6])
def test_an_epoch_is_exact(store: trilens.Store, seed: int | None, size: int) -> None:
    key = ("resid_post", 1)
    whole = store[key].to_torch()
    seen = []
    for batch in store[key].iter_batches(size, shuffle=seed, buffer_tokens=700):
        assert len(batch) == size or batch.position == store.n_tokens
        assert torch.equal(batch.values, whole[batch.tokens])
        seen += batch.tokens.tolist()
    assert sorted(seen) == list(range(store.n_tokens))
    assert (seen == sorted(seen)) == (seed is None)


def test_a_seed_is_an_order(store: trilens.Store) -> None:
    def order(seed: int) -> list[int]:
        batches = store.iter_batches(64, shuffle=seed, buffer_tokens=640)
        return torch.cat([batch.tokens for batch in batches]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    # Mixed: neighbours of the corpus rarely stay neighbours.
    found = order(1)
    neighbours = sum(b - a == 1 for a, b in itertools.pairwise(found))
    assert neighbours < 0.02 * len(found)


@pytest.mark.parametrize("seed", [None, 3])
def test_any_position_can_be_gone_on_from(store: trilens.Store, seed: int | None) -> None:
    options = {"shuffle": seed, "buffer_tokens": 512}
    whole = list(store.iter_batches(128, **options))
    for stop in range(0, len(whole), 3):
        rest = list(store.iter_batches(128, start=whole[stop].position, **options))
        assert [b.tokens.tolist() for b in rest] == [b.tokens.tolist() for b in whole[stop + 1 :]]
    assert list(store.iter_batches(128, start=store.n_tokens, **options)) == []


def test_sites_come_together(store: trilens.Store) -> None:
    keys = [("resid_pre", 1), ("resid_post", 1)]
    for batch in store.iter_batches(50, sites=keys, shuffle=0):
        assert list(batch.by_site) == keys
        for key in keys:
            assert torch.equal(batch.by_site[key], store[key][batch.tokens])


def test_what_is_refused(store: trilens.Store) -> None:
    with pytest.raises(NotStoredError, match=r"mlp\.out"):
        store.iter_batches(8, sites=[("mlp.out", 0)])
    with pytest.raises(UsageError, match="no site was named"):
        store.iter_batches(8, sites=[])
    for options in ({"batch_tokens": 0}, {"shuffle": -1}, {"buffer_tokens": 0}):
        with pytest.raises(ValueRangeError):
            store.iter_batches(**{"batch_tokens": 8, **options})


def test_a_store_goes_to_another_process(store: trilens.Store, tmp_path: Path) -> None:
    list(store.iter_batches(64))
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again["resid_post", 0][7], store["resid_post", 0][7])
