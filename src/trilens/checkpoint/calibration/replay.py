"""Parts of a block that need not run again: what they give on a text is known.

Matrices are coded in the order in which data runs through them. Once the last matrix of an
attention is coded, no later pass of the block can give another output there: it is kept on disk,
and handed on in place of the module. That a module gives one matrix's output and nothing else is
seen in a pass, never told by names, and proven by a pass without it.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.streams import Batch
from trilens.errors import WriteError
from trilens.io.messages import reason
from trilens.models.trace import tensors_in

__all__ = ["Carrier", "Replay", "Spool", "find_carriers"]

_IN_MEMORY = 64 << 20  # bytes of each spool
_PLAIN = (Tensor, int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True)
class Carrier:
    """A module that gives what the last matrix in it gives.

    Attributes:
        path: Of the module, in the block.
        length: Of the tuple that it returns; None where it returns a tensor.
        place: Of the tensor in that tuple; everything else there is None.
    """

    path: str
    length: int | None
    place: int

    def output(self, values: Tensor) -> Any:
        """What the module returns for the matrix's output."""
        if self.length is None:
            return values
        return tuple(values if i == self.place else None for i in range(self.length))


class Spool:
    """Float32 tensors on disk, in a file without a name: memory holds the first 64 MiB.

    Args:
        folder: on whose disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self.close = weakref.finalize(self, self._files.close)
        self._file: Any = None
        self._held: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, tuple[int, torch.Size, torch.device]] = {}
        self._size = self._end = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether a tensor is kept under this key."""
        return key in self._held or key in self._places

    def put(self, key: Hashable, values: Tensor) -> None:
        """Keep a tensor.

        Raises:
            WriteError: no space, no permission.
        """
        held = values.detach().float()
        if self._size + 4 * held.numel() <= _IN_MEMORY:
            self._size += 4 * held.numel()
            # Of a part of a larger tensor, the part alone.
            self._held[key] = held.clone() if held._base is not None else held
            return
        array = np.ascontiguousarray(held.cpu().numpy())
        try:
            if self._file is None:
                made = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - see `close`
                self._file = self._files.enter_context(made)
            self._file.seek(self._end)
            self._file.write(array.data.cast("B"))
        except OSError as cause:
            raise WriteError(f"cannot write in {self._folder}: {reason(cause)}") from cause
        self._places[key] = self._end, held.shape, held.device
        self._end += array.nbytes

    def get(self, key: Hashable) -> Tensor:
        """The tensor that was kept, on the device that it was kept from; not to be written to."""
        if key in self._held:
            return self._held[key]
        place, shape, device = self._places[key]
        values = np.empty(tuple(shape), dtype=np.float32)
        self._file.seek(place)
        self._file.readinto(values.data.cast("B"))
        return torch.from_numpy(values).to(device)


class Replay:
    """What parts of one block gave, batch by batch.

    Args:
        block: the block.
        carriers: its parts, by the matrix whose output each gives.
        folder: where outputs are kept.
    """

    def __init__(self, block: nn.Module, carriers: Mapping[str, Carrier], folder: Path) -> None:
        self._block, self.carriers = block, dict(carriers)
        self._outputs: dict[str, Spool] = {}
        self._ready: set[str] = set()
        self._folder = folder

    @property
    def ready(self) -> frozenset[str]:
        """Matrices whose parts are replayed."""
        return frozenset(self._ready)

    def keep(self, matrix: str, batch: Batch, output: Tensor) -> None:
        """Keep what a matrix gave on a batch."""
        spool = self._outputs.get(matrix)
        if spool is None:
            spool = self._outputs[matrix] = Spool(self._folder)
        spool.put(batch.start, output)

    def start(self, matrix: str) -> None:
        """From now on its part is replayed, on the batches that were kept."""
        if matrix in self._outputs:
            self._ready.add(matrix)

    @contextmanager
    def on(self, batch: Batch, watched: Collection[str] = ()) -> Iterator[None]:
        """Replay for the length of the context, but for parts in which something is watched."""
        replaced: list[nn.Module] = []
        try:
            for matrix in sorted(self._ready):
                carrier, spool = self.carriers[matrix], self._outputs[matrix]
                inside = any(path.startswith(f"{carrier.path}.") for path in watched)
                if batch.start in spool and not inside:
                    module = self._block.get_submodule(carrier.path)
                    replaced.append(module)
                    module.forward = _giving(carrier, spool.get(batch.start))
            yield
        finally:
            for module in replaced:
                del module.forward

    def close(self) -> None:
        """Let go of the disk."""
        self._outputs.clear()
        self._ready.clear()


def find_carriers(
    block: nn.Module, matrices: Sequence[str], run: Callable[[], Tensor]
) -> dict[str, Carrier]:
    """For each matrix the outermost module around it that gives its output and nothing else.

    What such a module is given is tensors and plain values: nothing that it could leave anything
    in for others.

    Args:
        block: the block; it runs twice.
        matrices: paths of its matrices.
        run: runs it on a batch.

    Returns:
        By matrix; empty where the block without these modules gives another output.
    """
    calls: dict[str, list[tuple[bool, Any]]] = {}

    def hook(path: str) -> Any:
        def note(_m: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            plain = all(map(_is_plain, [*args, *kwargs.values()]))
            calls.setdefault(path, []).append((plain, output))

        return note

    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in block.named_modules()
        if path
    ]
    try:
        with torch.no_grad():
            expected = run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Carrier] = {}
    for matrix in matrices:
        carrier = _carrier_of(matrix, calls)
        if carrier is not None:
            found[matrix] = carrier
    if not found:
        return {}
    replaced = []
    try:
        for matrix, carrier in found.items():
            module = block.get_submodule(carrier.path)
            replaced.append(module)
            module.forward = _giving(carrier, calls[matrix][0][1])
        with torch.no_grad():
            without = run()
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)
    return found if torch.equal(without, expected) else {}


def _carrier_of(matrix: str, calls: Mapping[str, Sequence[tuple[bool, Any]]]) -> Carrier | None:
    own = calls.get(matrix, ())
    if len(own) != 1 or not isinstance(own[0][1], Tensor):
        return None
    parts = matrix.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        made = calls.get(path, ())
        if len(made) != 1 or not made[0][0]:
            continue
        output = made[0][1]
        tensors = list(tensors_in(output))
        if len(tensors) != 1 or tensors[0] is not own[0][1]:
            continue
        if isinstance(output, Tensor):
            return Carrier(path, None, 0)
        if type(output) is tuple and all(each is None or each is tensors[0] for each in output):
            place = next(i for i, each in enumerate(output) if each is not None)
            return Carrier(path, len(output), place)
    return None


def _giving(carrier: Carrier, values: Tensor) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: carrier.output(values)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
