"""Files that are read strictly: damage is named, and nothing else is raised."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from gguf import GGUFReader

import trilens
from gguf_cases import saved_with_tokenizer
from trilens.checkpoint.gguf import validate_gguf
from trilens.checkpoint.gguf.reader import read_gguf
from trilens.errors import CorruptFileError, ModelNotFoundError, TrilensError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    source = saved_with_tokenizer(folder / "src")
    trilens.ternarize(source, folder / "m.gguf", format="gguf-tq2_0")
    return folder / "m.gguf"


def changed(whole: Path, folder: Path, at: int, new: bytes) -> Path:
    data = bytearray(whole.read_bytes())
    data[at : at + len(new)] = new
    path = folder / "changed.gguf"
    path.write_bytes(data)
    return path


def test_it_reads_what_the_packages_reader_reads(whole: Path) -> None:
    mine, theirs = read_gguf(whole), GGUFReader(whole)
    keys = {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert set(mine.metadata) == keys
    for key in keys:
        assert mine.metadata[key] == theirs.fields[key].contents(), key
    assert list(mine.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = mine.tensors[tensor.name]
        assert (entry.begin, entry.end - entry.begin) == (tensor.data_offset, tensor.n_bytes)
        assert list(entry.shape[::-1]) == tensor.shape.tolist()


def test_the_report_of_a_whole_file(whole: Path) -> None:
    report = validate_gguf(whole)
    assert report.hash_checked
    assert report.architecture == "llama"
    assert len(report.coded) == 7
    assert all(0.2 < (tensor.sparsity or 0) < 0.5 for tensor in report.coded)
    assert {tensor.bits_per_weight for tensor in report.coded} == {2.0625}
    assert len(report.table()) == len(report.tensors) == len(report.to_dict()["tensors"])


def test_damage_is_named(whole: Path, tmp_path: Path) -> None:
    file = read_gguf(whole)
    codes = file.tensors["blk.0.ffn_up.weight"]
    norm = file.tensors["blk.0.ffn_norm.weight"]
    data = whole.read_bytes()
    place = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight")
    n_dimensions = data.index(b"token_embd.weight") + len(b"token_embd.weight")
    tokens = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    for at, new, words in (
        (0, b"GGML", "does not begin with 'GGUF'"),
        (4, struct.pack("<I", 2), "version 2"),
        (8, struct.pack("<Q", 2**60), "do not fit"),
        (16, struct.pack("<Q", 2**60), "do not fit"),
        (16, struct.pack("<Q", 4), "malformed GGUF header"),
        (codes.begin, b"\xff", "ffn_up.weight' from row 0 on: .*no trit"),
        (codes.begin + 64, struct.pack("<e", float("inf")), "scale that is NaN or Inf"),
        (norm.begin, b"\x00\x01\x02\x03", "do not have the hash"),
        (tokens, struct.pack("<Q", 2**61), "texts do not fit"),
        (n_dimensions, struct.pack("<I", 9), "9 dimensions"),
        (place + 4, struct.pack("<Q", 250), "multiple of 256"),
        (place + 20, struct.pack("<I", 12), "type 12"),
        (place + 24, struct.pack("<Q", 32), "overlaps|leaves a gap"),
    ):
        path = changed(whole, tmp_path, at, new)
        with pytest.raises(CorruptFileError, match=words):
            validate_gguf(path)
    for cut in (3, 10, file.data_begin - 40, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(CorruptFileError, match=r"truncated|malformed"):
            validate_gguf(tmp_path / "cut.gguf")
    (tmp_path / "long.gguf").write_bytes(data + b"\x00" * 64)
    with pytest.raises(CorruptFileError, match="bytes that no tensor owns"):
        validate_gguf(tmp_path / "long.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CorruptFileError):
        validate_gguf(tmp_path / "empty.gguf")
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        validate_gguf(tmp_path / "nowhere.gguf")


def test_a_thousand_damaged_headers(whole: Path, tmp_path: Path) -> None:
    """Whatever is changed in the header: a named error, or a file that is still readable."""
    rng = random.Random(0)
    begin = read_gguf(whole).data_begin
    header = whole.read_bytes()[:begin]
    refused = 0
    path = tmp_path / "mutant.gguf"
    path.write_bytes(whole.read_bytes())
    for _ in range(1000):
        at = rng.randrange(begin)
        if rng.random() < 0.5:  # where counts, kinds and names stand close together
            at = rng.choice([rng.randrange(64), begin - 1 - rng.randrange(600)])
        size = rng.choice([1, 1, 2, 8])
        new = rng.randbytes(size) if rng.random() < 0.7 else b"\xff" * size
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(new[: begin - at])
        try:
            read_gguf(path)
        except TrilensError:
            refused += 1
        with path.open("r+b") as stream:
            stream.write(header)
    assert 300 < refused < 1000
