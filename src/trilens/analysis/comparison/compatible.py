"""Whether two models can be compared at all: same depth, width, vocabulary, tokenizer, shapes."""

from __future__ import annotations

from typing import Any

from trilens.analysis.comparison.weights import matrix_shapes
from trilens.errors import IncomparableError
from trilens.io.messages import clip, listed
from trilens.lens.lens import Lens

__all__ = ["check_comparable", "differing_tokenizers"]

_SHOWN = 3


def check_comparable(before: Lens, after: Lens) -> None:
    """Refuse two models whose numbers would not stand for the same things.

    Families need not agree: what has the same shape can be compared.

    Raises:
        IncomparableError: saying everything that differs.
    """
    differences = []
    for what, mine, other in (
        ("layers", before.n_layers, after.n_layers),
        ("d_model", before.d_model, after.d_model),
        ("tokens in the vocabulary", before.anatomy.vocab, after.anatomy.vocab),
    ):
        if mine != other:
            differences.append(f"{mine} {what} before, {other} after")
    if before.tokenizer is not None and after.tokenizer is not None:
        differences += differing_tokenizers(before.tokenizer, after.tokenizer)
    if not differences:
        differences = _shapes(before, after)
    if differences:
        raise IncomparableError(
            f"models differ: {'; '.join(differences)}. Only models of the same shape and tokens "
            "can be compared, such as a model and a ternary, fine-tuned or rounded copy of it"
        )


def differing_tokenizers(before: Any, after: Any) -> list[str]:
    """What differs between two vocabularies, in words; nothing where they are the same."""
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
    odd = [name for name in mine.keys() & other.keys() if mine[name] != other[name]]
    if not odd:
        return []
    some = (
        f"{name} is {list(mine[name])} before, {list(other[name])} after" for name in sorted(odd)
    )
    return [listed(some, _SHOWN)]
