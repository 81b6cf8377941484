"""`Capture`: what one forward pass over one prompt left behind. Frozen; saved without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.gates import GateCache
from trilens.caches.indices import check_index
from trilens.caches.states import StateCache
from trilens.caches.storage import distinct_bytes
from trilens.errors import CorruptFileError, NotStoredError, UsageError
from trilens.io.paths import as_path
from trilens.io.tensors import read_tensors, write_tensors
from trilens.io.typed import typed
from trilens.lens.parts import ModelInfo, Parts
from trilens.lens.saved_capture import FORMAT, VERSION, described, rebuilt
from trilens.numbers import at_least
from trilens.statistics.probabilities import probabilities

__all__ = ["Capture"]


_HOW = {
    "residual": "residual='last' or 'all'",
    "attention": "attention=True",
    "effective": "effective=True",
    "gates": "gates=True",
    "states": "states=True",
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Capture:
    """One prompt, one forward pass, no padding anywhere.

    `residual`, `attention`, `effective`, `gates` and `states` raise where they were not captured;
    `has("attention")` asks.

    Attributes:
        tokens: the tokens as text.
        token_ids: [seq], on the CPU.
        model: which model it was.
        parts: what is held, with None for what is not.
        hash_checked: of a capture that was loaded: its file named a hash of its content, and fits
            it; False for files from before there were hashes. None for one that was not loaded.

    Memory
        `nbytes`; queries, keys and full residuals of a single prompt are references to tensors of
        the forward pass.
    """

    tokens: list[str]
    token_ids: Tensor
    model: ModelInfo
    parts: Parts
    hash_checked: bool | None = None

    def __repr__(self) -> str:
        return (
            f"Capture({len(self.tokens)} tokens of {self.model.model_class}: "
            f"{', '.join(self.parts.names) or 'nothing'}; {self.nbytes / 1e6:.1f} MB)"
        )

    def has(self, part: str) -> bool:
        """Whether a part was captured: "logits", "residual", "attention", "effective" …

        Raises:
            UsageError: there is no such part.
        """
        known = [each.name for each in fields(Parts)]
        if part not in known:
            raise UsageError(f"part {part!r} is unknown: the parts are {', '.join(known)}")
        return part in self.parts.names

    @property
    def logits(self) -> Tensor | None:
        """[seq, vocab]; [1, vocab] for the last position alone; None where there are none."""
        return self.parts.logits

    @property
    def residual(self) -> ActivationCache | FullActivationCache:
        """The residual stream after each block; `NotStoredError` where it was not captured."""
        part = self.parts.residual
        return part if part is not None else self._refuse("residual")

    @property
    def attention(self) -> AttentionCache:
        """Per-layer attention patterns, lazy; `NotStoredError` where it was not captured."""
        part = self.parts.attention
        return part if part is not None else self._refuse("attention")

    @property
    def effective(self) -> AttentionCache:
        """Recurrent layers' effective attention; `NotStoredError` where it was not captured."""
        part = self.parts.effective
        return part if part is not None else self._refuse("effective")

    @property
    def gates(self) -> GateCache:
        """Per-layer gates; `NotStoredError` where they were not captured."""
        part = self.parts.gates
        return part if part is not None else self._refuse("gates")

    @property
    def states(self) -> StateCache:
        """Recurrent states after chosen tokens; `NotStoredError` where they were not captured."""
        part = self.parts.states
        return part if part is not None else self._refuse("states")

    def _refuse(self, name: str) -> NoReturn:
        held = ", ".join(self.parts.names) or "nothing"
        raise NotStoredError(
            f"{name} was not captured: this capture holds {held}; capture with {_HOW[name]}"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, each storage counted once."""
        return distinct_bytes(tensor for _, tensor in self._tensors())

    def top_tokens(
        self, k: SupportsIndex = 5, position: SupportsIndex = -1
    ) -> list[tuple[int, float]]:
        """The k most probable next tokens after a position: (token id, probability), descending.

        Raises:
            NotStoredError: the logits were not captured.
            OutOfRangeError: a position that is not there.
            ValueRangeError: k is no whole number from 1 on.
            NonFiniteError: NaN or +Inf among the logits, or nothing but −Inf.
        """
        if self.logits is None:
            raise NotStoredError("logits were not captured: capture with logits='all' or 'last'")
        n = at_least(1, k, "k")
        owner = "this capture's logits"
        at = check_index(position, self.logits.shape[0], "position", owner, negative=True)
        found = probabilities(self.logits[at], f"of position {at}")
        top = found.topk(min(n, len(found)))
        return [
            (int(i), float(p)) for i, p in zip(top.indices.cpu(), top.values.cpu(), strict=True)
        ]

    def to(self, device: str | torch.device) -> Capture:
        """The same capture on another device."""
        return replace(self, parts=self.parts.to(device, self.model.n_layers))

    def shares_pattern(self, layer: int) -> bool:
        """Whether `attention` answers for a layer with its effective attention."""
        return layer in self.parts.shared_layers

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "token_ids", self.token_ids
        yield from self.parts.tensors()

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the tensors, and the rest as JSON in its header.

        Written beside its place and renamed when it is whole, so that no half file is left. The
        file names a hash of all its bytes, which `load` checks.

        Returns:
            The path.
        """
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokens": self.tokens,
            "model": asdict(self.model),
            **described(self.parts),
        }
        return write_tensors(as_path(path), dict(self._tensors()), manifest)

    @classmethod
    def load(cls, path: str | Path) -> Capture:
        """Read a capture that `save` wrote; nothing in the file is executed.

        Raises:
            CorruptFileError: not a capture, of another version, or damaged.
            ModelNotFoundError: no such file.
        """
        tensors, manifest = read_tensors(as_path(path), FORMAT, VERSION)
        try:
            return cls._rebuild(tensors, manifest)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise CorruptFileError(
                f"{path} is not a whole capture: {type(error).__name__}: {error}; capture again"
            ) from error

    @classmethod
    def _rebuild(cls, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Capture:
        if len(manifest["tokens"]) != len(tensors["token_ids"]):
            raise ValueError("tokens and token ids differ in number")
        model = typed(ModelInfo, manifest["model"])
        return cls(
            tokens=[str(token) for token in manifest["tokens"]],
            token_ids=tensors["token_ids"],
            model=model,
            hash_checked=manifest["hashed"] is True,
            parts=rebuilt(tensors, manifest, model.n_layers),
        )
