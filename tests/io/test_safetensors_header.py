from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from trilens.errors import (
    ConfigError,
    CorruptFileError,
    LoadError,
    TrilensError,
    UnsafeFormatError,
)
from trilens.io import weight_files as weight_listing
from trilens.io.json import read_json
from trilens.io.safetensors_header import read_header
from trilens.io.weight_files import read_headers, read_weights, shard_names, weight_files
from trilens.io.weight_memory import memory_bytes

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2], dtype=torch.int64),
}


def refused(error, call, *args):
    with pytest.raises(error) as caught:
        call(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_header_locates_every_tensors_bytes(file):
    found = read_header(file)
    assert set(found) == set(TENSORS)
    content = file.read_bytes()
    for name, tensor in TENSORS.items():
        header = found[name]
        assert header.shape == tuple(tensor.shape)
        assert header.size_bytes == tensor.nbytes
        stored = np.frombuffer(content[header.begin : header.end], np.uint8)
        assert np.array_equal(stored, tensor.reshape(-1).view(torch.uint8).numpy())
    assert found["b"].dtype == "BF16"


@given(st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=5))
def test_any_file_that_safetensors_writes_is_read(tmp_path_factory, shapes):
    shapes.pop("__metadata__", None)
    file = tmp_path_factory.mktemp("any") / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    assert {name: list(header.shape) for name, header in read_header(file).items()} == shapes


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 30])
def test_a_truncated_header(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(CorruptFileError, read_header, file)
    assert "model.safetensors is truncated" in message
    assert str(keep) in message


def test_truncated_data_names_both_sizes(file):
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    message = refused(CorruptFileError, read_header, file)
    assert f"is truncated: expected {size} bytes, the file has {size - 3}" in message


def test_bytes_that_no_tensor_owns(file):
    file.write_bytes(file.read_bytes() + b"\0")
    assert "no tensor owns" in refused(CorruptFileError, read_header, file)


def test_an_impossible_header_length(file):
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    assert str(2**64 - 1) in refused(CorruptFileError, read_header, file)


def test_a_missing_file(tmp_path):
    assert "absent.safetensors" in refused(
        CorruptFileError, read_header, tmp_path / "absent.safetensors"
    )


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 50_000, "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
            "'a' is there twice",
        ),
        ({"__metadata__": {"format": 1}}, "__metadata__"),
        ({"__metadata__": "pt"}, "__metadata__"),
        ({"a": 3}, "needs exactly"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "needs exactly"),
        ({"a": entry() | {"more": 1}}, "needs exactly"),
        ({"a": entry(dtype="F33")}, "'F33'"),
        ({"a": entry(dtype=["F32"])}, "['F32']"),
        ({"a": entry(shape=[-2])}, "[-2]"),
        ({"a": entry(shape=[2.0])}, "[2.0]"),
        ({"a": entry(shape=[True, 2])}, "[True, 2]"),
        ({"a": entry(shape=[1] * 65)}, "at most 64"),
        ({"a": entry(shape=[2**62] * 60)}, "needs"),
        ({"a": entry(offsets=[8, 0])}, "[8, 0]"),
        ({"a": entry(offsets=[0])}, "[0]"),
        ({"a": entry(offsets=[0, 8, 8])}, "[0, 8, 8]"),
        ({"a": entry(offsets=[0, 12])}, "needs 8 bytes, its data_offsets span 12"),
        ({"a": entry(offsets=[4, 12])}, "leaves a gap"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "overlaps"),
        ({"line\nbreak" * 50: entry(dtype="F33")}, "'F33'"),
    ],
    ids=range(25),
)
def test_malformed_headers(tmp_path, header, problem):
    file = write(tmp_path / "x.safetensors", header, b"\0" * 8)
    message = refused(CorruptFileError, read_header, file)
    assert "x.safetensors" in message
    assert problem in message
    assert len(message) < 800


def test_sub_byte_tensors_are_measured_in_bits(tmp_path):
    packed = {"a": entry("F4", [3, 2], [0, 3])}
    assert read_header(write(tmp_path / "x", packed, b"\0" * 3))["a"].size_bytes == 3
    half = {"a": entry("F4", [3], [0, 1])}
    assert "needs 2 bytes" in refused(
        CorruptFileError, read_header, write(tmp_path / "y", half, b"\0")
    )


def test_random_bytes_are_refused(tmp_path):
    rng = random.Random(0)
    for n in range(50):
        file = tmp_path / f"{n}.safetensors"
        file.write_bytes(rng.randbytes(rng.randrange(200)))
        refused(CorruptFileError, read_header, file)


def shards(folder, names=("one.safetensors", "two.safetensors")):
    parts = [{"a": TENSORS["a"]}, {"b": TENSORS["b"], "c": TENSORS["c"]}]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index(folder, weight_map)
    return weight_map


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_is_followed(tmp_path):
    shards(tmp_path)
    assert [p.name for p in weight_files(tmp_path)] == ["one.safetensors", "two.safetensors"]
    assert set(read_headers(tmp_path)) == set(TENSORS)


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "..safetensors",
        "/etc/one.safetensors",
        "sub/one.safetensors",
        "sub\\one.safetensors",
        "C:one.safetensors",
        "one.bin",
        "one\n.safetensors",
        "one\0.safetensors",
        "",
        None,
        3,
        ["one.safetensors"],
    ],
)
def test_an_index_names_only_plain_files_beside_it(tmp_path, name):
    shards(tmp_path)
    (tmp_path.parent / "one.safetensors").write_bytes(b"")
    index(tmp_path, {"a": name})
    message = refused(CorruptFileError, weight_files, tmp_path)
    assert repr(name) in message


