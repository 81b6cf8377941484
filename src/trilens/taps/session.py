"""One capture's hooks: residual streams, attention calls and gate inputs of a single forward pass.

Everything is undone when the block ends, also after an exception. Only the thread that opened the
session is recorded: another thread may run the same model beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trilens.errors import AttentionPathError, CaptureError, SilentSiteError
from trilens.models.anatomy import Anatomy
from trilens.models.gates.glu import GateSite
from trilens.models.trace import same, tensors_in
from trilens.taps.registry import REGISTRY, AttentionCall, attention_keys

__all__ = ["Recording", "Wanted", "listening"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one pass is to leave behind.

    Attributes:
        layers: layer numbers, ascending.
        residual: "last", "all" or None.
        lengths: real tokens of each row of the batch, on the CPU.
        attention: layers whose attention is wanted.
        gates: gate sites that are wanted, by (name, layer).
        copy: copy what is kept, for a model that overwrites its own tensors.
    """

    layers: tuple[int, ...]
    residual: str | None
    lengths: tuple[int, ...]
    attention: tuple[int, ...]
    gates: Mapping[tuple[str, int], GateSite]
    copy: bool = False


@dataclass(slots=True)
class Recording:
    """What a pass left behind, still batched and padded.

    Shapes
        residual [batch, seq, d_model], or [batch, d_model] for the last tokens.
    """

    residual: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionCall] = field(default_factory=dict)
    gates: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    overwritten: bool = False


class _Session:
    def __init__(self, anatomy: Anatomy, wanted: Wanted) -> None:
        self.anatomy = anatomy
        self.wanted = wanted
        self.recording = Recording()
        self.thread = threading.get_ident()
        self.layer: int | None = None
        self.done = 0
        self.kept: list[tuple[Tensor, int]] = []

    def mine(self) -> bool:
        return threading.get_ident() == self.thread

    def enter_block(self, module: nn.Module, _args: Any) -> None:
        if not self.mine():
            return
        blocks = self.anatomy.blocks
        if self.done >= len(blocks) or blocks[self.done].module is not module:
            expected = blocks[self.done].path if self.done < len(blocks) else "nothing"
            raise CaptureError(
                f"a block ran out of order: expected {expected} as layer {self.done}, got a "
                f"{type(module).__name__}; the model was changed since the lens was made"
            )
        self.layer = self.done

    def leave_block(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not self.mine() or self.layer is None:
            return
        layer, self.layer = self.layer, None
        self.done += 1
        if self.wanted.residual is None or layer not in self.wanted.layers:
            return
        stream = list(tensors_in(output))[self.anatomy.blocks[layer].output]
        if not self.anatomy.batch_first:
            stream = stream.transpose(0, 1)
        if self.wanted.residual == "all":
            self.recording.residual[layer] = self.keep(stream)
        else:
            rows = torch.arange(stream.shape[0], device=stream.device)
            last = torch.tensor(self.wanted.lengths, device=stream.device) - 1
            # Indexing copies: keeping a last token must not keep the whole sequence alive.
            self.recording.residual[layer] = stream.detach()[rows, last]

    def attend(self, call: AttentionCall) -> None:
        layer = self.layer
        if not self.mine() or layer is None or layer not in self.wanted.attention:
            return
        before = self.recording.attention.get(layer)
        if before is not None:
            if same(before.query, call.query) and same(before.key, call.key):
                return
            raise AttentionPathError(
                f"layer {layer} calls attention twice with different queries or keys: it has no "
                "single attention pattern"
            )
        query, key = self.keep(call.query), self.keep(call.key)
        self.recording.attention[layer] = AttentionCall(
            call.module,
            call.implementation,
            call.function,
            query,
            key,
            call.mask,
            call.options,
            call.weights,
        )

    def gate(self, name: str, layers: Mapping[int, None], args: tuple[Any, ...]) -> None:
        layer = self.layer
        if self.mine() and layer is not None and layer in layers:
            self.recording.gates[name, layer] = self.keep(args[0])

    def keep(self, tensor: Tensor) -> Tensor:
        """A detached reference (or copy), with its version to see whether it is overwritten."""
        tensor = tensor.detach()
        if self.wanted.copy:
            return tensor.clone()
        self.kept.append((tensor, tensor._version))
        return tensor

    def finish(self) -> None:
        """Say so if a wanted site did not fire."""
        got, wanted = self.recording, self.wanted
        got.overwritten = any(tensor._version != version for tensor, version in self.kept)
        silent = []
        if wanted.residual is not None:
            silent += [f"resid_post of layer {i}" for i in wanted.layers if i not in got.residual]
        silent += [f"attention of layer {i}" for i in wanted.attention if i not in got.attention]
        silent += [f"{name} of layer {i}" for name, i in wanted.gates if (name, i) not in got.gates]
        if silent:
            raise SilentSiteError(
                f"{len(silent)} requested sites did not fire in this pass: {', '.join(silent[:4])}"
                f"{' …' if len(silent) > 4 else ''}; the model ran {self.done} of "
                f"{self.anatomy.n_layers} layers"
            )


@contextmanager
def listening(model: nn.Module, anatomy: Anatomy, wanted: Wanted) -> Iterator[Recording]:
    """Record one forward pass that runs inside the block.

    Yields:
        The recording, complete when the block ends.

    Raises:
        SilentSiteError: a wanted site did not fire.
        CaptureError: the blocks did not run in the proven order.
    """
    session = _Session(anatomy, wanted)
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for module in {id(block.module): block.module for block in anatomy.blocks}.values():
            stack.callback(module.register_forward_pre_hook(session.enter_block).remove)
            stack.callback(module.register_forward_hook(session.leave_block).remove)
        for (name, module), layers in _by_module(wanted.gates).items():
            hook = _gate_hook(session, name, layers)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        if wanted.attention:
            keys = attention_keys(model)
            attending = {modules[anatomy.attention[layer]] for layer in wanted.attention}
            watched = {module: keys[module] for module in attending}
            stack.enter_context(REGISTRY.watch(watched, session.attend))
        yield session.recording
    session.finish()


def _by_module(
    gates: Mapping[tuple[str, int], GateSite],
) -> dict[tuple[str, nn.Module], dict[int, None]]:
    grouped: dict[tuple[str, nn.Module], dict[int, None]] = {}
    for (name, layer), site in gates.items():
        grouped.setdefault((name, site.module), {})[layer] = None
    return grouped


def _gate_hook(session: _Session, name: str, layers: Mapping[int, None]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        session.gate(name, layers, args)

    return hook
