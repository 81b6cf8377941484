"""A store holds what single captures give, opens without its model, and notices damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import trilens
from corpus_cases import contents, id_documents, tiny_lens, tiny_store
from trilens.corpus.shards import batches
from trilens.errors import (
    CorruptFileError,
    ModelNotFoundError,
    NonFiniteError,
    NotStoredError,
    OutOfRangeError,
    SiteError,
    UnknownSiteError,
    UsageError,
    ValueRangeError,
)
from trilens.io.sealed import sealed

KEYS = (("resid_post", 0), ("resid_post", 1), ("attn.z", 0), ("attn.z", 1))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> trilens.Store:
    folder = tmp_path_factory.mktemp("stores") / "store"
    return tiny_store(folder, sites=("resid_post", "attn.z", "embed"))


def test_values_are_those_of_single_captures(store: trilens.Store) -> None:
    documents = id_documents()
    assert (store.n_documents, store.n_tokens) == (len(documents), sum(map(len, documents)))
    assert len(store.manifest.shards) > 2
    assert set(KEYS) | {("embed", None)} == set(store)
    for number, ids in enumerate(documents):
        assert store.token_ids(number).tolist() == ids
        windows = [ids[at : at + 16] for at in range(0, len(ids), 16)]
        single = [tiny_lens().capture(w, sites=["resid_post", "attn.z", "embed"]) for w in windows]
        for key in store:
            wanted = torch.cat([capture.sites[key] for capture in single])
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                store[key].document(number), wanted, rtol=0, atol=2e-5 * scale
            )


def test_axes_and_kinds_of_asking(store: trilens.Store) -> None:
    values = store["attn.z", 1]
    assert values.axes == ("token", "heads", "d_head")
    assert values.shape == (store.n_tokens, *values[0].shape)
    whole = values.to_torch()
    assert torch.equal(values[10:75], whole[10:75])  # across shards
    assert torch.equal(values[[70, 3, -1]], whole[[70, 3, -1]])
    assert torch.equal(values[-1], whole[-1])
    assert values[5:5].shape == (0, *whole.shape[1:])
    np.testing.assert_array_equal(np.asarray(values), whole.numpy())
    assert torch.equal(torch.cat(list(values.documents())), whole)
    assert torch.equal(store["blocks.1.attn.hook_z"][4], whole[4])
    table = values.to_arrow(60, 70)
    assert table.column_names == ["document", "position", "token_id", "values"]
    listed = torch.tensor(table.column("values").to_pylist())
    assert torch.equal(listed, whole[60:70].flatten(1))
    documents, positions = store.locate(torch.arange(60, 70))
    assert table.column("document").to_pylist() == documents.tolist()
    for row in range(10):
        ids = store.token_ids(int(documents[row]))
        assert ids[positions[row]] == table.column("token_id")[row].as_py()


def test_rows_are_mapped_and_never_written_back(store: trilens.Store) -> None:
    before = contents(store.folder)
    row = store["resid_post", 0][3]
    row.zero_()
    again = trilens.open_store(store.folder)
    assert torch.equal(store["resid_post", 0][3], torch.zeros_like(row))  # the same mapped page
    assert float(again["resid_post", 0][3].abs().max()) > 0
    assert contents(store.folder) == before


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        (("resid_post", 7), NotStoredError, "resid_post of layer 7 is not in this store: it holds"),
        (("mlp.out", 0), NotStoredError, "mlp.out of layer 0 is not in this store"),
        (("mlp.oat", 0), UnknownSiteError, "did you mean mlp.out"),
    ],
)
def test_what_is_not_stored(
    store: trilens.Store, key: tuple[str, int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        store[key]


def test_places_that_are_not_there(store: trilens.Store) -> None:
    values = store["resid_post", 0]
    for ask in (
        lambda: values[store.n_tokens],
        lambda: values.document(99),
        lambda: store.locate(torch.tensor([store.n_tokens])),
        lambda: values.to_numpy(5, store.n_tokens + 1),
        lambda: store.token_ids(-99),
        lambda: store.iter_batches(8, start=store.n_tokens + 1),
    ):
        with pytest.raises(OutOfRangeError, match="out of range"):
            ask()
    with pytest.raises(UsageError, match="step 2"):
        values[::2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_float_dtypes_are_roundings(dtype: str, tmp_path: Path) -> None:
    exact = tiny_store(tmp_path / "exact")["resid_post", 1].to_torch()
    values = tiny_store(tmp_path / dtype, dtype=dtype)["resid_post", 1]
    assert torch.equal(values.to_torch(), exact.to(getattr(torch, dtype)))
    assert values.to_numpy().dtype == (np.float16 if dtype == "float16" else np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_arrow_holds_what_the_dtype_holds(dtype: str, tmp_path: Path) -> None:
    store = tiny_store(tmp_path / dtype, dtype=dtype, sites=("resid_post", "embed"))
    for key in (("resid_post", 1), "embed"):
        values = store[key]
        table = values.to_arrow()
        floats = pa.float16() if dtype == "float16" else pa.float32()
        assert table.schema.field("values").type == pa.list_(floats, values.shape[1])
        flat = table.column("values").combine_chunks().flatten().to_numpy()
        np.testing.assert_array_equal(flat.reshape(values.shape), values.to_numpy())
        assert table.column("token_id").to_pylist() == store.token_ids_of(0, len(values)).tolist()
        assert values.to_arrow(5, 5).num_rows == 0
        with pytest.raises(OutOfRangeError, match="out of range"):
            values.to_arrow(3, len(values) + 1)


def test_int8_states_its_error(tmp_path: Path) -> None:
    exact = tiny_store(tmp_path / "exact")["resid_post", 1].to_torch().double()
    store = tiny_store(tmp_path / "int8", dtype="int8")
    values = store["resid_post", 1]
    found = values.to_torch()
    assert found.dtype == torch.float32
    error = float((found.double() - exact).square().sum() / exact.square().sum())
    assert values.relative_error == pytest.approx(error, rel=1e-9)
    assert 0 < error < 1e-3
    rows = store.metrics().to_pylist()
    assert {(row["module"], row["layer"], row["metric"]) for row in rows} == {
        ("resid_post", layer, "relative_error") for layer in (0, 1)
    }
    first = next(iter(store.iter_batches(16, sites=[("resid_post", 1)])))
    assert torch.equal(first.values, found[:16])


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = trilens.Lens(tiny_lens("llama", seed=3).model)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1e7)
    try:
        with pytest.raises(NonFiniteError, match="float16 holds numbers up to 65504"):
            tiny_store(tmp_path / "s", lens=model, dtype="float16", sites=("embed",))
    finally:
        with torch.no_grad():
            model.model.get_input_embeddings().weight.div_(1e7)


def test_padding_stays_below_a_tenth(store: trilens.Store) -> None:
    assert 0 <= store.padding < 0.1
    lengths = [len(ids) for ids in id_documents(300, longest=200)]
    found = list(batches(lengths, 1000))
    assert sorted(place for batch in found for place in batch) == list(range(300))
    for batch in found:
        size = len(batch) * max(lengths[place] for place in batch)
        assert size <= 1000
        assert size - sum(lengths[place] for place in batch) <= 0.1 * size
    assert len(found) < 100


def test_a_store_opens_without_model_or_corpus(store: trilens.Store) -> None:
    manifest = json.loads((store.folder / "store.json").read_text())
    assert manifest["format"] == "trilens.store"
    assert manifest["counts"]["windowed"] > 0
    for name in ("model_fingerprint", "corpus_fingerprint", "fingerprint"):
        assert len(manifest[name]) == 64
    assert "12 documents" in repr(store)
    rows = store.documents().to_pylist()
    assert [row["tokens"] for row in rows] == list(map(len, id_documents()))
    assert len(store.table()) == 5
    json.dumps(store.to_dict())


def test_a_newer_version_is_refused(store: trilens.Store, tmp_path: Path) -> None:
    plain = json.loads((store.folder / "store.json").read_text())
    del plain["sha256"]
    (tmp_path / "store.json").write_bytes(sealed({**plain, "version": 2}))
    with pytest.raises(CorruptFileError, match="version 2: this trilens reads version 1"):
        trilens.open_store(tmp_path)
    with pytest.raises(ModelNotFoundError, match="is no store"):
        trilens.open_store(tmp_path / "nowhere")


def test_damage_is_named_and_mended_by_the_same_call(tmp_path: Path) -> None:
    tiny_store(tmp_path / "s")
    before = contents(tmp_path / "s")
    for name in before:
        data = bytearray(before[name])
        data[len(data) // 2] ^= 1
        (tmp_path / "s" / name).write_bytes(data)
        with pytest.raises(CorruptFileError, match=name.partition("-")[0]):
            trilens.validate_store(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(before[name])
    shard = tmp_path / "s" / "shard-00001.safetensors"
    for damaged in (before[shard.name][:-1], b"", None):
        if damaged is None:
            shard.unlink()
        else:
            shard.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="shard-00001"):
            trilens.open_store(tmp_path / "s")
        tiny_store(tmp_path / "s")
        assert contents(tmp_path / "s") == before
    assert trilens.validate_store(tmp_path / "s").shards == len(
        [name for name in before if name.startswith("shard")]
    )


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    tiny_store(folder)
    before = contents(folder)
    for what, change in (
        ("model", {"lens": tiny_lens("llama", seed=1)}),
        ("corpus", {"documents": id_documents(seed=5)}),
        ("options", {"dtype": "float16"}),
    ):
        with pytest.raises(UsageError, match=f"a store of another {what}"):
            tiny_store(folder, **change)
        assert contents(folder) == before
    found = trilens.capture_corpus(
        tiny_lens(),
        id_documents(seed=5),
        folder,
        options=trilens.StoreOptions(context=16, shard_tokens=64, layers=(0, 1)),
        overwrite=True,
    )
    assert found.n_tokens == sum(map(len, id_documents(seed=5)))
    assert contents(tiny_store(tmp_path / "t", id_documents(seed=5)).folder) == contents(folder)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds files that are not of a store"):
            trilens.capture_corpus(tiny_lens(), [[1, 2]], tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sites": ("attn.pattern",)}, UsageError, "not one value a token"),
        ({"sites": ("mixer.rate",)}, UsageError, "is a gate, whose openness is reduced"),
        ({"sites": ("mixer.out",)}, SiteError, "is not there"),
        ({"sites": "resid_post"}, UsageError, "is not a list"),
        ({"layers": (9,)}, OutOfRangeError, "layer 9"),
        ({"dtype": "int4"}, UsageError, "the dtypes are auto, bfloat16"),
        ({"reduce": ("median",)}, UsageError, "the reducers are mean, covariance"),
        ({"values": False}, UsageError, "nothing would be stored"),
        ({"context": 0}, ValueRangeError, "context 0"),
        ({"gate_threshold": 0.7}, ValueRangeError, "0.7"),
        ({"reduce": ("class_means",)}, UsageError, "class means need labels"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, object], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        tiny_store(tmp_path / "s", **options)


def test_tokens_are_bounded(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "s", max_tokens=50)
    assert store.n_tokens == 50
    flat = [i for ids in id_documents() for i in ids]
    assert store.token_ids_of(0, 50).tolist() == flat[:50]
    before = contents(tmp_path / "s")
    tiny_store(tmp_path / "s", max_tokens=50)
    assert contents(tmp_path / "s") == before


def test_threads_of_the_caller_come_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tiny_store(tmp_path / "s")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
