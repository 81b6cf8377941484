"""Prompts as Hugging Face hands them out, and tokenizers that are not its own."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trilens import Lens, compare, errors
from trilens.demo import demo_path
from trilens.models.token_strings import token_strings
from trilens.models.tokenizers import PlainTokenizer, usable_tokenizer
from trilens.models.tokens import read_prompt

TEMPLATE = (
    "{% for m in messages %}{{ raise_exception('no system') if m['role'] == 'system' }}"
    "# {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "def add(a, b):"}]
WRITTEN = "# user\ndef add(a, b):\n# assistant\n"


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens.from_pretrained(str(demo_path("transformer")))


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(demo_path("transformer")))


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(prompt: Any, tokenizer: Any = None) -> list[int]:
    return read_prompt(prompt, tokenizer=tokenizer, vocab_size=4096, max_positions=64).ids.tolist()


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_what_a_tokenizer_returned_is_a_prompt(kind: str | None, tokenizer: Any) -> None:
    text = "def add(a, b): return"
    expected = tokenizer(text)["input_ids"]
    assert ids(tokenizer(text, return_tensors=kind)) == expected
    assert ids(tokenizer([text], return_tensors=kind)) == expected
    assert ids(tokenizer(text)[0]) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str, tokenizer: Any, lens: Lens) -> None:
    texts = ["import os", "def add(a, b): return a + b"]
    tokenizer.padding_side = side
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    found = list(lens.capture_many(batch))
    for cap, text in zip(found, texts, strict=True):
        assert cap.token_ids.tolist() == tokenizer(text)["input_ids"]
    row = {key: value[:1] for key, value in batch.items()}
    alone = lens.capture(row)
    assert torch.equal(alone.logits, lens.capture(texts[0]).logits)
    steps: list[Any] = []
    list(lens.capture_many(batch, progress=steps.append))
    assert steps[-1].total == 2
    assert compare(lens, lens, batch).n_prompts == 2
    assert [cap.token_ids.tolist() for cap in lens.capture_many(tokenizer(texts[0]))] == [
        tokenizer(texts[0])["input_ids"]
    ]


@pytest.mark.parametrize(
    ("encoding", "error", "words"),
    [
        ({"ids": [1]}, errors.UsageError, "'input_ids' is needed"),
        ({}, errors.UsageError, "mapping of nothing"),
        ({"input_ids": [[1, 2], [3, 4]]}, errors.ShapeError, "capture_many"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, errors.ShapeError, "capture_many"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, errors.ShapeError, "one number"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, errors.UsageError, "position 1"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, errors.UsageError, "0 and 1"),
        ({"input_ids": [1, 2], "attention_mask": ["a", "b"]}, errors.UsageError, "numbers"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, errors.EmptyPromptError, "empty"),
        ({"input_ids": [], "attention_mask": []}, errors.EmptyPromptError, "empty"),
        ({"input_ids": [1, 2], "token_type_ids": [0, 1]}, errors.UsageError, "token_type_ids"),
        ({"input_ids": [1], "pixel_values": torch.ones(1)}, errors.UsageError, "pixel_values"),
        ({"input_ids": [1.5]}, errors.DtypeError, "integers"),
        ({"input_ids": [9999]}, errors.TokenIdError, "9999"),
    ],
)
def test_encodings_that_would_be_misread(encoding: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        ids(encoding)


def test_zeros_beside_the_ids_change_nothing() -> None:
    extra = {"token_type_ids": [[0, 0]], "special_tokens_mask": [[1, 0]], "length": [2]}
    assert ids({"input_ids": [[5, 6]], "attention_mask": np.ones((1, 2)), **extra}) == [5, 6]


def test_messages_are_written_by_the_template(chatty: Any) -> None:
    expected = chatty(WRITTEN, add_special_tokens=False)["input_ids"]
    assert ids(CHAT, chatty) == expected
    assert ids(chatty.apply_chat_template(CHAT, add_generation_prompt=True)) == expected
    tensor = chatty.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert ids(tensor) == expected
    text = chatty.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert ids(text, chatty) == expected


def test_chats_in_captures_of_many(chatty: Any, lens: Lens) -> None:
    mine = Lens(lens.model, chatty)
    other = [*CHAT, {"role": "assistant", "content": "pass"}, {"role": "user", "content": "x"}]
    found = list(mine.capture_many([CHAT, other, "import os"]))
    assert found[0].token_ids.tolist() == ids(CHAT, chatty)
    assert len(found[1].tokens) > len(found[0].tokens)
    with pytest.raises(errors.UsageError, match="one chat"):
        mine.capture_many(CHAT)
    assert compare(mine, mine, [CHAT]).n_tokens == len(found[0].tokens)


def test_a_chat_needs_a_template(tokenizer: Any) -> None:
    with pytest.raises(errors.NoChatTemplateError, match=r"set tokenizer.chat_template"):
        ids(CHAT, tokenizer)
    with pytest.raises(errors.NoTokenizerError, match="chat"):
        ids(CHAT)
    with pytest.raises(errors.NoChatTemplateError):
        ids(CHAT, Rwkv())


def test_a_template_may_refuse(chatty: Any) -> None:
    with pytest.raises(errors.PromptError, match="no system"):
        ids([{"role": "system", "content": "x"}], chatty)
    image = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    with pytest.raises(errors.UsageError, match="'image'"):
        ids(image, chatty)


def test_a_doubled_first_token_is_told() -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    with pytest.warns(errors.DoubledBosWarning, match=r"two <s> tokens .*add_special_tokens=False"):
        assert ids("<s> a", tokenizer) == [0, 0, 1]
    with pytest.warns(errors.DoubledBosWarning):
        ids(tokenizer("<s> a"), tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids("a", tokenizer)
        ids([0, 0, 1], tokenizer)
        options = {"tokenizer": tokenizer, "vocab_size": 3, "max_positions": None}
        read_prompt("<s> a", add_special_tokens=False, **options)


class Rwkv:
    """Methods and failures of the package rwkv's TRIE_TOKENIZER: a token for each byte, from 1."""

    def encode(self, src: str) -> list[int]:
        return [byte + 1 for byte in src.encode()]

    def decodeBytes(self, tokens: list[int]) -> bytes:  # noqa: N802
        return b"".join({byte + 1: bytes([byte]) for byte in range(256)}[i] for i in tokens)

    def decode(self, tokens: list[int]) -> str:
        return self.decodeBytes(tokens).decode("utf-8", errors="replace")


