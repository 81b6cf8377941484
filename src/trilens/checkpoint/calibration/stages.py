"""Which matrices of a block read the same input, in which order, and which add to the residual.

All of it is seen in one pass of the dense block, never told by names:

- matrices whose input is one and the same tensor are coded together, later ones after earlier ones;
- a matrix adds to the residual where its output plus a residual known so far is, bit for bit, what
  a later module reads or the block gives. Such a matrix can also make good for what the residual
  has lost before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trilens.models.trace import tensors_in

__all__ = ["Stage", "StageSites", "find_stages", "watching"]

BLOCK_INPUT = ""
"""The site of the residual stream before the block."""

BLOCK_OUTPUT = "output"
"""The site of the residual stream after it."""


@dataclass(frozen=True, slots=True)
class StageSites:
    """Between which two states of the residual stream a matrix stands.

    A site is `BLOCK_INPUT`, `BLOCK_OUTPUT`, or the path of the module that reads that state.
    """

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Stage:
    """Matrices of one block that read the same tensor.

    Attributes:
        members: Their modules' paths inside the block.
        sites: Of the members that add to the residual.
        n_tokens: Tokens that they saw in the pass that was watched.
    """

    members: tuple[str, ...]
    sites: dict[str, StageSites]
    n_tokens: int


@dataclass(slots=True)
class _Seen:
    calls: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  # path, input, output
    read: list[tuple[str, Tensor, int]] = field(default_factory=list)  # path, tensor, calls so far


def find_stages(
    block: nn.Module, paths: Sequence[str], run: Callable[[], Tensor], hidden: Tensor
) -> tuple[tuple[Stage, ...], dict[str, str]]:
    """Watch one pass of a block.

    Args:
        block: the dense block.
        paths: its linear layers that are ternarized.
        run: runs it on `hidden`, gives its output.
        hidden: the residual stream before it [batch, seq, d_model].

    Returns:
        The stages in order; the layers without one, and why.
    """
    seen = _Seen()
    requested = set(paths)

    def before(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for tensor in tensors_in([*args, *kwargs.values()]):
                if tensor.shape == hidden.shape and tensor.is_floating_point():
                    seen.read.append((path, tensor, len(seen.calls)))
                    return

        return hook

    def after(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.calls.append((path, args[0], output))

        return hook

    handles = []
    for path, module in block.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        if path in requested:
            handles.append(module.register_forward_hook(after(path)))
    try:
        with torch.no_grad():
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    return _stages(seen, paths, hidden, output)


def _stages(
    seen: _Seen, paths: Sequence[str], hidden: Tensor, output: Tensor
) -> tuple[tuple[Stage, ...], dict[str, str]]:
    times = {path: sum(call[0] == path for call in seen.calls) for path in paths}
    unseen = {
        path: f"it ran {n} times on a batch of the text, not once"
        for path, n in times.items()
        if n != 1
    }
    sites = _residual_sites(seen, hidden, output)
    groups: list[tuple[Tensor, list[str]]] = []
    for path, entered, _ in seen.calls:
        if path in unseen:
            continue
        for tensor, members in groups:
            if tensor is entered or _same_memory(tensor, entered):
                members.append(path)
                break
        else:
            groups.append((entered, [path]))
    return tuple(
        Stage(
            tuple(members),
            {path: sites[path] for path in members if path in sites},
            tensor.numel() // tensor.shape[-1],
        )
        for tensor, members in groups
    ), unseen


def _residual_sites(seen: _Seen, hidden: Tensor, output: Tensor) -> dict[str, StageSites]:
    known: list[tuple[str, Tensor]] = [(BLOCK_INPUT, hidden)]
    found: dict[str, StageSites] = {}
    for number, (path, _, given) in enumerate(seen.calls):
        if given.shape != hidden.shape:
            continue
        later = [(site, t) for site, t, calls in seen.read if calls > number]
        for before, state in known:
            total = state + given
            hit = next(
                (
                    (site, t)
                    for site, t in [*later, (BLOCK_OUTPUT, output)]
                    if torch.equal(total, t)
                ),
                None,
            )
            if hit is not None:
                found[path] = StageSites(before, hit[0])
                known.append(hit)
                break
    return found


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class _EnoughError(Exception):
    """Everything that was watched for has been seen."""


@contextmanager
def watching(
    block: nn.Module,
    *,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    states: Sequence[str] = (),
    shape: torch.Size | None = None,
) -> Iterator[Callable[[Callable[[], Tensor]], dict[tuple[str, str], Tensor]]]:
    """Watch modules of a block for the length of the context.

    Args:
        block: the block.
        inputs: paths whose first input is requested.
        outputs: paths whose output is requested.
        states: sites of the residual stream.
        shape: the residual stream's.

    Yields:
        A function that runs the block once, as far as needed, and gives what was seen, by
        ("input" | "output" | "state", path). What did not come by is not there.
    """
    modules = dict(block.named_modules())
    found: dict[tuple[str, str], Tensor] = {}
    missing: set[tuple[str, str]] = set()
    requested = {("input", p) for p in inputs} | {("output", p) for p in outputs}
    requested |= {("state", site) for site in states if site != BLOCK_INPUT}

    def note(key: tuple[str, str], tensor: Tensor) -> None:
        found.setdefault(key, tensor.detach())
        missing.discard(key)
        if not missing:
            raise _EnoughError

    def entering(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for tensor in tensors_in([*args, *kwargs.values()]):
                if tensor.shape == shape and tensor.is_floating_point():
                    note(("state", path), tensor)
                    return

        return hook

    def reading(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            note(("input", path), args[0])

        return hook

    def leaving(path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            note(("output", path), output)

        return hook

    handles = [
        modules[site].register_forward_pre_hook(entering(site), with_kwargs=True)
        for site in states
        if site not in {BLOCK_INPUT, BLOCK_OUTPUT}
    ]
    handles += [modules[path].register_forward_pre_hook(reading(path)) for path in inputs]
    handles += [modules[path].register_forward_hook(leaving(path)) for path in outputs]

    def once(run: Callable[[], Tensor]) -> dict[tuple[str, str], Tensor]:
        found.clear()
        missing.clear()
        missing.update(requested)
        try:
            with torch.no_grad():
                found[("state", BLOCK_OUTPUT)] = run()
        except _EnoughError:
            pass
        return dict(found)

    try:
        yield once
    finally:
        for handle in handles:
            handle.remove()
