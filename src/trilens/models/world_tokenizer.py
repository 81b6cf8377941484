"""RWKV's vocabulary file → a tokenizer of transformers that gives the same ids, exactly.

The file's tokenizer takes the longest token that the bytes begin with, again and again. So does
WordPiece within a word. Words are cut between two bytes that no token holds side by side, where
the longest match has to end anyway; so the cut changes nothing and keeps words short.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trilens.errors import CorruptFileError
from trilens.io.guarded import read_bytes
from trilens.models.token_strings import BYTE_OF

__all__ = ["END_OF_TEXT", "world_tokenizer"]

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
"""How published checkpoints write token 0, which the vocabulary file leaves free."""

_LIMIT_BYTES = 64 << 20
_BYTE_VALUES = range(256)


def world_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a vocabulary file such as ``rwkv_vocab_v20230424.txt``.

    Ids of every text are those of the file's own tokenizer, but for `END_OF_TEXT`, which reads as
    token 0: the first token, the last and the padding.

    Args:
        path: lines of an id, a Python literal of text or bytes, and its length in bytes.

    Raises:
        CorruptFileError: it can't be read, is of another kind, or lacks one of the 256 bytes.
    """
    vocabulary = _read(path)
    alphabet = {byte: char for char, byte in BYTE_OF.items()}
    written = {"".join(alphabet[byte] for byte in t): i for t, i in vocabulary.items()}
    model = models.WordPiece(
        {END_OF_TEXT: 0, **written},
        unk_token=END_OF_TEXT,  # never met: every byte is a token
        max_input_chars_per_word=1 << 31,
        continuing_subword_prefix="",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(_cuts(vocabulary, alphabet)), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _read(path: Path) -> dict[bytes, int]:
    text = read_bytes(path, CorruptFileError, max_bytes=_LIMIT_BYTES).decode("utf-8", "replace")
    found: dict[bytes, int] = {}
    # Tokens hold other line ends only as escapes; "\n" alone ends a line.
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        try:
            index, rest = line.split(" ", 1)
            literal, size = rest.rsplit(" ", 1)
            value = ast.literal_eval(literal)
            token = value.encode() if isinstance(value, str) else bytes(value)
            token_id, length = int(index), int(size)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as cause:
            raise CorruptFileError(
                f"line {number} of {path} is not that of an RWKV vocabulary: an id, a Python "
                "literal and a length are needed"
            ) from cause
        if token_id < 1 or len(token) != length or not token or token in found:
            raise CorruptFileError(
                f"line {number} of {path} is no token of an RWKV vocabulary: ids begin at 1, "
                "lengths count bytes, and no token comes twice"
            )
        found[token] = token_id
    missing = [byte for byte in _BYTE_VALUES if bytes([byte]) not in found]
    if missing or len(set(found.values())) != len(found):
        raise CorruptFileError(
            f"{path} is no whole RWKV vocabulary: {len(missing)} of the 256 single bytes have no "
            "token, or an id comes twice"
        )
    return found


def _cuts(vocabulary: Mapping[bytes, int], alphabet: Mapping[int, str]) -> str:
    """An expression for every place between two bytes that no token holds side by side."""
    after: dict[int, set[int]] = defaultdict(set)
    for token in vocabulary:
        for left, right in pairwise(token):
            after[left].add(right)
    groups: dict[frozenset[int], list[int]] = defaultdict(list)
    for left in _BYTE_VALUES:
        groups[frozenset(_BYTE_VALUES) - after[left]].append(left)

    def one_of(values: list[int]) -> str:
        return "[" + "".join(f"\\x{{{ord(alphabet[byte]):04X}}}" for byte in sorted(values)) + "]"

    return "|".join(
        f"(?<={one_of(left)})(?={one_of(list(right))})" for right, left in groups.items() if right
    )
