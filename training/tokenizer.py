"""The demo models' byte-level BPE tokenizer, trained on the training documents only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trilens.demo.corpus import Document

__all__ = ["END_OF_TEXT", "save_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""The one special token: it opens every document (bos), separates documents (eos) and pads."""


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int, context: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly ``vocab_size`` entries, the special token included.

    Args:
        documents: training text, in a fixed order (the result depends on nothing else).
        vocab_size: number of token ids; every byte is one of them, so any text round-trips.
        context: the longest input, in tokens, that the model was trained for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save for ``AutoTokenizer``, with tokenizer.json compacted (the default is indented)."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact + "\n", encoding="utf-8")
