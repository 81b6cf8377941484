"""Every bad input on record has an outcome, and a test that names it.

Here `q` is ternary/test_quantize, `k` ternary/test_packing, `w` models/test_weights, `p`
checkpoint/test_pipeline, `v` checkpoint/test_validation, `s` checkpoint/test_skeleton; what has no
letter is below.

    values   NaN, Inf                      NonFiniteError, says where       q, p
             all-zero tensor, row          zeros, error 0                   q, p
             denormals                     coded; lost ones are counted     q
             α beyond float16              ValueRangeError                  q
             constant |w|, ties, ternary   defined, ternary kept exactly    q, p
    shapes   empty, 0-D                    ShapeError                       q, k
             1-D, rank 3 in a checkpoint   kept; one matrix for each expert s
             columns no multiple           ShapeError; own layout pads rows k, v
             more than 2³¹ elements        right                            test_more_than_2_31
             bf16, fp16, not contiguous    as float32                       q
             meta, integers, sparse        UsageError, DtypeError           q
             tied, transposed Conv1D       kept, turned                     s, p
    files    truncated, trailing, overlap, reversed, holes, huge header, bad JSON, wrong dtype
                                           CorruptFileError                 w, v
             code 3, byte ≥ 243            CorruptFileError                 k, v
             wrong version                 CorruptFileError, ConfigError    v, test_integration
             shard names .. / absolute     CorruptFileError before opening  w, p, v
             shards that are links         CorruptFileError, but for the hub's own cache
                                                                            test_links
             links where output is written replaced, never written through  test_links
             index names absent tensors    CorruptFileError                 w
             disk full                     WriteError, nothing left         p, below
             names that differ by case     tensors: kept apart; files: CorruptFileError
                                                                            test_names
             duplicate keys                CorruptFileError                 w, test_names
             a tensor in two shards        CorruptFileError                 test_names
"""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import load, saved, tensors
from tinymodels import prompt_ids
from trilens.checkpoint.coding import entries, planned
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.skeleton import Choice
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.source import Checkpoint
from trilens.checkpoint.validation import validate
from trilens.errors import CorruptFileError, TrilensError, WriteError
from trilens.io.safetensors_header import TensorHeader, read_header
from trilens.io.weight_files import read_headers
from trilens.ternary.codecs.gguf_blocks import CODECS
from trilens.ternary.codecs.sparse import decode_csr, encode_csr
from trilens.ternary.granularity import resolve_units
from trilens.ternary.weights_view import view_weights


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("bad") / "src", shard_size="150KB")