def test_a_tokenizer_that_can_encode_and_decode(lens: Lens) -> None:
    mine = Lens(lens.model, Rwkv())
    cap = mine.capture("né")
    assert cap.token_ids.tolist() == [111, 196, 170]
    assert tuple(cap.tokens) == ("n", "<0xC3>", "<0xA9>")
    assert token_strings([0], PlainTokenizer(Rwkv())) == ("<0>",)
    assert compare(mine, mine, ["def f"]).n_tokens == 5


def test_a_tokenizer_of_the_package_tokenizers(tokenizer: Any, lens: Lens) -> None:
    mine = Lens(lens.model, tokenizer.backend_tokenizer)
    text = "def add(a, b):\n    return"
    assert mine.capture(text).token_ids.tolist() == tokenizer(text)["input_ids"]
    assert mine.capture(text).tokens == lens.capture(text).tokens


@pytest.mark.parametrize("odd", ["gpt2", 7, object(), AutoTokenizer, {"a": 1}])
def test_what_is_no_tokenizer_is_refused_by_name(odd: Any, lens: Lens) -> None:
    with pytest.raises(errors.UsageError, match=r"is no tokenizer but the"):
        Lens(lens.model, odd)


def test_half_a_tokenizer_is_refused() -> None:
    class Silent:
        def encode(self, text: str) -> None:
            return None

        def decode(self, ids: list[int]) -> str:
            return ""

    class Failing(Rwkv):
        def encode(self, src: str) -> list[int]:
            if "b" in src:
                raise RuntimeError("no b")
            return super().encode(src)

    with pytest.raises(errors.UsageError, match="Silent"):
        usable_tokenizer(Silent())
    with pytest.raises(errors.PromptError, match="no b"):
        ids("ab", Failing())
