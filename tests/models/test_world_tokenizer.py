"""RWKV's vocabulary file as a tokenizer of transformers: the same ids as the longest match."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rwkv import rwkv_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rwkv7_published import published_tensors
from trilens import Lens
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError
from trilens.models.tokenizer_files import read_tokenizer
from trilens.models.tokenizers import PlainTokenizer
from trilens.models.world_tokenizer import END_OF_TEXT, world_tokenizer

WORDS = [
    "he", "hello", "ello", " wor", " world", "ld", "  ", "\n\n", "\r\n", "é", "né", "你好", "好",
    "，世", "привет", "'s", '""', "\\\\", "aaaa", "aa", "<|", "|>", "カタ", "🎉",
]  # fmt: skip
# No whole characters, as the published file has them: written as bytes.
PIECES = [b"\xe4\xbd", b"\xa0\xe5", b"\xff\xfe"]
TOKENS = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS), *PIECES]
TEXT = "hello world's néé\r\n\n 你好，世界  привет 🎉👩‍👧 カタカナ \"\\ aaaaaaa\x00\x7f"


def lines(tokens: list[bytes]) -> str:
    found = []
    for index, token in enumerate(tokens, start=1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        found.append(f"{index} {literal} {len(token)}\n")
    return "".join(found)


def longest_matches(text: str) -> list[int]:
    """What the file's own tokenizer does, written as plainly as can be."""
    data, ids = text.encode(), []
    while data:
        token = max((each for each in TOKENS if data.startswith(each)), key=len)
        ids.append(TOKENS.index(token) + 1)
        data = data[len(token) :]
    return ids


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text(lines(TOKENS), encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def loaded(file: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    world_tokenizer(file).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text() | st.lists(st.sampled_from([*WORDS, "a", " ", "界"])).map("".join))
@example(text=TEXT)
@example(text="a" * 301 + " " * 77)
def test_ids_are_those_of_the_longest_match(loaded, text: str) -> None:
    ids = loaded(text)["input_ids"]
    assert ids == longest_matches(text)
    assert loaded.decode(ids) == text


def test_the_end_of_a_text_is_token_0(loaded) -> None:
    assert loaded(END_OF_TEXT)["input_ids"] == [0]
    assert loaded.bos_token_id == loaded.eos_token_id == loaded.pad_token_id == 0
    assert len(loaded) == len(TOKENS) + 1


def test_the_published_vocabulary_in_several_languages() -> None:
    published = Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    mine, theirs = world_tokenizer(published), rwkv_tokenizer.TRIE_TOKENIZER(str(published))
    texts = [TEXT, Path(__file__).read_text(encoding="utf-8")]
    texts += ["한국어 텍스트 مرحبا بالعالم שלום", "สวัสดี"]
    texts += ["".join(map(chr, range(first, first + 997))) for first in range(0, 0xD000, 0x1000)]
    for text in texts:
        ids = mine(text)["input_ids"]
        assert ids == theirs.encode(text)
        assert mine.decode(ids) == text
    assert PlainTokenizer(theirs)(TEXT)["input_ids"] == mine(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + "nonsense\n", "is not that of"),
        (lambda text: text + "900 __import__('os') 3\n", "is not that of"),
        (lambda text: text + "900 'abc' 4\n", "no token"),
        (lambda text: text + "900 'he' 2\n", "no token"),
        (lambda text: text + "0 'abc' 3\n", "no token"),
        (lambda text: text + "7 'abc' 3\n", "an id comes twice"),
        (lambda text: text.split("\n", 1)[1], "1 of the 256"),
        (lambda text: "", "is not that of"),
    ],
)
def test_another_file_is_refused(change, words: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(change(lines(TOKENS)), encoding="utf-8", newline="\n")
    with pytest.raises(CorruptFileError, match=words):
        world_tokenizer(path)


def test_files_of_a_tokenizer(file: Path, tmp_path: Path) -> None:
    expected = longest_matches(TEXT)
    world_tokenizer(file).save_pretrained(tmp_path / "one")
    for place in (file, tmp_path / "one", tmp_path / "one" / "tokenizer.json"):
        assert read_tokenizer(place)(TEXT)["input_ids"] == expected
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").write_text("{}")
    for place, error in (
        ("empty", ModelNotFoundError),
        ("absent", ModelNotFoundError),
        ("odd.json", CorruptFileError),
        ("one/tokenizer.bin", UsageError),
    ):
        (tmp_path / "one" / "tokenizer.bin").write_bytes(b"x")
        with pytest.raises(error, match="tokenizer"):
            read_tokenizer(tmp_path / place)


def test_convert_writes_the_tokenizer(file: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "published.pth", tmp_path / "out"
    torch.save(published_tensors(2, 128, 320), source)
    run = CliRunner().invoke
    done = run(app, ["convert", str(source), "-o", str(out), "--tokenizer", str(file)])
    assert done.exit_code == 0, done.stderr
    lens = Lens.from_pretrained(str(out))
    assert lens.capture(TEXT).token_ids.tolist() == longest_matches(TEXT)
    bare = run(app, ["convert", str(source), "-o", str(tmp_path / "bare")])
    assert "--tokenizer adds one" in bare.stderr
    inspect = ["inspect", str(tmp_path / "bare"), "-p", "hello"]
    assert run(app, inspect).exit_code == 2
    assert (
        run(app, [*inspect, "--tokenizer", str(file)]).stdout.splitlines()[1] == "1 tokens: hello"
    )
    small = tmp_path / "small.pth"
    torch.save(published_tensors(2, 128, 96), small)
    refused = run(app, ["convert", str(small), "-o", str(tmp_path / "x"), "--tokenizer", str(file)])
    assert refused.exit_code == 2
    assert "has 284 tokens, and" in refused.stderr
    assert not (tmp_path / "x").exists()
    wrong = run(app, ["inspect", str(demo_path()), "-p", "x", "--tokenizer", "nowhere"])
    assert wrong.exit_code == 2 and "nowhere does not exist" in wrong.stderr
