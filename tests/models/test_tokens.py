from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from trilens import errors
from trilens.models.positions import max_positions_of
from trilens.models.token_strings import token_strings
from trilens.models.tokens import (
    pad_id_for,
    read_prompt,
    vocab_size_of,
)

CORPUS = [
    "the cat sat on the mat and the dog sat on the log\n",
    "running, jumping and swimming in the river — naïve café\n",
    "def add(a, b):\n    return a + b\n",
] * 20


def wrap(tokenizer, **special):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=True, **special
    )


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return wrap(
        tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


@pytest.fixture(scope="module")
def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def byte_fallback():
    """The shape of Llama's tokenizer: ▁ for spaces, <0x..> for what has no piece."""
    pieces = ["<unk>", "<s>", "▁", "a", "▁a", "▁the", "t", "e"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    vocab.update({f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)})
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(tokenizer, unk_token="<unk>", bos_token="<s>")


def read(prompt, tokenizer=None, vocab_size=100, max_positions=None, **options):
    return read_prompt(
        prompt, tokenizer=tokenizer, vocab_size=vocab_size, max_positions=max_positions, **options
    )


def refusal(error, prompt, tokenizer=None, **options):
    with pytest.raises(error) as caught:
        read(prompt, tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 1, 4],
        (3, 1, 4),
        [[3, 1, 4]],
        [np.int64(3), np.uint8(1), torch.tensor(4)],
        torch.tensor([3, 1, 4]),
        torch.tensor([[3, 1, 4]], dtype=torch.int32),
        torch.tensor([3, 1, 4], dtype=torch.uint8),
        torch.tensor([3, 1, 4], dtype=torch.uint64),
        np.array([3, 1, 4]),
        np.array([[3, 1, 4]], dtype=np.uint64),
        [torch.tensor([3, 1, 4])],
    ],
    ids=repr,
)
def test_ids_in_every_form(prompt):
    found = read(prompt)
    assert found.ids.dtype == torch.int64
    assert found.ids.tolist() == [3, 1, 4]
    assert found.strings == ("<3>", "<1>", "<4>")


def test_a_range_is_a_sequence_of_ids():
    assert read(range(5)).ids.tolist() == [0, 1, 2, 3, 4]


def test_the_prompt_does_not_share_the_callers_memory():
    given_ids = torch.tensor([3, 1, 4])
    found = read(given_ids)
    given_ids[0] = 9
    assert found.ids.tolist() == [3, 1, 4]


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=8))
def test_a_list_is_read_exactly_or_refused_with_its_first_bad_id(ids):
    bad = [(n, i) for n, i in enumerate(ids) if not 0 <= i < 100]
    if not bad:
        assert read(ids).ids.tolist() == ids
        return
    message = refusal(errors.TokenIdError, ids)
    assert f"token id {bad[0][1]} at position {bad[0][0]} " in message
    assert "0–99" in message


def test_ids_that_no_int64_holds_are_named_as_they_are():
    assert str(2**64 - 1) in refusal(errors.TokenIdError, np.array([2**64 - 1], dtype=np.uint64))
    assert str(2**64 - 1) in refusal(
        errors.TokenIdError, torch.tensor([2**64 - 1], dtype=torch.uint64)
    )


@pytest.mark.parametrize("ids", [[5, 100], [5, -1], torch.tensor([5, 100]), np.array([[5, -1]])])
def test_ids_outside_the_vocabulary(ids):
    bad = torch.as_tensor(ids).reshape(-1)[1].item()
    assert f"token id {bad} at position 1 is out of range" in refusal(errors.TokenIdError, ids)


def test_the_last_id_of_the_vocabulary_is_in_range():
    assert read([99]).ids.tolist() == [99]


@pytest.mark.parametrize(
    "prompt",
    ["", [], (), [[]], torch.empty(0, dtype=torch.long), torch.empty(1, 0, dtype=torch.long)],
    ids=repr,
)
def test_empty_prompts(prompt, word_piece):
    assert "prompt is empty" in refusal(errors.EmptyPromptError, prompt, word_piece)