def test_more_than_2_31_elements() -> None:
    """Sizes, places and reads beyond 32 bits; the kernels' own run is in benchmarks/quantize."""
    rows, cols = (1 << 16) + 1, 1 << 15
    header = TensorHeader("w", "BF16", (rows, cols), Path("x"), 0, 2 * rows * cols)
    choice = Choice("w", "w", "layer", "w", is_matrix=True)
    report = planned(choice, header, TernaryPlan(group_size=128))
    assert report.n_weights == 2**31 + 2**15
    assert report.size_bytes == rows * cols // 4 + 4 * rows * cols // 128
    assert [shape for _, _, shape, _ in entries(choice, header, TernaryPlan())] == [
        (rows, cols // 4),
        (1, 1),
    ]
    for options in ({}, {"per": "row"}, {"group_size": 128}):
        *_, last = resolve_units(rows, cols, **options).spans()
        assert last.stop == rows * cols
    row = torch.arange(cols, dtype=torch.float16)
    view = view_weights(row.expand(rows, -1), "w")
    assert np.array_equal(view.read(2**31 + 5, 2**31 + 9), [5, 6, 7, 8])
    assert view.size == 2**31 + 2**15


def test_memory_does_not_grow_with_the_number_of_files(sharded: Path) -> None:
    """One tensor after another is read into the same memory, whichever file it is in."""
    source = Checkpoint.open(sharded)
    assert len(source.files) > 2
    largest = max(source.headers, key=lambda name: source.headers[name].size_bytes)
    held = {source.borrowed_tensor(largest).untyped_storage().data_ptr()}
    for name in source.headers:
        found = source.borrowed_tensor(name)
        assert torch.equal(found, source.tensor(name))
        held.add(found.untyped_storage().data_ptr())
    assert len(held) == 1


def test_a_disk_that_fills_up(sharded: Path, tmp_path: Path) -> None:
    """The system itself refuses bytes in the middle of a shard."""
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(WriteError, match=r"\.safetensors cannot be written: .*File too large"):
            ternarize(sharded, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in out.iterdir()} <= {"trilens-unfinished.json"}
    ternarize(sharded, out)
    ternarize(sharded, tmp_path / "at once")
    for path in (tmp_path / "at once").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_links(sharded: Path, tmp_path: Path) -> None:
    blobs, source = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    elsewhere = tmp_path / "elsewhere"
    source.mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copytree(sharded, blobs)
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
        (elsewhere / path.name).symlink_to(path)
    with pytest.raises(CorruptFileError, match="a link that leads out of the checkpoint"):
        ternarize(elsewhere, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = ternarize(source, tmp_path / "out")
    assert report == ternarize(sharded, tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    # Links that wait in the output directory under the names of temporary files.
    precious, out = tmp_path / "precious", tmp_path / "trap"
    precious.write_bytes(b"mine")
    out.mkdir()
    for path in (tmp_path / "out").iterdir():
        (out / f".{path.name}.partial").symlink_to(precious)
    assert ternarize(sharded, out) == report
    assert precious.read_bytes() == b"mine"
    assert validate(out) == report


def test_names(sharded: Path, tmp_path: Path) -> None:
    one = saved("llama", tmp_path / "one")
    path = one / "model.safetensors"
    found = load_file(path)
    found["MODEL.norm.weight"] = found["model.norm.weight"] + 1
    save_file(found, path, metadata={"format": "pt"})
    report = ternarize(one, tmp_path / "out")
    stranger = next(t for t in report.tensors if t.name == "MODEL.norm.weight")
    assert (stranger.outcome, stranger.reason) == ("kept", "it has no place in the model")
    after = tensors(tmp_path / "out")
    assert torch.equal(after["MODEL.norm.weight"], after["model.norm.weight"] + 1)

    name = "model.safetensors.index.json"
    index = json.loads((sharded / name).read_text())
    shards = sorted(set(index["weight_map"].values()))

    def changed(folder: str, text: str) -> Path:
        shutil.copytree(sharded, tmp_path / folder)
        (tmp_path / folder / name).write_text(text)
        return tmp_path / folder

    first = next(iter(index["weight_map"]))
    other_case = {**index["weight_map"], first: index["weight_map"][first].upper()}
    other_case[first] = other_case[first].replace(".SAFETENSORS", ".safetensors")
    folder = changed("case", json.dumps({"weight_map": other_case}))
    with pytest.raises(CorruptFileError, match="differ only by case"):
        ternarize(folder, tmp_path / "x")
    entry = json.dumps({first: shards[0]})[1:-1]
    folder = changed("twice", f'{{"weight_map": {{{entry}, {entry}}}}}')
    with pytest.raises(CorruptFileError, match=f"'{first}' is there twice"):
        ternarize(folder, tmp_path / "x")
    folder = changed("copy", json.dumps(index))
    both = load_file(folder / shards[0]) | load_file(folder / shards[1])
    save_file(both, folder / shards[1], metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=f"twice, in {shards[0]} and {shards[1]}"):
        ternarize(folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def mutated(raw: bytes, end: int, rng: np.random.Generator) -> bytes:
    """One seeded change within the first `end` bytes."""
    changed = bytearray(raw)
    at, kind = int(rng.integers(end)), int(rng.integers(4))
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at] = int(rng.integers(256))
    elif kind == 2:
        del changed[at : at + int(rng.integers(1, 9))]
    else:
        changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(changed)


def test_a_thousand_mutations_give_named_errors_only(sharded: Path, tmp_path: Path) -> None:
    """400 headers, 300 indexes, 300 packed tensors: refused by name, or read as something legal."""
    rng = np.random.default_rng(2)
    refused = {"header": 0, "index": 0, "packed": 0}
    folder = tmp_path / "mutant"
    shutil.copytree(sharded, folder)
    shard = min(folder.glob("*.safetensors"))
    raw = shard.read_bytes()
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(400):
        shard.write_bytes(mutated(raw, header_end, rng))
        try:
            assert sum(tensor.size_bytes for tensor in read_header(shard).values()) <= len(raw)
        except TrilensError as error:
            assert str(shard) in str(error)
            refused["header"] += 1
    shard.write_bytes(raw)
    index = folder / "model.safetensors.index.json"
    text = index.read_bytes()
    for _ in range(300):
        index.write_bytes(mutated(text, len(text), rng))
        try:
            assert read_headers(folder)
        except TrilensError as error:
            assert str(folder) in str(error)
            refused["index"] += 1
    trits = rng.integers(-1, 2, (8, 512)).astype(np.int8)
    names = [*sorted(CODECS), "csr"]
    for number in range(300):
        name = names[number % len(names)]
        codec = CODECS.get(name)
        if codec is None:
            good = encode_csr(trits).tobytes()
        else:
            good = codec.encode(trits, 0.5 if codec.scale_block else None).tobytes()
        bad = mutated(good, len(good), rng)
        try:
            if codec is None:
                assert encode_csr(decode_csr(bad, trits.shape)).tobytes() == bad
            else:
                found = codec.decode(bad, trits.shape)
                assert codec.encode(found.trits, found.scales).tobytes() == bad
        except CorruptFileError:
            refused["packed"] += 1
    assert refused["header"] > 300
    assert refused["index"] > 100
    assert refused["packed"] > 150


def test_a_mutated_checkpoint_loads_or_is_refused_by_name(tmp_path: Path) -> None:
    """What passes transformers' own reader has legal codes and finite scales, or is refused."""
    out = tmp_path / "out"
    ternarize(saved("llama", tmp_path / "src"), out)
    path = out / "model.safetensors"
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    codes = {n: h for n, h in read_header(path).items() if n.endswith((".codes", ".scale"))}
    rng = np.random.default_rng(3)
    outcomes = set()
    for number in range(12):
        header = codes[sorted(codes)[int(rng.integers(len(codes)))]]
        changed = bytearray(raw)
        at = int(rng.integers(header.begin, header.end))
        assert at >= begin
        changed[at] = 0xFF if number % 2 else changed[at] ^ 1
        path.write_bytes(changed)
        try:
            logits = load(out)(prompt_ids("llama", 4)).logits
            outcomes.add("loaded")
            assert logits.shape[1] == 4
        except CorruptFileError as error:
            outcomes.add("refused")
            assert header.name.rpartition(".")[0] in str(error)
    assert outcomes == {"loaded", "refused"}
