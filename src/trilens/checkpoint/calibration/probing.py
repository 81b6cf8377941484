"""Probe a model's blocks: what each hands on, in which shape, and which later block needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.checkpoint.calibration.handover import Axes, Key, Made, axes_of, snapshot
from trilens.checkpoint.calibration.nest import Path, containers, leaves, replaced
from trilens.checkpoint.calibration.passing import passing
from trilens.errors import AnatomyError
from trilens.io.short_memory import is_short_of_memory
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import forward_arguments, probe_ids
from trilens.models.tokens import vocab_size_of
from trilens.models.trace import tensors_in

__all__ = ["Probed", "probe_blocks"]

_SIZES = ((1, 12), (2, 13))  # rows and tokens of the two probes


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """What a probe of the blocks has shown.

    Attributes:
        ids: Its tokens [1, seq].
        logits: What the model gave.
        made: For each block what it handed on.
        inputs: For each block where the residual stream is among its arguments.
        axes: The shape of each tensor that is handed on.
        needed_until: The last block that needs it; `n_blocks` for the head.
        passed_on: Tensors that a block was given and hands on as they are.
    """

    ids: Tensor
    logits: Tensor
    made: tuple[Made, ...]
    inputs: tuple[Path, ...]
    axes: Mapping[Key, Axes]
    needed_until: Mapping[Key, int]
    passed_on: frozenset[Key]


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One run of the model: for each block its arguments as they were, and what it handed on."""

    given: tuple[Any, ...]
    made: tuple[Made, ...]
    logits: Tensor


def probe_blocks(model: PreTrainedModel, anatomy: Anatomy) -> Probed:
    """Run a model on two probes of unlike size.

    Raises:
        AnatomyError: blocks that are called in another order than their anatomy says, or without a
            residual stream among their arguments; tensors whose rows cannot be told.
    """
    blocks = [block.module for block in anatomy.blocks]
    vocab = vocab_size_of(model)
    texts = [
        torch.cat([probe_ids(model, vocab, seq, seed=row) for row in range(rows)])
        for rows, seq in _SIZES
    ]
    one, other = (_run(model, anatomy, ids) for ids in texts)
    axes: dict[Key, Axes] = {}
    passed: set[Key] = set()
    for step, (a, b) in enumerate(zip(one.made, other.made, strict=True)):
        name = anatomy.blocks[step].path
        if len(a.tensors) != len(b.tensors):
            raise AnatomyError(f"{name} hands on another number of tensors for another prompt")
        given = [tensor for _, tensor in leaves(one.given[step])]
        for number, pair in enumerate(zip(a.tensors, b.tensors, strict=True)):
            axes[(step, number)] = axes_of(name, list(zip(_SIZES, pair, strict=True)))
            if any(_equal(pair[0], tensor) for tensor in given):
                passed.add((step, number))
    inputs = tuple(_input(anatomy, one, step) for step in range(len(blocks)))
    needed = _needed_until(model, blocks, texts[0], one)
    for step, block in enumerate(anatomy.blocks):  # watched in any case
        residual = (step, block.output)
        passed.discard(residual)
        needed[residual] = max(needed.get(residual, 0), step + 1)
    return Probed(texts[0], one.logits, one.made, inputs, axes, needed, frozenset(passed))


def _run(model: PreTrainedModel, anatomy: Anatomy, ids: Tensor) -> _Run:
    given: list[Any] = []
    made: list[Made] = []
    open_: list[tuple[Any, Any]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        step = len(given)
        if step >= anatomy.n_layers or anatomy.blocks[step].module is not module:
            raise AnatomyError(
                f"{type(model).__name__} calls its blocks in another order than they stand in: "
                "they cannot be run one by one"
            )
        open_.append(((args, kwargs), snapshot((args, kwargs))))
        given.append(_copied((args, kwargs)))

    def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        nest, old = open_.pop()
        found = Made.of(output, old, nest)
        made.append(_copied_made(found))

    distinct = {id(block.module): block.module for block in anatomy.blocks}.values()
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in distinct]
    handles += [m.register_forward_hook(after, with_kwargs=True) for m in distinct]
    try:
        found = model(**forward_arguments(model, ids, None)).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(made) != anatomy.n_layers:
        raise AnatomyError(f"{type(model).__name__} does not call all its blocks on a probe")
    logits = found if isinstance(found, Tensor) else next(tensors_in(found))
    return _Run(tuple(given), tuple(made), logits.clone())


