"""A tokenizer as a GGUF file states it: tokens, kinds, merges, and how text is cut before them.

The engine has its own tokenizers. The file names one (`tokenizer.ggml.pre`), so a tokenizer
is matched by what it does (its regular expressions, its special tokens seen around a text), and
refused by name where the engine has none that does the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gguf import GGUFWriter, TokenType

from trilens.checkpoint.gguf.sentencepiece import is_sentencepiece, piece_scores, prepends_space
from trilens.errors import NoTokenizerError, UsageError
from trilens.io.messages import clip

__all__ = ["PRE_TOKENIZERS", "Vocabulary", "read_vocabulary"]

_GPT2 = "byte-level with its own expression"
_DIGITS = "single digits"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORD + r"|\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: MappingProxyType[tuple[tuple[str, ...], bool], str] = MappingProxyType(
    {
        ((_GPT2,), False): "gpt-2",
        ((_DIGITS, _GPT2), False): "starcoder",
        ((_LLAMA3,), True): "llama-bpe",
        ((_LLAMA3,), False): "dbrx",
        ((_QWEN2,), False): "qwen2",
        ((_TEKKEN,), True): "tekken",
    }
)
"""Steps before the merges, and whether whole words of the vocabulary skip them → engine's name.

Source: llama.cpp, `src/llama-vocab.cpp`.
"""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the file holds about a tokenizer.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for BPE over characters (see `sentencepiece`).
        pre: The engine's name for what happens before the merges.
        tokens: Every token, one for each row of the embedding.
        types: The kind of each.
        merges: Pairs of tokens in the order of their rank; empty for "llama".
        scores: For "llama", the rank of each token; else empty.
        specials: Ids of special tokens by their GGUF names ("bos", "eos", …).
        add_bos: A text is begun with bos.
        add_eos: A text is ended with eos.
        add_space_prefix: A text is begun with a space; None where the engine does not ask.
        chat_template: Jinja text, or "".
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    specials: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str

    def describe(self, writer: GGUFWriter) -> None:
        """Add everything to a writer."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        add = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unknown": writer.add_unk_token_id,
            "padding": writer.add_pad_token_id,
        }
        for name, token_id in self.specials.items():
            add[name](token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, config: Any, n_rows: int, source: str) -> Vocabulary:
    """Read a tokenizer of transformers.

    Args:
        tokenizer: it, or None.
        config: of the model: special tokens that the tokenizer does not name.
        n_rows: rows of the embedding; those past the vocabulary become unused tokens.
        source: what errors call the checkpoint.

    Raises:
        NoTokenizerError: there is none.
        UsageError: one that the engine has no equal for; says in what.
    """
    if tokenizer is None:
        raise NoTokenizerError(
            f"{source} has no tokenizer, and a GGUF file holds one: add tokenizer.json"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unfit(source, f"{type(tokenizer).__name__} is not of the tokenizers library")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        raise _unfit(source, f"its model is {model.get('type')}, only BPE can be written")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _unfit(source, f"{option} is {model[option]!r}, which the engine does not know")
    tokens, types = _tokens(parts, n_rows, source)
    add_bos, add_eos, specials = _special_tokens(tokenizer, config, source)
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    pieces = is_sentencepiece(parts)
    try:
        scores = piece_scores(model["vocab"], pairs) if pieces else {}
    except UsageError as cause:
        raise _unfit(source, str(cause)) from cause
    merges = () if pieces else tuple(" ".join(pair) for pair in pairs)
    if not pieces and not merges:
        raise _unfit(source, "it has no merges")
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre_tokenizer(parts, source),
        tokens=tokens,
        types=types,
        merges=merges,
        scores=tuple(scores.get(token, 0.0) for token in tokens) if pieces else (),
        specials=specials,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prepends_space(parts) if pieces else None,
        chat_template=_template(tokenizer),
    )


def _tokens(
    parts: Mapping[str, Any], n_rows: int, source: str
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    tokens = [f"[PAD{row}]" for row in range(n_rows)]
    types = [TokenType.UNUSED] * n_rows
    vocab: dict[str, int] = parts["model"]["vocab"]
    added = {int(token["id"]): token for token in parts["added_tokens"]}
    most = max([*vocab.values(), *added], default=-1)
    if most >= n_rows:
        raise _unfit(source, f"it has the token id {most}, the embedding has {n_rows} rows")
    fallback = bool(parts["model"].get("byte_fallback"))
    unknown = parts["model"].get("unk_token")
    for text, row in vocab.items():
        tokens[row], types[row] = text, TokenType.NORMAL
        if text == unknown:
            types[row] = TokenType.UNKNOWN
        elif fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[row] = TokenType.BYTE
    for row, token in added.items():
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise _unfit(
                    source,
                    f"its token {clip(token['content'])} has {option}, which the engine does not "
                    "know",
                )
        tokens[row] = token["content"]
        if types[row] is not TokenType.UNKNOWN:
            types[row] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    twice = len(tokens) - len(set(tokens))
    if twice:
        raise _unfit(source, f"{twice} of its tokens are there twice")
    return tuple(tokens), tuple(types)


def _pre_tokenizer(parts: Mapping[str, Any], source: str) -> str:
    """The engine's name for what is done to a text before the merges."""
    normalizer = parts.get("normalizer")
    # The engine takes text as it comes; NFC changes only text that is not in that form already.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _unfit(source, f"its normalizer {clip(normalizer.get('type'))} is not known")
    step = parts.get("pre_tokenizer") or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    found = tuple(name for name in map(_step_name, steps) if name)
    ignores = bool(parts["model"].get("ignore_merges"))
    # Also where merges are not skipped at first, a word that is a token is mostly its own merge;
    # "mostly" is not enough for a name to be given.
    if (found, ignores) not in PRE_TOKENIZERS or steps[-1]["type"] != "ByteLevel":
        raise _unfit(
            source,
            f"its pre-tokenizer {clip(json.dumps(step, ensure_ascii=False), 300)} (ignore_merges "
            f"{ignores}) has no equal in the engine; known are "
            f"{', '.join(PRE_TOKENIZERS.values())}",
        )
    return PRE_TOKENIZERS[found, ignores]


def _step_name(step: Mapping[str, Any]) -> str:
    """One step in words; "" for one that only turns text to bytes."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return _GPT2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return _DIGITS
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", "a fixed text"))
    return f"unknown {step['type']}"


def _special_tokens(tokenizer: Any, config: Any, source: str) -> tuple[bool, bool, dict[str, int]]:
    """Whether a text gets bos and eos, and the ids of the special tokens."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if at is None or at > 1 or len(whole) - at - len(plain) > 1:
        raise _unfit(source, "it puts more than one token before or after a text")
    add_bos, add_eos = at == 1, len(whole) > at + len(plain)
    eos = whole[-1] if add_eos else _first_id(tokenizer.eos_token_id, config.eos_token_id)
    if eos is None:
        raise _unfit(source, "neither it nor config.json names an eos token; the engine needs one")
    bos = whole[0] if add_bos else _first_id(tokenizer.bos_token_id, config.bos_token_id)
    specials = {"bos": eos if bos is None else bos, "eos": eos}
    others = {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    specials |= {name: token_id for name, token_id in others.items() if token_id is not None}
    return add_bos, add_eos, specials


def _first_id(*wanted: Any) -> int | None:
    for value in wanted:
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, int):
            return first
    return None


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""


def _unfit(source: str, why: str) -> UsageError:
    return UsageError(f"tokenizer of {source} cannot be written to GGUF: {why}")
