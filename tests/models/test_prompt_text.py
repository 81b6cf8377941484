"""Which characters each token covers, for every kind of tokenizer, from text and from ids."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trilens.errors import TextNotFoundError
from trilens.models.tokens import read_prompt

CORPUS = ["the cat sat on the mat in Paris\n", "a naïve café — running, jumping\n"] * 20
TEXT = "The café in Paris, 😀 the cat"
WORDS = ["The", "café", "in", "Paris", "😀", "cat"]


def trained(tokenizer: Tokenizer, trainer: Any, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(*, trims: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=trims)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    return trained(tokenizer, trainer, bos_token="<s>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's, uncased: text is changed before it is cut."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    names = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama's: ▁ for spaces, a first one that is not in the text, <0x..> for what has no piece."""
    pieces = ["<unk>", "<s>", "▁", *sorted({char for char in "".join(CORPUS) if char.isascii()})]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys([*pieces, "T", ",", "▁t"]))}
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "t")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


class Bytes:
    """A token for each byte, as the package rwkv has for what its vocabulary lacks."""

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 1 for i in ids).decode("utf-8", errors="replace")


class RawBytes(Bytes):
    def decodeBytes(self, ids: list[int]) -> bytes:  # noqa: N802
        return bytes(i - 1 for i in ids)


TOKENIZERS = {
    "byte-level": lambda: byte_level(trims=False),
    "byte-level with a prefix space": lambda: byte_level(trims=True),
    "WordPiece": word_piece,
    "SentencePiece": byte_fallback,
    "bytes": RawBytes,
    "bytes shown as text": Bytes,
}


def read(prompt: Any, tokenizer: Any) -> Any:
    return read_prompt(prompt, tokenizer=tokenizer, vocab_size=10_000, max_positions=None)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_word_is_covered_by_its_tokens(kind: str) -> None:
    """Each word's tokens decode to text that holds the word, and the tokens beside do not."""
    tokenizer = TOKENIZERS[kind]()
    prompt = read(TEXT, tokenizer)
    assert prompt.text.text == TEXT
    covered = set()
    for word in WORDS:
        found = prompt.text.find(word, prompt.strings)
        assert found == tuple(range(found[0], found[-1] + 1))
        ids = [int(prompt.ids[i]) for i in found]
        decoded = tokenizer.decode(ids).replace(" ##", "").replace("##", "")
        if "[UNK]" not in decoded:
            wanted = word.lower().replace("é", "e") if kind == "WordPiece" else word
            assert decoded.strip(" ") == wanted
        covered |= set(found)
    # What no word covers is spaces, the comma, special tokens and "the" alone.
    rest = [prompt.strings[i] for i in range(len(prompt.strings)) if i not in covered]
    allowed = set(" ,the") | {"##", "[CLS]", "[SEP]", "<s>"}
    assert all(piece in allowed or set(piece.removeprefix("##")) <= set(" ,the") for piece in rest)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_their_text_are_covered_alike(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    text = "the cat sat on the mat in the cafe"
    by_text = read(text, tokenizer)
    by_ids = read(by_text.ids, tokenizer)
    assert by_text.text.text == text
    # Such a tokenizer's decoder keeps the space that it put before the first word.
    assert by_ids.text.text == (f" {text}" if "prefix" in kind else text)
    for word in text.split():
        assert by_ids.text.find(word, by_ids.strings) == by_text.text.find(word, by_text.strings)


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece", "bytes", "bytes shown as text"])
def test_ids_of_characters_of_several_bytes(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    by_text = read(TEXT, tokenizer)
    by_ids = read(by_text.ids, tokenizer)
    assert by_ids.text == by_text.text
    assert len(by_ids.text.find("😀", by_ids.strings)) >= 4


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece"])
def test_special_tokens_stand_for_no_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    given = read("<s>the cat<s> sat", tokenizer)
    for found in (given, read(given.ids, tokenizer)):
        assert "<s>" not in found.text.text
        special = [i for i, string in enumerate(found.strings) if string == "<s>"]
        assert len(special) == 2
        assert all(found.text.spans[i][0] == found.text.spans[i][1] for i in special)
        cat = found.text.find("cat", found.strings)
        assert max(cat) < special[1] < min(found.text.find("sat", found.strings))


def test_chat_markers_stand_for_no_text() -> None:
    """Markers that are special, but neither first, last nor padding token."""
    tokenizer = byte_level(trims=False)
    tokenizer._tokenizer.add_special_tokens([AddedToken("<|user|>", special=True)])
    tokenizer._tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "<think>the café"}, {"role": "user", "content": "cat"}]
    found = read(chat, tokenizer)
    assert found.text.text == "<think>the cafécat"
    markers = [i for i, string in enumerate(found.strings) if string == "<|user|>"]
    assert len(markers) == 2
    assert max(found.text.find("café", found.strings)) < markers[1]
    assert found.text.find("<think>", found.strings) == (1,)
    with pytest.raises(TextNotFoundError, match=f"special token at position 0, {markers[1]}"):
        found.text.find("<|user|>", found.strings)


def test_special_tokens_in_a_text_that_is_changed_first() -> None:
    found = read("A [SEP] Cat", word_piece())
    special = [i for i, string in enumerate(found.strings) if string == "[SEP]"]
    assert found.text.text == "A  Cat"
    assert found.text.spans[special[0]] == (2, 2)
    assert found.strings[found.text.find("Cat", found.strings)[0]].startswith("c")


def test_no_tokenizer_no_text() -> None:
    assert read([1, 2, 3], None).text is None
