"""What each kind of edit makes of the values it names: pure functions of [n, *shape]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trilens.edits.edit import (
    Ablate,
    Custom,
    Patch,
    Project,
    Replace,
    Scale,
    SiteEdit,
    Steer,
)
from trilens.edits.positions import Places, positions_of, read_positions, selected
from trilens.edits.values import TensorFile, is_source
from trilens.errors import EditError, NotStoredError
from trilens.io.messages import reason
from trilens.taps.edit_targets import BY_QUERY, Chosen, ModelFacts, Target, places_of

__all__ = ["Change", "change_of"]

Change = Callable[[Tensor, Chosen], Tensor]
"""Of the values named, [n, *shape], the new ones; the same tensor where nothing changes."""

_LOGITS = ("router", "attn.router")
"""Sites that experts are chosen by."""


def change_of(edit: SiteEdit, target: Target, model: ModelFacts) -> Change:
    """Prepare one edit at one site.

    Raises:
        EditError: a tensor of the wrong shape or not finite, a source of another model or length.
    """
    for kind, prepare in _KINDS.items():
        if isinstance(edit, kind):
            return prepare(edit, target, model)
    raise EditError(
        f"an edit of class {type(edit).__name__} is not known: use one of trilens.edits"
    )


def _exact(values: Tensor) -> torch.dtype:
    """The dtype in which values are computed: a half is no place for sums."""
    return torch.promote_types(values.dtype, torch.float32)


def _loaded(value: object, noun: str) -> Tensor:
    """A finite tensor."""
    tensor = value.load() if isinstance(value, TensorFile) else cast("Tensor", value)
    if not tensor.is_floating_point():
        tensor = tensor.float()
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise EditError(f"{noun} of shape {list(tensor.shape)} has {bad} entries of NaN or Inf")
    return tensor


def _steer(edit: Steer, target: Target, model: ModelFacts) -> Change:
    vector = _loaded(edit.vector, "vector")
    shape = target.shape
    if vector.ndim == 0 or tuple(vector.shape) not in (shape, shape[-1:]):
        wanted = f"[{shape[-1]}]" + (f" or {list(shape)}" if len(shape) > 1 else "")
        raise EditError(
            f"vector of shape {list(vector.shape)} does not fit: the values named have {wanted}"
        )
    if edit.scale == 0:
        return lambda values, _: values
    delta = edit.scale * vector.to(_exact(vector))
    zeros = bool((delta == 0).any())

    def change(values: Tensor, chosen: Chosen) -> Tensor:
        old = values.to(_exact(values))
        add = delta.to(old.device, old.dtype)
        new = old + add
        if edit.renormalise:
            norms = new.norm(dim=-1, keepdim=True)
            new = new * (old.norm(dim=-1, keepdim=True) / norms.clamp_min(1e-30))
        elif zeros:
            # −0 + 0 is 0: entries that are not steered keep their bits.
            new = torch.where(add == 0, old, new)
        return new.to(values.dtype)

    return change


def _ablate(edit: Ablate, target: Target, model: ModelFacts) -> Change:
    if edit.method == "zero":
        experts, closed = target.site.shape[-1], target.site.closed
        chooses = target.site.name in _LOGITS
        if chooses and (target.units is None or len(target.units) == experts):
            raise EditError(
                f"{target.site.name} cannot be ablated whole: name experts as units, at most "
                f"{experts - 1} of {experts}"
            )
        return lambda values, _: torch.full_like(values, closed)
    reference = _reference(edit, target, model)
    if edit.method == "mean":
        mean = target.pick(reference.double().mean(0, keepdim=True))[0]
        return lambda values, _: mean.to(values.device, values.dtype).expand_as(values)
    rows = target.pick(reference)
    seed = edit.seed

    def change(values: Tensor, chosen: Chosen) -> Tensor:
        # The same numbers for a position, whatever the batch or the pass.
        draws = np.random.default_rng(seed).random(int(chosen.positions.max()) + 1)
        index = torch.from_numpy((draws[chosen.positions] * len(rows)).astype(np.int64))
        return rows[index.to(rows.device)].to(values.device, values.dtype)

    return change


def _reference(edit: Ablate, target: Target, model: ModelFacts) -> Tensor:
    """[tokens, *site.shape]: every token of a reference."""
    given = edit.reference
    if is_source(given):
        given = (given,)
    if isinstance(given, tuple):
        return torch.cat([_of_capture(each, target, model, "reference") for each in given])
    tensor = _loaded(given, "reference")
    shape = target.site.shape
    if tuple(tensor.shape) == shape:
        return tensor[None]
    if tensor.ndim <= len(shape) or tuple(tensor.shape[-len(shape) :]) != shape:
        raise EditError(
            f"reference of shape {list(tensor.shape)} does not fit: {target.site.name} has "
            f"[tokens, {', '.join(map(str, shape))}]"
        )
    return tensor.reshape(-1, *shape)


def _of_capture(source: Any, target: Target, model: ModelFacts, noun: str) -> Tensor:
    """[seq, *site.shape] of a capture of the same model."""
    theirs = source.model
    for name in ("model_class", "n_layers", "d_model", "name"):
        if getattr(theirs, name) != getattr(model, name):
            raise EditError(
                f"{noun} is of another model: its {name} is {getattr(theirs, name)!r}, this "
                f"model's {getattr(model, name)!r}; give the tensor itself where that is meant"
            )
    site = target.site
    if site.unread:
        raise EditError(
            f"{noun} does not hold {site.name} as a site: give a tensor {list(site.shape)}, such "
            f"as cap.states.get({site.layer}, position=…)"
        )
    try:
        values = source.sites[site.name, site.layer]
    except (NotStoredError, KeyError) as error:
        layers = "" if site.layer is None else f", layers=[{site.layer}]"
        raise EditError(
            f"{noun} does not hold {site.name}: capture it with sites=[{site.name!r}]{layers} "
            f"({reason(error)})"
        ) from error
    if tuple(values.shape[1:]) != site.shape:
        raise EditError(
            f"{noun} has {site.name} of shape {list(values.shape)}: this model has "
            f"[seq, {', '.join(map(str, site.shape))}]"
        )
    return cast("Tensor", values)


def _patch(edit: Patch, target: Target, model: ModelFacts) -> Change:
    texts, site = target.texts, target.site
    whole = is_source(edit.source)
    if whole:
        source = _of_capture(edit.source, target, model, "source")
    else:
        source = _loaded(edit.source, "source")
        if tuple(source.shape) == site.shape:
            source = source[None]
        if tuple(source.shape[1:]) != site.shape:
            raise EditError(
                f"source of shape {list(source.shape)} does not fit: {site.name} has "
                f"[tokens, {', '.join(map(str, site.shape))}]"
            )
    where = cast("Places", read_positions(edit.source_positions))
    rows = None
    if where is not None:
        rows = _within(where, len(source))
    elif not whole:
        rows = list(range(len(source)))
    tables = []
    for number, places in enumerate(target.places):
        prompt = texts.prompts[number]
        named = positions_of(places, prompt, prompt + texts.new_tokens)
        if rows is None and named and len(source) != prompt:
            raise EditError(
                f"source has {len(source)} tokens, {texts.owner(number)} another number: name "
                "source_positions and positions"
            )
        if rows is None and max(named, default=0) >= len(source):
            raise EditError(
                f"position {max(named)} is beyond the source's {len(source)} tokens: name "
                "source_positions"
            )
        tables.append(_table(named, rows, "source", texts.owner(number)))
    return _rows(target.pick(source), tables)


def _within(places: Places, tokens: int) -> list[int]:
    """The rows of a source that are named."""
    from_end = (
        [each + tokens if each < 0 else each for each in places]
        if isinstance(places, tuple)
        else positions_of(places, tokens, tokens)
    )
    if not from_end or min(from_end) < 0 or max(from_end) >= tokens:
        raise EditError(
            f"source_positions {places!r} are out of range: the source has tokens 0–{tokens - 1}"
        )
    return from_end


def _table(named: Sequence[int], rows: Sequence[int] | None, noun: str, owner: str) -> Any:
    """For each text position, the row that goes there, −1 for none."""
    table = np.full(max(named, default=-1) + 1, -1)
    if rows is None:
        rows = named
    elif len(rows) == 1:
        rows = list(rows) * len(named)
    if named and len(rows) != len(named):
        raise EditError(
            f"{noun} gives {len(rows)} tokens for {len(named)} positions of {owner}: give as many, "
            "or one"
        )
    if named:
        table[list(named)] = list(rows)
    return table


def _rows(source: Tensor, tables: list[Any]) -> Change:
    """Rows of a source by prompt and position."""
    rows = np.full((len(tables), max(map(len, tables))), -1)
    for number, table in enumerate(tables):
        rows[number, : len(table)] = table

    def change(values: Tensor, chosen: Chosen) -> Tensor:
        index = torch.from_numpy(rows[chosen.numbers, chosen.positions])
        return source[index.to(source.device)].to(values.device, values.dtype)

    return change


def _replace(edit: Replace, target: Target, model: ModelFacts) -> Change:
    value, shape, texts = _loaded(edit.value, "value"), target.shape, target.texts
    if value.ndim == 0 or tuple(value.shape) in (shape, shape[-1:]):
        return lambda values, _: value.to(values.device, values.dtype).expand_as(values)
    if tuple(value.shape[1:]) != shape:
        raise EditError(
            f"value of shape {list(value.shape)} does not fit: the values named have "
            f"{list(shape)} for each token"
        )
    tables = []
    for number, places in enumerate(target.places):
        prompt = texts.prompts[number]
        if len(value) > 1 and texts.new_tokens and (places in (None, "generated")):
            raise EditError(
                f"value has {len(value)} tokens, but positions have generated ones, whose number "
                "is not known: give one value for all"
            )
        named = positions_of(places, prompt, prompt + texts.new_tokens)
        tables.append(_table(named, list(range(len(value))), "value", texts.owner(number)))
    return _rows(value, tables)


def _scale(edit: Scale, target: Target, model: ModelFacts) -> Change:
    factor = edit.factor
    if edit.renormalise and target.site.name != "attn.pattern":
        raise EditError(
            f"renormalise keeps the sum of a query's attention weights, and {target.site.name} "
            "has none: leave it out, or scale attn.pattern"
        )
    if edit.renormalise and factor < 0:
        raise EditError(
            f"factor {factor:g} is out of range: with renormalise it is 0 or more, since weights "
            "of both signs have no sum to keep"
        )
    if edit.keys is None:
        return lambda values, _: values if factor == 1 else values * factor
    if target.site.name not in BY_QUERY:
        raise EditError(
            f"keys are named of {' and '.join(BY_QUERY)}; {target.site.name} has none: "
            "leave keys out"
        )
    keys, prompts = places_of(edit.keys, target.texts), target.texts.prompts

    def change(values: Tensor, chosen: Chosen) -> Tensor:
        seq_k = values.shape[-1]
        named = {
            number: selected(keys[number], prompts[number], 0, seq_k)
            for number in {*chosen.numbers.tolist()}
        }
        rows = torch.from_numpy(np.stack([named[number] for number in chosen.numbers.tolist()]))
        scaled = rows.to(values.device).reshape(-1, *(1,) * (values.ndim - 2), seq_k)
        return torch.where(scaled, values * factor, values)

    return change if factor != 1 else (lambda values, _: values)


def _project(edit: Project, target: Target, model: ModelFacts) -> Change:
    directions = _loaded(edit.directions, "directions")
    width = target.shape[-1]
    if directions.ndim not in (1, 2) or directions.shape[-1] != width:
        raise EditError(
            f"directions of shape {list(directions.shape)} do not fit: the values named have "
            f"width {width}, so they are [k, {width}]"
        )
    _, sizes, axes = torch.linalg.svd(directions.reshape(-1, width).double(), full_matrices=False)
    limit = sizes.max() * max(directions.shape[-1], len(sizes)) * torch.finfo(torch.float32).eps
    basis = axes[sizes > limit] if sizes.max() > 0 else axes[:0]
    if not len(basis):
        raise EditError("directions are all zero: they span nothing")
    onto = edit.onto

    def change(values: Tensor, chosen: Chosen) -> Tensor:
        old = values.to(_exact(values))
        axes = basis.to(old.device, old.dtype)
        inside = (old @ axes.T) @ axes
        new: Tensor = inside if onto else old - inside
        return new.to(values.dtype)

    return change


def _custom(edit: Custom, target: Target, model: ModelFacts) -> Change:
    def change(values: Tensor, chosen: Chosen) -> Tensor:
        parts = []
        sizes = np.unique(chosen.rows.numpy(), return_counts=True)[1].tolist()
        for part in torch.split(values, sizes):
            new = edit.function(part.clone())
            if not isinstance(new, Tensor) or new.shape != part.shape:
                got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise EditError(
                    f"function returned {got}: it takes values of shape {list(part.shape)} and "
                    "returns a tensor of the same shape"
                )
            parts.append(new.to(part.device, part.dtype))
        return torch.cat(parts)

    return change


_KINDS: dict[type[SiteEdit], Callable[[Any, Target, ModelFacts], Change]] = {
    Steer: _steer,
    Ablate: _ablate,
    Patch: _patch,
    Scale: _scale,
    Project: _project,
    Replace: _replace,
    Custom: _custom,
}
