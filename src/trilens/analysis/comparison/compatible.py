"""Whether two models can be compared at all: same depth, width, vocabulary, tokenizer, shapes."""

from __future__ import annotations

from typing import Any

from trilens.analysis.comparison.weights import matrix_shapes
from trilens.errors import IncomparableError
from trilens.io.messages import clip, listed
from trilens.lens.lens import Lens
from trilens.models.tokens import vocab_size_of

__all__ = ["check_comparable", "differing_tokenizers", "shared_vocabulary"]

_SHOWN = 3


def check_comparable(before: Lens, after: Lens) -> None:
    """Refuse two models whose numbers would not stand for the same things.

    Families need not agree: what has the same shape can be compared.

    Raises:
        IncomparableError: saying everything that differs.
    """
    differences = []
    shared = shared_vocabulary(before, after)
    for what, mine, other in (
        ("layers", before.n_layers, after.n_layers),
        ("d_model", before.d_model, after.d_model),
        ("residual streams", before.n_streams, after.n_streams),
        ("tokens in the vocabulary", before.anatomy.vocab, after.anatomy.vocab),
    ):
        if mine != other and (what != "tokens in the vocabulary" or shared is None):
            differences.append(f"{mine} {what} before, {other} after")
    if shared is None and None not in (before.tokenizer, after.tokenizer):
        differences += differing_tokenizers(before.tokenizer, after.tokenizer)
    if not differences:
        differences = _shapes(before, after)
    if differences:
        raise IncomparableError(
            f"models differ: {'; '.join(differences)}. Only models of the same shape and tokens "
            "can be compared, such as a model and a ternary, fine-tuned or rounded copy of it"
        )


def shared_vocabulary(before: Lens, after: Lens) -> int | None:
    """How many ids, from 0 up, are the same tokens to both models.

    Vocabularies may end differently: padded to a round number, or with tokens that were added.

    Returns:
        Their number; all of them, where no tokenizers are there to say otherwise. None where the
        vocabularies differ in size without tokenizers, or in a token below another that they share.
    """
    sizes = before.anatomy.vocab or 0, after.anatomy.vocab or 0
    # One of another library may list no tokens; the ids of each text are compared all the same.
    if not all(hasattr(each.tokenizer, "get_vocab") for each in (before, after)):
        return sizes[0] if sizes[0] == sizes[1] else None
    mine: dict[str, int] = before.tokenizer.get_vocab()
    other: dict[str, int] = after.tokenizer.get_vocab()
    if any(mine[token] != other[token] for token in mine.keys() & other.keys()):
        return None
    common = mine.items() & other.items()
    alone = [number for _, number in mine.items() ^ other.items()]
    if alone and min(alone) <= max((number for _, number in common), default=-1):
        return None
    return min(*sizes, *alone)


def differing_tokenizers(before: Any, after: Any) -> list[str]:
    """What differs between two vocabularies, in words; nothing where they are the same."""
    if not (hasattr(before, "get_vocab") and hasattr(after, "get_vocab")):
        return []  # of another library; the ids of each text are compared all the same
    mine, other = before.get_vocab(), after.get_vocab()
    if mine == other:
        return []
    found = []
    for name, left, right in (("before", mine, other), ("after", other, mine)):
        alone = sorted(left.keys() - right.keys())
        if alone:
            some = listed(map(repr, alone), _SHOWN)
            found.append(f"{len(alone)} tokens only in the tokenizer {name}, such as {some}")
    moved = sorted(token for token in mine.keys() & other.keys() if mine[token] != other[token])
    if moved:
        one = moved[0]
        found.append(
            f"{len(moved)} tokens with another id, such as {clip(one)}: {mine[one]} before, "
            f"{other[one]} after"
        )
    return found


def _shapes(before: Lens, after: Lens) -> list[str]:
    mine, other = matrix_shapes(before.model), matrix_shapes(after.model)
    sizes = vocab_size_of(before.model), vocab_size_of(after.model)
    rows = {(sizes[0], sizes[1]), (before.anatomy.vocab, after.anatomy.vocab)}
    odd = [
        name
        for name in mine.keys() & other.keys()
        if mine[name] != other[name]
        and (mine[name][1:] != other[name][1:] or (mine[name][0], other[name][0]) not in rows)
    ]
    if not odd:
        return []
    some = (
        f"{name} is {list(mine[name])} before, {list(other[name])} after" for name in sorted(odd)
    )
    return [listed(some, _SHOWN)]
