"""Tokenizers: what is written, and what is refused because the engine has no equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import trilens
from gguf_cases import byte_level, saved_with_tokenizer
from trilens.checkpoint.gguf.sentencepiece import piece_scores
from trilens.checkpoint.gguf.tokenizer import Vocabulary, read_vocabulary
from trilens.errors import NoTokenizerError, UsageError


class Config:
    bos_token_id = None
    eos_token_id: Any = None


def read(tokenizer: Any, rows: int = 320, config: Any = Config) -> Vocabulary:
    return read_vocabulary(tokenizer, config, rows, "here")


def backend(tokenizer: PreTrainedTokenizerFast, **parts: Any) -> PreTrainedTokenizerFast:
    for name, value in parts.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


def test_kinds_of_tokens() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<own>", normalized=False)])
    tokenizer.chat_template = "{{ messages }}"
    found = read(tokenizer)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["<s>"].name == "CONTROL"
    assert kinds["<own>"].name == "USER_DEFINED"
    assert kinds["Ġthe"].name == "NORMAL"
    assert kinds["[PAD319]"].name == "UNUSED"
    assert found.specials == {"bos": 0, "eos": 1}
    assert (found.model, found.pre, found.add_bos) == ("gpt2", "gpt-2", False)
    assert found.chat_template == "{{ messages }}"
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [merge.split(" ") for merge in found.merges] == merges


def test_special_tokens_around_a_text_are_seen() -> None:
    template = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = read(backend(byte_level(), post_processor=template))
    assert (found.add_bos, found.add_eos) == (True, True)
    twice = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    with pytest.raises(UsageError, match="more than one token"):
        read(backend(byte_level(), post_processor=twice))


def test_special_tokens_that_only_the_configuration_names() -> None:
    class Named(Config):
        eos_token_id = (7, 8)

    nameless = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    assert read(nameless, config=Named).specials == {"bos": 7, "eos": 7}
    with pytest.raises(UsageError, match="names an eos token"):
        read(nameless)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": normalizers.Lowercase()}, "normalizer 'Lowercase'"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "pre-tokenizer.*Whitespace.*gpt-2"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "no equal"),
        ({"model": models.WordLevel({"a": 0}, "a")}, "WordLevel, only BPE"),
        ({"model": models.Unigram([("a", 0.0)], unk_id=0)}, "Unigram, only BPE"),
        ({"model": models.BPE({"a": 0, "b": 1}, [], dropout=0.1)}, "dropout"),
        ({"model": models.BPE({"a": 0, "b": 1}, [])}, "no merges"),
    ],
)
def test_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"tokenizer of here cannot be written to GGUF: .*{words}"):
        read(backend(byte_level(), **parts))


def test_refused_for_its_tokens() -> None:
    with pytest.raises(UsageError, match=r"token id \d+, the embedding has 200 rows"):
        read(byte_level(), rows=200)
    stripping = byte_level()
    stripping.add_tokens([AddedToken("<gap>", lstrip=True)])
    with pytest.raises(UsageError, match="'<gap>' has lstrip"):
        read(stripping)
    with pytest.raises(NoTokenizerError, match="here has no tokenizer"):
        read(None)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src")
    for path in source.glob("*token*"):
        path.unlink()
    with pytest.raises(NoTokenizerError, match=r"add tokenizer\.json"):
        trilens.ternarize(source, tmp_path / "m.gguf", format="gguf-tq2_0")
    assert not (tmp_path / "m.gguf").exists()


def pieces(vocab: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *vocab]
    ids = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")


def test_pieces_with_bytes_to_fall_back_on() -> None:
    merges = [("a", "b"), ("▁", "ab"), ("▁a", "b"), ("▁", "a")]
    found = read(pieces(["▁", "a", "b", "ab", "▁ab", "▁a"], merges))
    assert (found.model, found.add_space_prefix, found.merges) == ("llama", True, ())
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["ab"] > scores["▁ab"] > scores["▁a"]
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert (kinds["<0x0A>"].name, kinds["<unk>"].name) == ("BYTE", "UNKNOWN")


def test_a_metaspace_begins_a_text_with_a_space() -> None:
    merges = [("a", "b"), ("▁", "ab"), ("▁a", "b"), ("▁", "a")]
    for scheme, wanted in (("first", True), ("always", True), ("never", False)):
        space = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer = pieces(["▁", "a", "b", "ab", "▁ab", "▁a"], merges)
        tokenizer.backend_tokenizer.normalizer = None
        assert read(backend(tokenizer, pre_tokenizer=space)).add_space_prefix is wanted
    words = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    with pytest.raises(UsageError, match="pre-tokenizer"):
        read(backend(tokenizer, pre_tokenizer=words))


def test_merges_that_no_scores_stand_for() -> None:
    vocab = ["▁", "a", "b", "ab", "▁ab", "▁a"]
    with pytest.raises(UsageError, match="'▁ab' is not merged from"):
        read(pieces(vocab, [("a", "b"), ("▁", "ab"), ("▁", "a")]))
    known = {token: number for number, token in enumerate(vocab)}
    with pytest.raises(UsageError, match="do not follow one another"):
        piece_scores(known, [("▁", "ab"), ("a", "b"), ("▁a", "b"), ("▁", "a")])
