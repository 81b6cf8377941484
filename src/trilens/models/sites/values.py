"""From the tensor at a tap to the site's value, and back into a new tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from trilens.models.gates.site import Layout, rows_of
from trilens.models.sites.site import Site, title_of

__all__ = ["read_value", "replace_tensor", "write_value"]

_BY_HEAD = ("query", "key", "value")


def read_value(tensor: Tensor, site: Site, batch: int, seq: int) -> Tensor:
    """The value of a site, [batch, seq, *shape], by reference where the axes allow it.

    Of attn.head_out it is what the projection is given, [batch, seq, heads, d_head]; `by_head`
    makes the value of it.

    Raises:
        SilentSiteError: the tensor's axes are not those of the batch.
    """
    if site.tap.event == "attention":
        # Heads stand before the tokens, but for the output.
        return tensor.transpose(1, 2) if site.tap.part in _BY_HEAD else tensor
    rows = rows_of(tensor, _layout(tensor, site, batch, seq), batch, seq, title_of(site.key))
    if site.projection is not None:
        return rows.reshape(batch, seq, site.shape[0], -1)
    return rows.reshape(batch, seq, *site.shape)


def _layout(tensor: Tensor, site: Site, batch: int, seq: int) -> Layout:
    """The site's layout; a stream may hold its tokens in one axis where it is written."""
    layout = site.layout
    if layout.form == "batched" and layout.axis == 1 and tensor.shape[:-1] == (batch * seq,):
        return replace(layout, form="flat", axis=0)
    if layout.form == "flat" and tensor.shape[:-1] == (batch, seq):
        return replace(layout, form="batched", axis=1)
    return layout


def write_value(tensor: Tensor, site: Site, value: Tensor) -> Tensor:
    """A new tensor like the one at the tap, with another value of the site."""
    if site.tap.event == "attention":
        return value.transpose(1, 2) if site.tap.part in _BY_HEAD else value
    layout = _layout(tensor, site, *value.shape[:2])
    if layout.form == "streams_first":
        made = value.movedim(2, 0).to(tensor.dtype)
        return made if layout.axis == 2 else made.transpose(1, 2)
    rows = value.reshape(*value.shape[:2], -1).to(tensor.dtype)
    if layout.form == "batched" and layout.axis != 1:
        axes: tuple[int, ...] = tuple(tensor.movedim(layout.axis, 1).shape)
    elif layout.form == "seq_first":
        axes = tuple(tensor.transpose(0, 1).shape)
    elif layout.form == "flat":
        axes = (*value.shape[:2], *tensor.shape[1:])
        if value.shape[0] * value.shape[1] != tensor.shape[0]:
            axes = (*value.shape[:2], -1)
    else:
        axes = tuple(tensor.shape)
    if layout.columns is not None:
        every = replace(layout, columns=None, dtype=None)
        whole = rows_of(tensor, every, value.shape[0], value.shape[1], site.name).clone()
        columns = layout.columns
        index = torch.tensor(columns) if isinstance(columns, tuple) else columns
        whole[..., index] = rows
        rows = whole
    shaped = rows.reshape(axes)
    if layout.form == "batched" and layout.axis != 1:
        return shaped.movedim(1, layout.axis)
    if layout.form == "seq_first":
        return shaped.transpose(0, 1)
    return shaped.reshape(tensor.shape)


def replace_tensor(nest: Any, index: int, new: Tensor) -> Any:
    """A nest of tuples, lists and mappings with its index-th tensor replaced, nothing written into.

    Tensors are counted as `tensors_in` does. A mapping (ModelOutput is one) is copied.
    """
    numbers = count()
    return _mapped(nest, lambda tensor: new if next(numbers) == index else tensor, 3)


def _mapped(nest: Any, change: Callable[[Tensor], Tensor], depth: int) -> Any:
    """The nest with its tensors changed; itself where none is."""
    if isinstance(nest, Tensor):
        return change(nest)
    if not depth or not isinstance(nest, dict | tuple | list):
        return nest
    if isinstance(nest, dict):
        made = {name: _mapped(item, change, depth - 1) for name, item in nest.items()}
        changed = {name: item for name, item in made.items() if item is not nest[name]}
        # A copy of the same class: ModelOutput's fields are its entries.
        result = copy.copy(nest) if changed else nest
        for name, item in changed.items():
            result[name] = item
        return result
    items = [_mapped(item, change, depth - 1) for item in nest]
    if all(a is b for a, b in zip(items, nest, strict=True)):
        return nest
    named = isinstance(nest, tuple) and hasattr(nest, "_fields")
    return type(nest)(*items) if named else type(nest)(items)
