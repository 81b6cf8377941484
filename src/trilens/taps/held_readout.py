"""The readout of several streams as a linear map: the weights that it computes of them are held.

A readout weighs the streams by numbers that it makes of the streams themselves: sigmoids, norms,
magnitudes. With these at their measured values what is left is linear. It is found by running the
model's own code and letting gradients through nothing but linear steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from trilens.errors import CaptureError, ShapeError
from trilens.models.anatomy import Anatomy
from trilens.taps.mode import frozen
from trilens.taps.readout import run_readout

__all__ = ["held_readout"]

_SUMS = ("add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "neg", "sum", "mean")
_JOINS = ("stack", "cat", "concat", "concatenate", "chunk", "split", "unbind", "clone")
_VIEWS = (
    *("reshape", "view", "view_as", "flatten", "unflatten", "permute", "transpose", "swapaxes"),
    *("movedim", "moveaxis", "getitem", "setitem", "get", "select", "narrow", "index_select"),
    *("unsqueeze", "squeeze", "expand", "expand_as", "repeat", "repeat_interleave", "tile"),
    *("contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "copy"),
)
_LINEAR = frozenset((*_SUMS, *_JOINS, *_VIEWS))
_PRODUCTS = frozenset(
    ("mul", "rmul", "imul", "multiply", "matmul", "rmatmul", "bmm", "mm", "mv", "einsum", "linear")
)
_QUOTIENTS = frozenset(("div", "truediv", "itruediv", "divide", "true_divide"))
_ROUNDINGS = 4  # of the terms of a sum; a tenth of one is measured, in every dtype


class _HoldWeights(TorchFunctionMode):
    """Cut every gradient that does not pass through a linear step.

    Of a product of two tensors that both depend on the streams the smaller one is the weights.
    """

    def __torch_function__(
        self,
        func: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in _LINEAR:
            return func(*args, **kwargs)
        if name in _PRODUCTS:
            moving = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
            kept = max(moving, key=Tensor.numel, default=None)
            return func(*(each if each is kept else _held(each) for each in args), **kwargs)
        if name in _QUOTIENTS:
            return func(args[0], *tree_map(_held, args[1:]), **tree_map(_held, kwargs))
        return tree_map(_held, func(*args, **kwargs))


def _held(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def held_readout(
    model: PreTrainedModel, anatomy: Anatomy, streams: Tensor, direction: Tensor, vocab: int
) -> Tensor:
    """What a direction of the readout is in the streams, the readout's own weights held.

    The model is in eval mode and locked by the caller.

    Args:
        model: the model.
        anatomy: its parts.
        streams: [streams, d_model], behind the last block, at one position.
        direction: float64 [d_model].
        vocab: rows of the input embedding.

    Returns:
        float64 [streams, d_model], whose product with the streams is that of the direction with
        their readout.

    Raises:
        ShapeError: streams or direction of another shape.
        CaptureError: there is one stream, or what is left with its weights held is not linear; says
            by how much.
    """
    shape = (anatomy.n_streams, anatomy.d_model)
    if anatomy.n_streams < 2:
        raise CaptureError("the model has one residual stream, which is read as it is")
    if tuple(streams.shape) != shape or direction.shape != shape[1:]:
        raise ShapeError(
            f"streams {list(streams.shape)} and direction {list(direction.shape)} are not "
            f"{list(shape)} and {list(shape[1:])}"
        )
    given = streams.detach()[None, None].clone().requires_grad_()
    with frozen(model), torch.enable_grad(), _HoldWeights():
        made = run_readout(model, anatomy, given, vocab)
    whole = made.detach()
    off = 1.0
    if made.requires_grad:
        # Along what was read out every term counts: nothing that is missing hides in a sum.
        for along in (whole[0, 0].double(), direction):
            (found,) = torch.autograd.grad(
                made, given, along.to(made)[None, None], retain_graph=True
            )
            ways = found[0, 0].double()
            off = _off(ways * streams.double(), whole[0, 0].double() * along)
            if not off <= _ROUNDINGS * torch.finfo(made.dtype).eps:
                break
        else:
            return ways
    raise CaptureError(
        f"the readout of {anatomy.n_streams} residual streams is not linear in them with the "
        f"weights that it computes held: it is off by {off:.2g} of its terms, so that "
        "no part has a logit of its own"
    )


def _off(terms: Tensor, whole: Tensor) -> float:
    """How far two sums are from each other, in parts of their terms."""
    size = float(terms.abs().sum() + whole.abs().sum())
    return abs(float(whole.sum() - terms.sum())) / max(size, torch.finfo(whole.dtype).tiny)
