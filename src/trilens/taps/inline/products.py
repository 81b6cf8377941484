"""Matrix products of attention, in the forms in which models write them.

Heads are an axis of their own or folded into the batch; an einsum names its axes in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["PRODUCTS", "Product", "by_head", "product_of", "term_by_head"]

_PLAIN = {"matmul", "__matmul__", "bmm"}
PRODUCTS = _PLAIN | {"baddbmm", "einsum"}
"""Functions that multiply two stacks of matrices."""

_Place = int | str


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """One product of two stacks of matrices: result = alpha · left @ right + beta · base.

    Shapes
        left [batch, heads, rows, inner], right [batch, heads, inner, columns], as views.

    Attributes:
        given: the left operand as it was given.
        base: of a baddbmm what is added, as it was given; None elsewhere.
        places: of the operands among the arguments: a number, or a keyword.
        letters: of an einsum, per operand and result which axes are batch, head, row and column.
    """

    left: Tensor
    right: Tensor
    given: Tensor
    base: Tensor | None
    alpha: float
    beta: float
    places: tuple[_Place, _Place]
    letters: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None
    batch: int

    def replaced(
        self, args: tuple[Any, ...], options: dict[str, Any], left: Tensor, right: Tensor
    ) -> tuple[Any, ...]:
        """The call's arguments with other operands; those by keyword are put into `options`."""
        for number, (place, new, old) in enumerate(
            zip(self.places, (left, right), (self.left, self.right), strict=True)
        ):
            if new is old:
                continue
            value = self._as_given(new, _at(args, options, place), number)
            if isinstance(place, str):
                options[place] = value
            else:
                args = (*args[:place], value, *args[place + 1 :])
        return args

    def result(self, tensor: Tensor) -> Tensor | None:
        """What the product gave, as [batch, heads, rows, columns]; None in another form."""
        if self.letters is not None:
            return tensor.permute(self.letters[2])
        return by_head(tensor, self.batch)

    def as_result(self, tensor: Tensor, like: Tensor) -> Tensor:
        """[batch, heads, rows, columns] in the form in which the product gives it."""
        return self._as_given(tensor, like, 2)

    def _as_given(self, tensor: Tensor, like: Tensor, number: int) -> Tensor:
        if self.letters is None:
            return tensor.reshape(like.shape)
        axes = self.letters[number]
        return tensor.permute([axes.index(axis) for axis in range(len(axes))])


def product_of(
    name: str, args: tuple[Any, ...], options: dict[str, Any], batch: int
) -> Product | None:
    """The product that a function call is; None where it is none over heads and tokens.

    Args:
        name: of the function, one of `PRODUCTS`.
        args: what it is called with; `options` by keyword.
        batch: prompts in the batch, by which a folded axis is taken apart.
    """
    if name == "einsum":
        return _einsum(args, batch)
    places: tuple[_Place, _Place] = (0, 1)
    base: Any = None
    if name == "baddbmm":
        places = (1 if len(args) > 1 else "batch1", 2 if len(args) > 2 else "batch2")
        base = _at(args, options, 0 if args else "input")
    left, right = (_at(args, options, place) for place in places)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    own = by_head(left, batch), by_head(right, batch)
    if own[0] is None or own[1] is None:
        return None
    alpha, beta = (options.get(key, 1) for key in ("alpha", "beta"))
    return Product(own[0], own[1], left, base, float(alpha), float(beta), places, None, batch)


def by_head(tensor: Tensor, batch: int) -> Tensor | None:
    """[batch, heads, rows, columns] of a tensor that has heads in an axis of its own or not."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 3 and batch and tensor.shape[0] % batch == 0:
        return tensor.view(batch, tensor.shape[0] // batch, *tensor.shape[1:])
    return None


def term_by_head(term: Tensor, like: Tensor, batch: int, keys: int) -> Tensor | None:
    """What is added to scores, as [1 or batch, 1 or heads, 1 or rows, keys].

    Args:
        term: broadcasts over `like`.
        like: the scores as they are, [batch, heads, rows, keys] or [batch · heads, rows, keys].
        batch: prompts in the batch.
        keys: key positions.
    """
    whole: Tensor | None = term
    if like.dim() == 3 and term.dim() == 3 and term.shape[0] > 1:
        whole = by_head(term, batch)
    elif term.dim() < 4:
        whole = term[(None,) * (4 - term.dim())]
    if whole is None or whole.dim() != 4 or whole.shape[-1] not in (1, keys):
        return None
    return whole if whole.shape[-1] == keys else whole.expand(*whole.shape[:-1], keys)


def _at(args: tuple[Any, ...], options: dict[str, Any], place: _Place) -> Any:
    if isinstance(place, str):
        return options.get(place)
    return args[place] if place < len(args) else None


def _einsum(args: tuple[Any, ...], batch: int) -> Product | None:
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    left, right = args[1:]
    inputs, arrow, out = args[0].replace(" ", "").partition("->")
    a, comma, b = inputs.partition(",")
    if not arrow or not comma or not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if not len(a) == len(b) == len(out) == 4 or "." in args[0]:
        return None
    shared = [letter for letter in out if letter in a and letter in b]
    inner = [letter for letter in a if letter in b and letter not in out]
    row = [letter for letter in a if letter in out and letter not in b]
    column = [letter for letter in b if letter in out and letter not in a]
    if len(shared) != 2 or not len(inner) == len(row) == len(column) == 1:
        return None
    first, second = shared
    if left.shape[a.index(first)] != batch:
        first, second = second, first
    if left.shape[a.index(first)] != batch:
        return None
    orders = (
        (a, (first, second, row[0], inner[0])),
        (b, (first, second, inner[0], column[0])),
        (out, (first, second, row[0], column[0])),
    )
    axes = tuple(tuple(own.index(letter) for letter in order) for own, order in orders)
    return Product(
        left.permute(axes[0]), right.permute(axes[1]), left, None, 1.0, 1.0, (1, 2),
        (axes[0], axes[1], axes[2]), batch,
    )  # fmt: skip
