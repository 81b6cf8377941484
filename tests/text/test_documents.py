"""Documents from every kind of source, and blocks that never span two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trilens.demo import demo_path
from trilens.errors import NoTokenizerError, TextError, ValueRangeError
from trilens.text.documents import STDLIB, read_documents
from trilens.text.token_blocks import token_blocks


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_path())


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    lines = [json.dumps({"text": "three"}), "", json.dumps("four"), json.dumps({"text": "  "})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(
        pa.table({"text": ["five", None, "six"], "n": [1, 2, 3]}), tmp_path / "c.parquet"
    )
    (tmp_path / "d.bin").write_bytes(b"\xff\x00")
    assert read_documents(tmp_path / "a.txt") == ("one\n\ntwo",)
    assert read_documents(tmp_path / "b.jsonl") == ("three", "four")
    assert read_documents(tmp_path / "c.parquet") == ("five", "six")
    assert read_documents(tmp_path) == ("one\n\ntwo", "three", "four", "five", "six")


def test_json_and_csv_are_read_by_entry_and_their_syntax_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('[{"text": "one"}, "two"]')
    (tmp_path / "l.json").write_text('{"text": "a b"}\n{"text": "c d"}\n')
    (tmp_path / "o.json").write_text('{"body": "x", "text": "y"}')
    (tmp_path / "c.csv").write_text('id,text\n1,"x = 2, y"\n2,"a\nb"\n')
    for name, texts in (
        ("d.json", ("one", "two")),
        ("l.json", ("a b", "c d")),
        ("o.json", ("y",)),
        ("c.csv", ("x = 2, y", "a\nb")),
    ):
        assert read_documents(tmp_path / name) == texts
    assert read_documents(tmp_path / "c.csv", field="id") == ("1", "2")
    with pytest.raises(TextError, match=r"name a \.json or \.csv file itself"):
        read_documents(tmp_path)


def test_the_standard_library_is_always_there() -> None:
    documents = read_documents(STDLIB)
    assert len(documents) > 300
    assert any("class TextWrapper" in document for document in documents)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        (
            "half.jsonl",
            b'{"text": "a"}\n{"text": "b \\ud83d"}',
            "line 2 holds half a surrogate pair",
        ),
        ("half.json", b'["b \\ud83d"]', "half a surrogate pair"),
        ("bad.json", b'{"text": ', "is not valid JSON"),
        ("key.json", b'[{"body": "a"}]', "entry 0 has no text under 'text': it has body"),
        ("bad.csv", b'text\n"a', "is not readable CSV"),
        ("key.csv", b"a,b\n1,2\n", "no column 'text': its columns are a, b"),
        ("short.csv", b"a,text\n1\n", "line 2 has no cell under 'text'"),
        ("key.jsonl", b'{"body": "a"}', "no text under 'text': it has body"),
        ("bytes.txt", b"ok \xff\xfe", "byte 3 does not decode"),
        ("no.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("blank.txt", b" \n\t ", "every document is empty"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=words):
        read_documents(tmp_path / name)


def test_a_parquet_column_must_be_there_and_hold_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(TextError, match="no column 'text': its columns are n"):
        read_documents(tmp_path / "n.parquet")
    wide = pa.table({f"c{n}": [n] for n in range(300)})
    pq.write_table(wide, tmp_path / "wide.parquet")
    with pytest.raises(TextError, match="columns are c0, c1, c2, c3 and 296 more"):
        read_documents(tmp_path / "wide.parquet")
    with pytest.raises(TextError, match="holds int64, not text"):
        read_documents(tmp_path / "n.parquet", field="n")


def test_a_missing_source_says_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="the word stdlib"):
        read_documents(tmp_path / "absent.jsonl")


def test_blocks_cover_each_document_and_never_two(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ("import os\n" * 30, "def f(x):\n    return x\n" * 9)
    blocks = token_blocks(tokenizer, texts, length=16)
    whole = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    assert all(2 <= len(block) <= 16 for block in blocks)
    expected = [piece for ids in whole for piece in ids.split(16) if len(piece) >= 2]
    assert len(blocks) == len(expected)
    assert all(torch.equal(mine, right) for mine, right in zip(blocks, expected, strict=True))


def test_the_limit_is_kept_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    blocks = token_blocks(tokenizer, ["import os\n" * 200], length=16, limit_tokens=37)
    assert [len(block) for block in blocks] == [16, 16, 5]


def test_bad_arguments_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(NoTokenizerError):
        token_blocks(None, ["a"], length=4)
    with pytest.raises(ValueRangeError, match="length is 1"):
        token_blocks(tokenizer, ["a"], length=1)
    with pytest.raises(ValueRangeError, match="limit is 0"):
        token_blocks(tokenizer, ["a"], length=4, limit_tokens=0)
    with pytest.raises(TextError, match="no block of 2 tokens"):
        token_blocks(tokenizer, [""], length=4)