def test_text_that_gives_no_token_is_empty(byte_level, word_piece):
    assert read(" ", word_piece, vocab_size=len(word_piece)).strings == ("[CLS]", "[SEP]")
    message = refusal(errors.EmptyPromptError, " ", word_piece, add_special_tokens=False)
    assert "prompt is empty" in message


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        ([1.0, 2.0], "float at position 0 (1.0)"),
        ([1, True], "bool at position 1 (True)"),
        ([1, np.float32(2)], "float32 at position 1"),
        ([np.bool_(True)], "bool at position 0"),
        ([torch.tensor(True)], "bool at position 0"),
        ([1, None], "NoneType at position 1 (None)"),
        ([1, 2 + 0j], "complex at position 1"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([True]), "bool"),
        (torch.tensor([1], dtype=torch.bfloat16), "bfloat16"),
        (np.array([1.0]), "float64"),
        (np.array([True]), "bool"),
        (np.array(["a"]), "<U1"),
        (np.array([None]), "object"),
    ],
    ids=repr,
)
def test_ids_that_are_no_integers(prompt, value):
    assert value in refusal(errors.DtypeError, prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        torch.zeros(2, 3, dtype=torch.long),
        np.zeros((2, 3), dtype=np.int64),
        [[1, 2], [3]],
        ["one", "two"],
        ["one"],
        [torch.tensor([1]), torch.tensor([2])],
    ],
    ids=repr,
)
def test_several_rows_point_to_capture_many(prompt, word_piece):
    assert "capture_many" in refusal(errors.ShapeError, prompt, word_piece)


@pytest.mark.parametrize("shape", [(), (1, 1, 3)])
def test_other_ranks(shape):
    assert f"shape {list(shape)}" in refusal(
        errors.ShapeError, torch.zeros(shape, dtype=torch.long)
    )


@pytest.mark.parametrize("prompt", [None, 7, b"text", {1, 2}, Ellipsis], ids=repr)
def test_what_is_no_prompt(prompt):
    assert type(prompt).__name__ in refusal(errors.UsageError, prompt)


def test_a_meta_tensor_holds_no_ids():
    assert "meta" in refusal(errors.UsageError, torch.empty(3, dtype=torch.long, device="meta"))


def test_too_long_for_the_positions(word_piece):
    assert len(read([1] * 8, max_positions=8).ids) == 8
    message = refusal(errors.PromptTooLongError, [1] * 9, max_positions=8)
    assert "9 tokens" in message
    assert "8 positions" in message
    refusal(errors.PromptTooLongError, "the cat sat on the mat", word_piece, max_positions=4)


def test_text_without_a_tokenizer():
    assert "no tokenizer" in refusal(errors.NoTokenizerError, "text")


def test_a_lone_surrogate_is_no_text(byte_level):
    assert "U+D83D" in refusal(errors.PromptError, "ab\ud83d", byte_level)


def test_a_tokenizer_with_more_tokens_than_the_model(byte_level):
    message = refusal(errors.TokenIdError, "the cat", byte_level, vocab_size=10)
    assert "the tokenizer knows more tokens than this model" in message


def test_special_tokens_are_added_on_request(word_piece):
    with_special = read("the cat", word_piece, vocab_size=200)
    without = read("the cat", word_piece, vocab_size=200, add_special_tokens=False)
    assert with_special.strings == ("[CLS]", *without.strings, "[SEP]")


def test_a_tokenizers_stored_truncation_and_padding_do_not_apply(word_piece):
    word_piece.backend_tokenizer.enable_truncation(3)
    word_piece.backend_tokenizer.enable_padding(length=12)
    text = "the cat sat on the mat"
    found = read(text, word_piece, vocab_size=200, add_special_tokens=False)
    assert "[PAD]" not in found.strings
    assert "".join(s.removeprefix("##") for s in found.strings) == text.replace(" ", "")


@given(st.text(min_size=1, max_size=30))
def test_byte_level_strings_put_together_are_the_text(byte_level, text):
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    strings = token_strings(ids, byte_level)
    assert "Ġ" not in "".join(strings) or "Ġ" in text
    parts = b"".join(
        bytes.fromhex(s[3:5]) if s.startswith("<0x") and len(s) == 6 else raw_of(s) for s in strings
    )
    # A text that itself contains "<0x..>" would be read as bytes by this test, not by the code.
    if "<0x" not in text:
        assert parts.decode("utf-8") == text


def raw_of(string: str) -> bytes:
    out = b""
    while string:
        if string.startswith("<0x") and string[5:6] == ">":
            out += bytes([int(string[3:5], 16)])
            string = string[6:]
        else:
            out += string[0].encode("utf-8")
            string = string[1:]
    return out


def test_byte_level_strings(byte_level):
    found = read("the cat\n日", byte_level, vocab_size=len(byte_level))
    assert found.strings[0] == "the"
    assert found.strings[1].startswith(" ")
    assert found.strings[-4:] == ("\n", "<0xE6>", "<0x97>", "<0xA5>")
    end = byte_level.convert_tokens_to_ids("<|endoftext|>")
    assert token_strings([end], byte_level) == ("<|endoftext|>",)


