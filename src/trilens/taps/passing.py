"""What the hooks of a session do while a pass runs: edit, and keep what was asked."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trilens.caches.patterns.protocol import Pattern
from trilens.caches.storage import address_of
from trilens.errors import (
    AttentionPathError,
    CaptureError,
    RecurrentStateError,
    SilentSiteError,
)
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.gates.decoding import as_prefill
from trilens.models.gates.kernels import KernelRecord
from trilens.models.gates.mixers import Boundary, Edge
from trilens.models.gates.recurrent_states import states_of
from trilens.models.gates.site import GateSite, GateSource
from trilens.models.sites.site import SiteKey, title_of
from trilens.models.trace import same, tensors_in
from trilens.taps.attention import settled
from trilens.taps.attention_taps import AttentionTaps
from trilens.taps.edits import Compiled
from trilens.taps.hooks import Hooks
from trilens.taps.inline.memory import KeptPairs
from trilens.taps.recording import CaptureRequest, Recording
from trilens.taps.registry import AttentionCall
from trilens.taps.site_taps import SiteTaps
from trilens.taps.sum_taps import SumTaps

__all__ = ["Session", "TapKey"]

TapKey = tuple[str, nn.Module | None, str]
"""Event, module, kernel function: what one hook stands for."""
Taps = dict[TapKey, dict[int, list[tuple[str, GateSite]]]]


class Session:
    """What is edited and kept in each of the passes that run while the hooks stand."""

    def __init__(
        self,
        hooks: Hooks,
        anatomy: Anatomy,
        request: CaptureRequest,
        edits: Compiled,
    ) -> None:
        self.hooks = hooks
        self.anatomy = anatomy
        self.gradients = request.gradients
        self.check_gates: Callable[[], None] = _nothing
        self.taps = _by_tap(request.gates)
        self.sites = SiteTaps(self, request.sites.values(), edits)
        self.calls = AttentionTaps(self, edits, self.sites)
        self.sums = SumTaps(self, self.sites, anatomy.d_model)
        self.begin(request, 0)

    def begin(self, request: CaptureRequest, start: int) -> None:
        """Begin a pass over the tokens of a text from `start` on.

        Args:
            request: as the session's own, of this pass's tokens.
            start: tokens that earlier passes read.
        """
        self.request = request
        self.recording = Recording(request)
        self.span = request.span(start)
        self.layer: int | None = None
        self.done = 0
        self.references: list[tuple[Tensor, int]] = []
        self.counts: dict[tuple[int, TapKey], int] = {}
        self.entry: dict[str, Any] | None = None
        self.pairs = KeptPairs()
        self.sites.begin()
        self.sums.begin()

    def keep_site(self, key: SiteKey, value: Tensor) -> None:
        """Note a site's value, by reference."""
        self.recording.sites[key] = value if self.gradients else self.keep(value)

    def keep_pattern(self, key: SiteKey, pattern: Pattern) -> None:
        """Note a layer's attention pattern as a site's value."""
        self.recording.sites[key] = pattern

    def mine(self) -> bool:
        """Whether this thread's block is running."""
        return not self.hooks.closed and threading.get_ident() == self.hooks.thread

    def enter_block(self, module: nn.Module, _args: Any) -> None:
        """A block begins."""
        if not self.mine():
            return
        blocks = self.anatomy.blocks
        if self.done >= len(blocks) or blocks[self.done].module is not module:
            if not self.hooks.running():
                return
            expected = blocks[self.done].path if self.done < len(blocks) else "nothing"
            raise CaptureError(
                f"a block ran out of order: expected {expected} as layer {self.done}, got a "
                f"{type(module).__name__}; the model was changed since the lens was made, or "
                "passes blocks by that ran on what it was proven on (probe=)"
            )
        self.layer = self.done

    def leave_block(self, module: nn.Module, _args: Any, output: Any) -> None:
        """A block ends: keep its residual stream."""
        if not self.mine() or self.layer is None:
            return
        layer, self.layer = self.layer, None
        self.done += 1
        if self.request.residual is None or layer not in self.request.layers:
            return
        stream = self.anatomy.form.read(list(tensors_in(output))[self.anatomy.blocks[layer].output])
        if self.request.residual == "all":
            self.recording.residual[layer] = self.keep(stream)
        else:
            rows = torch.arange(stream.shape[0], device=stream.device)
            last = torch.tensor(self.request.lengths, device=stream.device) - 1
            # Indexing copies: keeping a last token must not keep the whole sequence alive.
            self.recording.residual[layer] = stream.detach()[rows, last]

    def attend(self, call: AttentionCall) -> None:
        """Keep the queries and keys of an attention call."""
        layer = self.layer
        if not self.mine() or layer is None or layer not in self.request.attention:
            return
        held: dict[Any, AttentionCall] = self.recording.attention
        place: Any = layer
        if layer in self.anatomy.attention_parts:
            held, place = self.recording.parts.setdefault(layer, {}), self._part(layer, call.module)
        before = held.get(place)
        if before is not None:
            if same(before.query, call.query) and same(before.key, call.key):
                return
            raise AttentionPathError(
                f"layer {layer} calls attention twice with different queries or keys: it has no "
                "single attention pattern"
            )
        call = settled(call)
        self.pairs.check(call, layer)
        held[place] = self.keep_call(call)

    def attend_across(self, call: AttentionCall) -> None:
        """Keep the queries and keys of an attention call to the encoder's positions."""
        layer = self.layer
        if not self.mine() or layer is None or layer not in self.request.cross:
            return
        if self.request.cross[layer].module is call.module:
            call = settled(call)
            self.pairs.check(call, layer)
            self.recording.cross[layer] = self.keep_call(call)

    def keep_call(self, call: AttentionCall) -> AttentionCall:
        """An attention call without what its pattern does not need."""
        # Values are as large as keys: they are kept where weights have to be proven by them.
        proof = call.weights is not None
        return replace(
            call,
            query=self.keep(call.query),
            key=self.keep(call.key),
            value=call.value if proof else None,
            output=call.output if proof else None,
        )

    def _part(self, layer: int, module: nn.Module) -> str:
        """The name that a module that attends has in its block."""
        block = self.anatomy.blocks[layer].path
        for path in self.anatomy.attention_parts[layer]:
            if self.hooks.model.get_submodule(path) is module:
                return path.removeprefix(f"{block}.")
        raise AttentionPathError(
            f"layer {layer} calls attention in a {type(module).__name__} that it did not attend in "
            "when the lens was opened: the model was changed since"
        )

    def tapped(self, key: TapKey, calls: Mapping[str, Any]) -> None:
        """One call of a tapped module or kernel: keep what the gates that read it ask for."""
        layer = self.layer
        if layer is None or layer not in self.taps[key]:
            return
        # dt and the decay that it makes are one tensor: read once, kept once.
        read: dict[object, Tensor] = {}
        number = self.counts.get((layer, key), 0)
        self.counts[layer, key] = number + 1
        for name, site in self.taps[key][layer]:
            if key[0] != "kernel" and site.source.order != number:
                continue
            if site.read is None:
                value = self.keep(calls["tensors"][site.source.index])
            else:
                # A value computed here is this capture's own.
                if site.read not in read:
                    found = site.read(calls).detach()
                    read[site.read] = self.keep(found) if _is_input(found, calls) else found
                value = read[site.read]
            self.recording.gates.setdefault((name, layer), []).append(value)

    def module_hook(self, key: TapKey) -> Callable[..., None]:
        """A hook that keeps what gates read at a module."""

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.mine():
                tensors = (*tensors_in(args), *tensors_in(kwargs))
                self.tapped(key, {"tensors": tensors, "x": tensors[0] if tensors else None})

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.mine():
                tensors = tuple(tensors_in(output))
                self.tapped(key, {"tensors": tensors, "x": tensors[0] if tensors else None})

        return before if key[0] == "input" else after

    def leave_kernel(self, name: str, arguments: Mapping[str, Any], result: Any) -> None:
        """Keep what a recurrence was given, what it gave, its states and its gates."""
        name, arguments, result = as_prefill(name, arguments, result)
        if self.layer is not None and self.layer in self.request.kernels:
            held = {k: self.keep(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            calls = self.recording.kernels.setdefault(self.layer, [])
            calls.append(KernelRecord(name, held, self.keep_result(result)))
        self.remember(name, arguments, result)
        key = _key(GateSource("kernel", kernel=name))
        if key in self.taps:
            self.tapped(key, arguments)

    def boundary_hook(self, edge: Edge) -> Callable[..., None]:
        """Notes what a recurrence without a kernel function is given, and what it gave."""
        signature = inspect.signature(edge.module.forward)

        def ours() -> Boundary | None:
            if not self.mine() or self.layer is None:
                return None
            found = self.request.boundaries.get(self.layer)
            return found if found is not None and edge in (found.enter, found.leave) else None

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found = ours()
            if found is not None and edge == found.enter:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                self.entered(found, bound.arguments)
            elif found is not None:
                self.left(found, next(tensors_in((args, kwargs))))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            found = ours()
            if found is not None and edge == found.enter:
                self.entered(found, {"output": output})
            elif found is not None:
                self.left(found, output)

        return before if edge.event == "input" else after

    def entered(self, boundary: Boundary, arguments: Mapping[str, Any]) -> None:
        """A recurrence without a kernel function begins."""
        given = dict(arguments)
        if self.layer in self.request.kernels or self.request.copy:
            given = {k: self.keep_result(v) for k, v in arguments.items()}
        self.entry = {**given, "module": boundary.module}

    def left(self, boundary: Boundary, result: Any) -> None:
        """A recurrence without a kernel function ends."""
        if self.layer is None or self.entry is None:
            return
        held, self.entry = self.entry, None
        if self.layer in self.request.kernels:
            record = KernelRecord(boundary.function, held, self.keep_result(result))
            self.recording.kernels.setdefault(self.layer, []).append(record)
        self.remember(boundary.function, held, result)

    def remember(self, name: str, arguments: Mapping[str, Any], result: Any) -> None:
        """The states of one call, at once: what they are computed from need not outlive it."""
        request, layer = self.request.states, self.layer
        if layer is None or layer not in request.layers:
            return
        lengths = self.request.lengths
        try:
            states = states_of(
                name, arguments, result, positions=request.positions, lengths=lengths
            )
        except RecurrentStateError as error:
            raise RecurrentStateError(f"layer {layer}: {error}") from error
        self.recording.states.setdefault(layer, []).append(states)

    def keep_result(self, result: Any) -> Any:
        """What a recurrence gave, a tensor or tuples that hold some, each of them kept."""
        if isinstance(result, Tensor):
            return self.keep(result)
        if isinstance(result, tuple | list):
            return tuple(self.keep_result(item) for item in result)
        return result

    def keep(self, tensor: Tensor) -> Tensor:
        """A detached reference (or copy), with its version to see whether it is overwritten."""
        tensor = tensor.detach()
        if self.request.copy:
            return tensor.clone()
        self.references.append((tensor, tensor._version))
        return tensor

    def finish(self) -> None:
        """Raise if a requested site did not fire, or attention went another way."""
        got, asked = self.recording, self.request
        got.overwritten = any(tensor._version != version for tensor, version in self.references)
        silent = []
        if asked.residual is not None:
            silent += [f"resid_post of layer {i}" for i in asked.layers if i not in got.residual]
        missing = [
            i
            for i in asked.attention
            if i not in got.attention
            and len(got.parts.get(i, ())) < len(self.anatomy.attention_parts.get(i, (i,)))
        ]
        if missing and self.done == self.anatomy.n_layers:
            raise AttentionPathError(
                f"the attention of layer {missing[0]} ran without one of transformers' attention "
                "functions, which it called when the lens was opened: the model's "
                "attn_implementation was changed since, and its code goes another way now (as "
                "GPT-2's reorder_and_upcast_attn does under 'eager'); set it back (model."
                "set_attn_implementation('sdpa')), or capture without attention=True"
            )
        silent += [f"attention of layer {i}" for i in missing]
        silent += [f"cross attention of layer {i}" for i in asked.cross if i not in got.cross]
        silent += [f"{name} of layer {i}" for name, i in asked.gates if (name, i) not in got.gates]
        silent += [f"recurrence of layer {i}" for i in asked.kernels if i not in got.kernels]
        silent += [f"state of layer {i}" for i in asked.states.layers if i not in got.states]
        silent += [title_of(key) for key in asked.sites if key not in got.sites]
        if silent:
            raise SilentSiteError(
                f"{len(silent)} requested sites did not fire in this pass: {listed(silent)}"
                f"; the model ran {self.done} of "
                f"{self.anatomy.n_layers} layers"
            )
        self.check_gates()


def _key(source: GateSource) -> TapKey:
    return source.event, source.module, source.kernel


def _by_tap(gates: Mapping[tuple[str, int], GateSite]) -> Taps:
    grouped: Taps = {}
    for (name, layer), site in gates.items():
        for source in (site.source, *site.more):
            at = grouped.setdefault(_key(source), {}).setdefault(layer, [])
            at.append((name, replace(site, source=source)))
    return grouped


def _nothing(*_: Any) -> None:
    """Before a kernel there is nothing to do."""


def _is_input(tensor: Tensor, calls: Mapping[str, Any]) -> bool:
    """Whether a reader handed on one of the model's own tensors."""
    return any(value is tensor or _shares(value, tensor) for value in calls.values())


def _shares(value: Any, tensor: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    return address_of(value) == address_of(tensor)
