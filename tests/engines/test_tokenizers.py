"""Text to tokens: the engine's own tokenizers against transformers', by every name given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import AutoTokenizer

import trilens
from engines.engine import Engine, byte_level, save_model, sentencepiece_like
from llama_cases import llama_config
from trilens.checkpoint.gguf.reader import read_gguf
from trilens.checkpoint.gguf.tokenizer import PRE_TOKENIZERS

TRAINING = [
    "I'LL say: it's 1234567 o'clock, isn't it? We've DON'T they'Re\n\n\n   go  on\t\tnow.  \n",
    "def f(x, y): return x ** 2 + y  # naïve café Ünïcode Straße МОСКВА Привет 東京タワー ☕\r\n",
    "CamelCaseWords and HTTPServer2Go, a/b/c//d ... !!! ??? /// --- ===\n\n",
] * 3
TEXTS = [*TRAINING[:3], "", " ", "\n", "x", "  leading", "trailing  ", "1 22 333 4444", "don't'S"]
ENDS = {"max_position_embeddings": 64, "tie_word_embeddings": True}
CONFIG = llama_config(256, 256, layers=1, heads=4, vocab=600, **ENDS)
BY_NAME = {name: key for key, name in PRE_TOKENIZERS.items()}


def steps(words: Sequence[str]) -> list[Any]:
    """The steps that the words stand for."""
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with_own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {
        "byte-level with its own expression": with_own,
        "single digits": pre_tokenizers.Digits(individual_digits=True),
    }
    found = [known.get(w) or pre_tokenizers.Split(Regex(w), "isolated") for w in words]
    return found if with_own in found else [*found, bytes_alone]


@pytest.mark.parametrize("name", BY_NAME)
def test_tokens(name: str, tmp_path: Path) -> None:
    words, ignore_merges = BY_NAME[name]
    tokenizer = byte_level(TRAINING, steps=steps(words), ignore_merges=ignore_merges)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    source = save_model(CONFIG, tokenizer, tmp_path / "src")
    path = tmp_path / "model.gguf"
    trilens.ternarize(source, path, format="gguf-q2_0")
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == name
    engine = Engine(path)
    try:
        for text in (*TEXTS, "an <extra> token"):
            assert engine.tokenize(text) == tokenizer(text)["input_ids"], text
    finally:
        engine.close()


@pytest.mark.parametrize("prefix", ["", "normalizer", "metaspace"])
def test_pieces(prefix: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(TRAINING, prefix=prefix)
    source = save_model(CONFIG, tokenizer, tmp_path / "src")
    path = tmp_path / "model.gguf"
    trilens.ternarize(source, path, format="gguf-q2_0")
    assert read_gguf(path).metadata["tokenizer.ggml.add_space_prefix"] == bool(prefix)
    tokenizer = AutoTokenizer.from_pretrained(source)
    engine = Engine(path)
    try:
        # A metaspace adds no space to a text that begins with one; the engine always does.
        texts = [t for t in TEXTS if prefix != "metaspace" or not t.startswith(" ")]
        for text in texts:
            assert engine.tokenize(text, special=True) == tokenizer(text)["input_ids"], text
    finally:
        engine.close()
