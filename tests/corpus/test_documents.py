"""Every kind of corpus, its bad entries counted or fatal, long documents in windows."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trilens
from lens_cases import demo_lens
from trilens.corpus import ReadingReport, StoreOptions, capture_corpus, read_corpus
from trilens.errors import NoChatTemplateError, NoTokenizerError, TextError, UsageError

TEXTS = ["def f(x):", "x = 1\u2028y = 2", "import os"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x = 1"}]


def texts(source: Any, **options: Any) -> list[Any]:
    return [document.content for document in read_corpus(source, **options)]


def write(kind: str, folder: Path) -> Path:
    if kind == "dataset":
        place = folder / "dataset"
        place.mkdir()
        table = pa.table({"text": TEXTS, "label": [1, 0, 1]})
        with (
            pa.OSFile(str(place / "data-0.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table, max_chunksize=2)
        state = {"_data_files": [{"filename": "data-0.arrow"}]}
        (place / "state.json").write_text(json.dumps(state))
        return place
    place = folder / f"corpus.{kind}"
    if kind == "jsonl":
        place.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    elif kind == "json":
        place.write_text(json.dumps(TEXTS))
    elif kind == "csv":
        place.write_text("text\n" + "\n".join(f'"{text}"' for text in TEXTS))
    else:
        pq.write_table(pa.table({"text": TEXTS}), place)
    return place


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "dataset"])
def test_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    place = write(kind, tmp_path)
    assert texts(place) == TEXTS
    found = list(read_corpus(str(place)))
    assert all(place.name in document.where for document in found)


def test_folders_and_plain_text(tmp_path: Path) -> None:
    write("jsonl", tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    assert texts(tmp_path) == ["hello", *TEXTS]
    assert texts(tmp_path / "a.txt") == ["hello"]
    splits = tmp_path / "splits"
    (splits / "train").mkdir(parents=True)
    (splits / "dataset_dict.json").write_text("{}")
    (splits / "train" / "state.json").write_text("{}")
    with pytest.raises(TextError, match="give the folder of one of train"):
        texts(splits)


def test_labels(tmp_path: Path) -> None:
    labels = [d.label for d in read_corpus(write("dataset", tmp_path), label="label")]
    assert labels == ["1", "0", "1"]
    with pytest.raises(TextError, match="no labels"):
        texts(write("csv", tmp_path), label="label")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b'{"text": "a"}\n\n"b"\n', ["a", "b"]),
        ("plain text\nof two lines — ü".encode(), ["plain text\nof two lines — ü"]),
    ],
)
def test_standard_input(content: bytes, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert texts("-") == wanted


def test_bad_lines_are_counted_or_fatal(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"other": 1}',
        b'{"text": "\xff"}',
        b'{"text": " "}',
    ]
    file.write_bytes(b"\n".join([*lines, b'{"messages": "no chat"}', b'"last"']))
    report = ReadingReport()
    assert texts(file, report=report) == ["good", "last"]
    assert (report.bad, report.empty) == (4, 1)
    assert "c.jsonl, line 2" in report.examples[0]
    with pytest.raises(TextError, match="line 2"):
        texts(file, strict=True)
    file.write_bytes(b"{broken")
    with pytest.raises(TextError, match="holds no document: 1 entries could not be read"):
        texts(file)


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="corpus is one int"):
        texts(7)
    with pytest.raises(UsageError, match="corpus is one list"):
        texts(CHAT)
    with pytest.raises(TextError, match="no text at"):
        texts(tmp_path / "nowhere.txt")


def test_documents_fix_the_digest() -> None:
    digests = set()
    for corpus in (["a", "b"], ["ab"], ["b", "a"], ["a", "b", "c"]):
        report = ReadingReport()
        list(read_corpus(corpus, report=report))
        digests.add(report.digest.hexdigest())
    assert len(digests) == 4


def test_chats_are_whole_and_windows_are_told(tmp_path: Path) -> None:
    lens = demo_lens(dtype="float32")
    options = StoreOptions(layers=(0,), context=8)
    with pytest.raises(NoChatTemplateError):
        capture_corpus(lens, [CHAT], tmp_path / "s", options=options)
    lens.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    try:
        store = capture_corpus(lens, [CHAT, "x"], tmp_path / "s", options=options)
    finally:
        lens.tokenizer.chat_template = None
    assert lens.tokenizer.decode(store.token_ids(0)).endswith("assistant:x = 1\n")
    counts = store.manifest.counts
    assert (counts.windowed, counts.longest, counts.documents) == (1, 8, 2)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    lens = trilens.Lens(demo_lens(dtype="float32").model)
    with pytest.raises(NoTokenizerError):
        capture_corpus(lens, ["x"], tmp_path / "s")
    with pytest.raises(TextError, match="out of range"):
        capture_corpus(lens, [[10**6]], tmp_path / "t", strict=True)
