"""The attention registry tap: transformers' own extension point, wrapped during a capture.

Every attention module asks `ALL_ATTENTION_FUNCTIONS.get_interface(key, eager_function)` for its
function. The tap overrides the model's CURRENT key in that mapping with a wrapper that calls the
very function which would have run, and hands calls of watched modules to their watcher. The config
is never touched: several models branch on the name of the key.

The mapping is process-wide, so the wrapper dispatches on the module that calls: modules nobody
watches pass straight through. The override is counted, and goes when the last watcher goes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trilens.errors import AttentionPathError
from trilens.taps.override import CountedOverrides, Functions
from trilens.taps.undo import undone

__all__ = [
    "REGISTRY",
    "AttentionArguments",
    "AttentionCall",
    "AttentionEditor",
    "AttentionRegistry",
    "attention_keys",
]

_REGISTRY_NAME = "ALL_ATTENTION_FUNCTIONS"
_EAGER_SUFFIX = "eager_attention_forward"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one attention function was called with, and what it gave back.

    Shapes
        query [batch, heads, seq_q, d], key [batch, kv_heads, seq_k, d], after rotation;
        value [batch, kv_heads, seq_k, d_v]; output [batch, seq_q, heads, d_v];
        weights [batch, heads, seq_q, seq_k] where the function returned them.

    Attributes:
        edited: the weights are what an edit made of the function's.
        proven: query, key, mask and options gave back the weights, which are not kept.
    """

    module: nn.Module
    implementation: str
    function: Callable[..., Any]
    query: Tensor
    key: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]
    weights: Tensor | None
    value: Tensor | None = None
    output: Tensor | None = None
    edited: bool = False
    proven: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class AttentionArguments:
    """What an attention function is about to be called with; axes as of `AttentionCall`."""

    module: nn.Module
    implementation: str
    function: Callable[..., Any]
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: Mapping[str, Any]

    @property
    def is_causal(self) -> bool:
        """Whether SDPA hides later keys of itself, because it is given no mask."""
        asked = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if asked is None else asked
        sdpa = self.function is sdpa_attention_forward
        return bool(causal) and sdpa and self.mask is None and self.query.shape[-2] > 1


class AttentionEditor(Protocol):
    """What may change attention calls of watched modules."""

    def before(self, given: AttentionArguments) -> AttentionArguments:
        """What the function is called with instead."""

    def after(self, call: AttentionCall) -> AttentionCall:
        """The call with another output."""


Watcher = Callable[[AttentionCall], None]
_Entry = tuple[Watcher, AttentionEditor | None]


@dataclass(slots=True)
class AttentionRegistry:
    """All current watchers of this process and the overrides that serve them."""

    _watchers: dict[int, _Entry] = field(default_factory=dict)
    _overrides: CountedOverrides = field(default_factory=CountedOverrides)

    @contextmanager
    def watch(
        self,
        modules: Mapping[nn.Module, str],
        watcher: Watcher,
        editor: AttentionEditor | None = None,
    ) -> Iterator[None]:
        """Hand every attention call of the given modules to the watcher while the block runs.

        Args:
            modules: attention-calling modules with their current implementation key.
            watcher: called after the function ran, in the thread that ran it; sees what the
                editor made of the call.
            editor: may change what the function is called with, and what it gives.
        """
        targets = {
            (id(interface), key): (interface, key)
            for module, key in modules.items()
            for interface in _interfaces(module)
        }
        mine: dict[int, _Entry] = {id(module): (watcher, editor) for module in modules}
        with (
            self._overrides.override(list(targets.values()), self._wrapper),
            undone(lambda: self._forget(mine)),
        ):
            with self._overrides.guard:
                self._watchers.update(mine)
            yield

    def _forget(self, mine: Mapping[int, _Entry]) -> None:
        with self._overrides.guard:
            for key, entry in mine.items():
                if self._watchers.get(key) is entry:
                    del self._watchers[key]

    def _wrapper(self, name: str, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        watchers = self._watchers

        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            # "eager" is in no mapping: it stands for the calling file's own function.
            function = previous if previous is not None else _eager_of(sys._getframe(1))
            entry = watchers.get(id(module))
            if entry is None:
                return function(module, query, key, value, attention_mask, *args, **kwargs)
            watcher, editor = entry
            given = AttentionArguments(
                module, name, function, query, key, value, attention_mask, kwargs
            )
            if editor is not None:
                given = editor.before(given)
            result = function(
                module, given.query, given.key, given.value, given.mask, *args, **kwargs
            )
            call = _called(given, result)
            if editor is None:
                watcher(call)
                return result
            edited = editor.after(call)
            watcher(edited)
            if edited.output is call.output:
                return result
            rest = result[1:] if isinstance(result, tuple) else None
            return edited.output if rest is None else (edited.output, *rest)

        return attention


def _called(given: AttentionArguments, result: Any) -> AttentionCall:
    output, weights = (*result, None)[:2] if isinstance(result, tuple) else (result, None)
    return AttentionCall(
        given.module,
        given.implementation,
        given.function,
        given.query,
        given.key,
        given.mask,
        given.options,
        weights,
        given.value,
        output,
    )


def _interfaces(module: nn.Module) -> Iterable[Functions]:
    """The registry objects that the module's code asks: the global one, or its file's own."""
    found: dict[int, Functions] = {}
    for cls in type(module).__mro__:
        interface = getattr(sys.modules.get(cls.__module__), _REGISTRY_NAME, None)
        if interface is not None:
            found[id(interface)] = interface
    return found.values()


def _eager_of(frame: Any) -> Callable[..., Any]:
    """The eager function that the calling frame named as its default."""
    names = [name for name in frame.f_code.co_names if name.endswith(_EAGER_SUFFIX)]
    function = frame.f_globals.get(names[0]) if len(names) == 1 else None
    if function is None:
        raise AttentionPathError(
            f"attention in {frame.f_globals.get('__name__')}.{frame.f_code.co_name} has no eager "
            f"function that can be told (candidates: {names}); load the model with "
            "attn_implementation='sdpa'"
        )
    return function  # type: ignore[no-any-return]


def attention_keys(
    model: nn.Module, modules: Iterable[nn.Module] | None = None
) -> dict[nn.Module, str]:
    """The modules whose code asks the registry, with their config's current implementation key.

    Args:
        model: whose config counts for a module without one.
        modules: which modules to look at; all of the model's where not given.
    """
    keys: dict[nn.Module, str] = {}
    fallback = getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager"
    for module in model.modules() if modules is None else modules:
        if any(True for _ in _interfaces(module)):
            config = getattr(module, "config", None)
            keys[module] = getattr(config, "_attn_implementation", None) or fallback
    return keys


REGISTRY = AttentionRegistry()
