"""BPE over characters with bytes to fall back on, as SentencePiece has it, in the engine's terms.

The engine keeps no merges for such a vocabulary: it joins the neighbours whose union has the best
score, whatever the two are. That gives what the merges give exactly if every way to cut a token in
two known tokens is a merge, and the merges of one token follow one another. Both are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trilens.errors import UsageError
from trilens.io.messages import clip

__all__ = ["is_sentencepiece", "piece_scores", "prepends_space"]

_SPACE = "▁"


def is_sentencepiece(parts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer (of tokenizer.json) writes spaces as ▁ and falls back on bytes."""
    if not parts["model"].get("byte_fallback"):
        return False
    known = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = _steps(parts.get("normalizer"), "normalizers")
    others = [step for step in steps if step != known and not _is_prefix(step)]
    return not others and _cuts_nothing(parts.get("pre_tokenizer"), known in steps)


def prepends_space(parts: Mapping[str, Any]) -> bool:
    """Whether such a tokenizer begins a text with a space."""
    steps = _steps(parts.get("normalizer"), "normalizers")
    pre = parts.get("pre_tokenizer") or {}
    return any(map(_is_prefix, steps)) or pre.get("prepend_scheme") in {"always", "first"}


def piece_scores(vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """The score of each token that a merge makes: the earlier, the higher.

    Raises:
        UsageError: merges that no scores stand for; says which.
    """
    scores: dict[str, float] = {}
    last = ""
    for pair in merges:
        token = "".join(pair)
        if token != last and token in scores:
            raise UsageError(f"its merges of {clip(token)} do not follow one another")
        scores.setdefault(token, -float(len(scores) + 1))
        last = token
    there = set(merges)
    for token in vocab:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in there:
                raise UsageError(f"its token {clip(token)} is not merged from {clip(pair)}")
    return scores


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _is_prefix(step: Mapping[str, Any]) -> bool:
    return step == {"type": "Prepend", "prepend": _SPACE}


def _cuts_nothing(step: Mapping[str, Any] | None, replaced: bool) -> bool:
    """Whether the whole text reaches the merges, with ▁ for each space."""
    if step is None:
        return replaced
    if step["type"] == "Metaspace":
        return step.get("replacement") == _SPACE and step.get("split") is False
    # A split at spaces, of which none is left.
    return replaced and step["type"] == "Split" and step.get("pattern") == {"String": " "}