def test_a_byte_level_piece_of_several_bytes_reads_as_its_letter():
    vocab = {"a": 0, "Ã": 1, "©": 2, "Ã©": 3, "aÃ©": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ã", "©"), ("a", "Ã©")]))
    tokenizer.decoder = decoders.ByteLevel()
    strings = token_strings([4, 3, 1, 2], wrap(tokenizer))
    assert strings == ("aé", "é", "<0xC3>", "<0xA9>")


def test_an_added_token_reads_as_it_was_added(byte_level_with_added):
    tokenizer = byte_level_with_added
    ids = tokenizer("the<é>cat")["input_ids"]
    assert "<é>" in token_strings(ids, tokenizer)


@pytest.fixture
def byte_level_with_added(byte_level):
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    )
    copy.add_tokens([AddedToken("<é>", normalized=False)])
    return copy


def test_word_piece_strings_keep_their_marks(word_piece):
    text = "the catting log"
    found = read(text, word_piece, vocab_size=len(word_piece), add_special_tokens=False)
    assert found.strings == tuple(word_piece.tokenize(text))
    assert any(s.startswith("##") for s in found.strings)
    assert found.strings[0] == "the"


def test_unigram_strings_have_their_spaces_back(unigram):
    text = "the cat sat"
    found = read(text, unigram, vocab_size=len(unigram), add_special_tokens=False)
    assert "".join(found.strings) == f" {text}"
    assert not any("▁" in s for s in found.strings)


def test_byte_fallback_strings(byte_fallback):
    ids = byte_fallback("a é\n", add_special_tokens=False)["input_ids"]
    assert token_strings(ids, byte_fallback) == (" a", " ", "<0xC3>", "<0xA9>", "\n")


def test_a_literal_metaspace_of_another_vocabulary_stays():
    vocab = {"[UNK]": 0, "▁": 1, "Ġ": 2, "Ġa": 3, "</w>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert token_strings([1, 2, 3, 4], wrap(tokenizer)) == ("▁", "Ġ", "Ġa", "</w>")


def test_a_word_end_mark_reads_as_a_space():
    vocab = {"the": 0, "the</w>": 1, "re": 2}
    tokenizer = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    assert token_strings([1, 0, 2], wrap(tokenizer)) == ("the ", "the", "re")


def test_an_id_that_the_tokenizer_does_not_know_reads_as_a_number(byte_level):
    beyond = len(byte_level) + 5
    assert token_strings([beyond], byte_level) == (f"<{beyond}>",)


TINY = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def test_vocab_size_counts_the_rows_of_the_embedding():
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.resize_token_embeddings(61)
    model.config.vocab_size = 7
    assert vocab_size_of(model) == 61


def test_a_model_without_tokens_has_no_vocabulary():
    with pytest.raises(errors.UsageError, match="Linear has no input embedding"):
        vocab_size_of(torch.nn.Linear(2, 2))


def test_positions_of_configurations():
    assert max_positions_of(GPT2Config(n_positions=77)) == 77
    assert max_positions_of(LlamaConfig(max_position_embeddings=123)) == 123
    assert max_positions_of(MambaConfig()) is None


def test_positions_of_models_with_and_without_rows_for_padding():
    roberta = RobertaModel(RobertaConfig(**TINY, max_position_embeddings=20, pad_token_id=1))
    bert = BertModel(BertConfig(**TINY, max_position_embeddings=20))
    assert max_positions_of(roberta) == 18
    assert max_positions_of(bert) == 20
    for model, limit in ((roberta, 18), (bert, 20)):
        with torch.no_grad():
            model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))


def test_pad_id_prefers_the_models_own(word_piece, byte_level):
    config = LlamaConfig(**TINY, pad_token_id=7, eos_token_id=3)
    assert pad_id_for(word_piece, config, 50) == 7
    config.pad_token_id = None
    assert pad_id_for(word_piece, config, 50) == 0
    assert pad_id_for(None, config, 50) == 3
    config.eos_token_id = [4, 5]
    assert pad_id_for(None, config, 50) == 4
    assert pad_id_for(None, config, 3) == 0


@given(
    st.one_of(
        st.text(max_size=20),
        st.binary(max_size=5),
        st.none(),
        st.floats(),
        st.lists(
            st.one_of(st.integers(-5, 120), st.floats(), st.booleans(), st.text()), max_size=5
        ),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=6),
    )
)
def test_anything_is_read_or_refused_by_an_own_error(byte_level, prompt):
    try:
        found = read(prompt, byte_level, vocab_size=len(byte_level), max_positions=12)
    except errors.TrilensError as error:
        assert str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert 1 <= len(found.ids) <= 12
        assert len(found.strings) == len(found.ids)