def test_missing_shards_are_named(tmp_path):
    shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    message = refused(CorruptFileError, read_headers, tmp_path)
    assert "lacks 1 of 2 weight files" in message
    assert "two.safetensors" in message


def test_an_index_is_read_once(tmp_path, monkeypatch):
    index(tmp_path, shards(tmp_path))
    read = []
    monkeypatch.setattr(
        weight_listing,
        "read_json",
        lambda path, *a, **k: read.append(path) or read_json(path, *a, **k),
    )
    files, headers = read_weights(tmp_path)
    assert [file.name for file in files] == ["one.safetensors", "two.safetensors"]
    assert set(headers) == set(TENSORS)
    assert len(read) == len(set(read)) > 0


def test_a_tensor_that_no_shard_holds(tmp_path):
    index(tmp_path, shards(tmp_path) | {"lost.weight": "one.safetensors"})
    assert "lost.weight" in refused(CorruptFileError, read_headers, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', ""])
def test_a_broken_index(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert path.name in refused(CorruptFileError, shard_names, path)
    assert path.name in refused(CorruptFileError, weight_files, tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    shards(tmp_path)
    path = tmp_path / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "two.safetensors is truncated" in refused(CorruptFileError, read_headers, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "x.pkl", "pytorch_model-1.BIN"],
)
def test_pickles_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    message = refused(UnsafeFormatError, weight_files, tmp_path)
    assert name in message
    assert "convert it with safetensors" in message


def test_a_pickle_beside_safetensors_is_ignored(file):
    (file.parent / "pytorch_model.bin").write_bytes(b"")
    assert weight_files(file.parent) == (file,)


@pytest.mark.parametrize("name", [None, "model.gguf", "adapter_model.safetensors"])
def test_no_weights(tmp_path, name):
    if name:
        (tmp_path / name).write_bytes(b"")
    message = refused(LoadError, weight_files, tmp_path)
    assert "model.safetensors" in message
    assert ("gguf_file=" in message) == (name == "model.gguf")
    assert (name or "no weights") in message


def test_a_distributed_checkpoint_is_not_read_in_part(file):
    shard = "shard-00001-model-00001-of-00002.safetensors"
    (file.parent / shard).write_bytes(b"")
    assert shard in refused(LoadError, weight_files, file.parent)


def test_weights_by_another_name(tmp_path):
    save_file(TENSORS, tmp_path / "other.safetensors")
    config = tmp_path / "config.json"
    config.write_text('{"transformers_weights": "other.safetensors"}')
    assert set(read_headers(tmp_path)) == set(TENSORS)
    for bad in ('"../other.safetensors"', '"other.bin"', "3"):
        config.write_text(f'{{"transformers_weights": {bad}}}')
        refused(CorruptFileError, read_headers, tmp_path)
    config.write_text('{"transformers_weights": "absent.safetensors"}')
    assert "absent.safetensors" in refused(CorruptFileError, read_headers, tmp_path)
    config.write_text('{"transformers_weights": "absent.safetensors.index.json"}')
    assert "absent.safetensors.index.json" in refused(CorruptFileError, read_headers, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "a", "b"),
    [("float32", 4, 4), (torch.float64, 8, 8), ("bfloat16", 2, 2), ("auto", 4, 2)],
)
def test_estimate_counts_floating_tensors_in_the_target_dtype(file, dtype, a, b):
    # c holds integers, which no load casts: 2 × 8 bytes whatever the dtype.
    assert memory_bytes(read_headers(file.parent), file.parent, dtype) == 6 * a + 5 * b + 2 * 8


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_estimate_follows_the_configurations_dtype(file, key):
    (file.parent / "config.json").write_text(json.dumps({key: "float64"}))
    assert memory_bytes(read_headers(file.parent), file.parent) == 6 * 8 + 5 * 8 + 2 * 8


def test_estimate_reads_no_tensor_byte(tmp_path):
    """Ten gigabytes that are not there can be estimated from a sparse file."""
    size = 10**10
    header = json.dumps({"a": entry("F32", [size // 4], [0, size])}).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)
    assert memory_bytes(read_headers(tmp_path), tmp_path, "bfloat16") == size // 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "line 1, column 1"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "list"),
        (b"[" * 100_000, "nested too deep"),
        (b"1" * 5000, "nested too deep or a number too long"),
    ],
    ids=range(6),
)
def test_json_that_cannot_be_read(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = refused(ConfigError, read_json, path, ConfigError)
    assert "config.json" in message
    assert problem in message


def test_mutated_headers_are_refused_or_say_the_same(file):
    """300 seeded one-byte changes of length and header."""
    whole = file.read_bytes()
    rng = random.Random(7)
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    outcomes = set()
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.randrange(header_end)] = rng.randrange(256)
        file.write_bytes(changed)
        try:
            found = read_header(file)
        except TrilensError as error:
            assert len(str(error).splitlines()) == 1
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert sum(t.size_bytes for t in found.values()) == len(whole) - header_end
    assert outcomes == {"refused", "read"}