def _copied(nest: Any) -> Any:
    """With tensors that nobody writes into."""
    return replaced(nest, {path: tensor.clone() for path, tensor in leaves(nest)})


def _copied_made(made: Made) -> Made:
    return Made(_copied(made.returned), type(made.writes)(_copied(made.writes.items)))


def _input(anatomy: Anatomy, run: _Run, step: int) -> Path:
    """Where the residual stream is among a block's arguments."""
    output = anatomy.blocks[step].output
    like = run.made[step].tensors[output]
    found = [(p, t) for p, t in leaves(run.given[step]) if t.shape == like.shape]
    found = [(p, t) for p, t in found if t.is_floating_point()]
    if not found:
        raise AnatomyError(
            f"{anatomy.blocks[step].path} is called without a residual stream among its arguments"
        )
    if step:
        last = run.made[step - 1].tensors[anatomy.blocks[step - 1].output]
        return next((path for path, tensor in found if _equal(tensor, last)), found[0][0])
    return found[0][0]


def _needed_until(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor, run: _Run
) -> dict[Key, int]:
    """Change each tensor alone, and see whose arguments, or which logits, are others then."""
    base, logits = _passed(model, blocks, ids, run, {})
    needed: dict[Key, int] = {}
    for step, made in enumerate(run.made):
        for number, tensor in enumerate(made.tensors):
            key = (step, number)
            try:
                found, changed = _passed(model, blocks, ids, run, {key: _other(tensor)})
            except Exception as error:
                if is_short_of_memory(error):
                    raise
                # Whatever else the model says to it, it looked at it.
                needed[key] = len(blocks)
                continue
            if not _equal(changed, logits):
                needed[key] = len(blocks)
                continue
            for later in reversed(range(step + 1, len(blocks))):
                if _reads(blocks[later], base[later], found[later]):
                    needed[key] = later
                    break
    return needed


def _passed(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    ids: Tensor,
    run: _Run,
    instead: Mapping[Key, Tensor],
) -> tuple[list[Any], Tensor]:
    """Each block's arguments and the logits, where blocks hand on what they did, but for some."""
    seen: list[Any] = []

    def made(step: int) -> tuple[Made, list[Tensor]]:
        tensors = run.made[step].tensors
        return run.made[step], [
            instead.get((step, n), tensor).clone() for n, tensor in enumerate(tensors)
        ]

    with passing(blocks, made, None, lambda _step, nest: seen.append(_held(nest))):
        found = model(**forward_arguments(model, ids, None)).logits
    return seen, found if isinstance(found, Tensor) else next(tensors_in(found))


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """A block's arguments as they were, and which of their tensors stand in containers."""

    nest: Any
    inside: frozenset[Path]


def _held(nest: Any) -> _Given:
    held = [path for path, _ in containers(nest) if len(path) > 1]  # keyword arguments are no such
    inside = {p for p, _ in leaves(nest) if any(p[: len(h)] == h for h in held)}
    return _Given(replaced(nest, {}), frozenset(inside))


def _reads(block: nn.Module, one: _Given, other: _Given) -> bool:
    """Whether a block gets, and where that stands in a container also uses, other values."""
    a, b = dict(leaves(one.nest)), dict(leaves(other.nest))
    changed = {path for path in {*a, *b} if not _equal(a.get(path), b.get(path))}
    if not changed:
        return False
    if not changed <= (one.inside | other.inside):
        return True
    x, y = _tensors(block, one.nest), _tensors(block, other.nest)
    return len(x) != len(y) or not all(map(_equal, x, y))


def _tensors(block: nn.Module, nest: Any) -> tuple[Tensor, ...]:
    args, kwargs = own = _copied(nest)
    before = snapshot(own)
    return Made.of(block(*args, **kwargs), before, own).tensors


def _other(tensor: Tensor) -> Tensor:
    """Other values of the same kind: of indices valid ones."""
    if tensor.is_floating_point():
        noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))
        return tensor + (1 + tensor.abs()) * noise.to(tensor)
    if tensor.dtype == torch.bool:
        return ~tensor
    return torch.where(tensor == 0, torch.ones_like(tensor), torch.zeros_like(tensor))


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
