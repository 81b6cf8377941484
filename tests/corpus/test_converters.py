"""Folders of other tools hold the values of the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import trilens
from corpus_cases import tiny_store
from trilens.corpus import to_dictionary_learning, to_saelens
from trilens.errors import NotStoredError, UsageError, WriteError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> trilens.Store:
    folder = tmp_path_factory.mktemp("stores") / "store"
    return tiny_store(folder, sites=("resid_post", "attn.z"), dtype="bfloat16")


def test_saelens(store: trilens.Store, tmp_path: Path) -> None:
    folder = to_saelens(store, "resid_post", 1, tmp_path / "out", context_size=20)
    state = json.loads((folder / "state.json").read_text())
    (file,) = state["_data_files"]
    with pa.OSFile(str(folder / file["filename"])) as source, pa.ipc.open_stream(source) as stream:
        table = stream.read_all()
    name = "blocks.1.hook_resid_post"
    assert table.column_names == [name, "token_ids"]
    n = store.n_tokens // 20
    found = torch.tensor(table.column(name).to_pylist())
    wanted = store["resid_post", 1].to_torch(0, 20 * n).float()
    assert torch.equal(found, wanted.reshape(n, 20, -1))
    ids = torch.tensor(table.column("token_ids").to_pylist())
    assert torch.equal(ids.flatten(), store.token_ids_of(0, 20 * n).long())
    features = json.loads((folder / "dataset_info.json").read_text())["features"]
    assert features[name]["shape"] == [20, 64]
    extension = table.schema.field(name).metadata
    assert json.loads(extension[b"ARROW:extension:metadata"]) == [[20, 64], "float32"]
    with pytest.raises(UsageError, match="more than the store's"):
        to_saelens(store, "resid_post", 1, tmp_path / "x", context_size=10**6)


def test_dictionary_learning(store: trilens.Store, tmp_path: Path) -> None:
    folder = to_dictionary_learning(store, "attn.z", 0, tmp_path / "out", shard_tokens=80)
    config = json.loads((folder / "config.json").read_text())
    parts = []
    for number in range(config["shard_count"]):
        shape = tuple(json.loads((folder / f"shard_{number}.meta").read_text())["shape"])
        file = folder / f"shard_{number}.memmap"
        parts.append(np.memmap(file, dtype=np.float32, mode="r", shape=shape))
    assert sum(map(len, parts)) == config["total_size"] == store.n_tokens
    wanted = store["attn.z", 0].to_numpy().reshape(store.n_tokens, -1)
    np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_what_is_refused(store: trilens.Store, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    for convert in (to_saelens, to_dictionary_learning):
        with pytest.raises(NotStoredError):
            convert(store, "mlp.out", 0, tmp_path / "out")
        with pytest.raises(WriteError):
            convert(store, "resid_post", 0, tmp_path / "there")
