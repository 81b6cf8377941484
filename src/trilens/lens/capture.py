"""`Capture`: what one forward pass over one prompt left behind. Frozen; saved without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.cross_attention import CrossAttentionCache
from trilens.caches.gates import GateCache
from trilens.caches.indices import check_index
from trilens.caches.sites import SiteCache
from trilens.caches.states import StateCache
from trilens.caches.storage import distinct_bytes
from trilens.errors import CorruptFileError, NotStoredError, UsageError
from trilens.io.paths import as_path
from trilens.io.tensors import read_tensors, write_tensors
from trilens.io.typed import typed
from trilens.lens.parts import ModelInfo, Parts
from trilens.lens.saved_capture import FORMAT, VERSION, described, rebuilt
from trilens.numbers import at_least
from trilens.results import Shown
from trilens.statistics.probabilities import probabilities
from trilens.text.alignment import Alignment, align
from trilens.text.media import Media, positions_of
from trilens.text.prompt_text import PromptText
from trilens.text.source import Source

__all__ = ["Capture"]


_HOW = {
    "residual": "residual='last' or 'all'",
    "attention": "attention=True",
    "effective": "effective=True",
    "gates": "gates=True",
    "states": "states=True",
    "sites": "sites=['resid_mid', …]",
    "cross_attention": "attention=True, a lens on a decoder that has an encoder",
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Capture(Shown):
    """One prompt, one forward pass, no padding anywhere.

    `residual`, `attention`, `effective`, `gates`, `states` and `sites` raise where they were not
    captured; `has("attention")` asks.

    Attributes:
        tokens: the tokens as text.
        token_ids: [seq], on the CPU.
        model: which model it was.
        parts: what is held, with None for what is not.
        prompt_text: the prompt's text and the characters that each token covers; None where the
            lens had no tokenizer, and in files from before it was kept.
        hash_checked: of a capture that was loaded: its file named a hash of its content, and fits
            it; False for files from before there were hashes. None for one that was not loaded.
        media: which tokens stand for images, videos and audio; see `image_positions`.
        source: what the encoder read, of a decoder's capture; None for other captures.

    Memory
        `nbytes`; queries, keys and full residuals of a single prompt are references to tensors of
        the forward pass.
    """

    tokens: list[str]
    token_ids: Tensor
    model: ModelInfo
    parts: Parts
    hash_checked: bool | None = None
    prompt_text: PromptText | None = None
    media: tuple[Media, ...] = ()
    source: Source | None = None

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

    @property
    def sites(self) -> SiteCache:
        """Values of named places, by name and layer; `NotStoredError` where none was captured."""
        part = self.parts.sites
        return part if part is not None else self._refuse("sites")

    @property
    def cross_attention(self) -> CrossAttentionCache:
        """Per layer, from a decoder's tokens to its source; `NotStoredError` without it."""
        part = self.parts.cross_attention
        return part if part is not None else self._refuse("cross_attention")

    @property
    def source_tokens(self) -> tuple[str, ...]:
        """One string per position of the source; `NotStoredError` where there is no source."""
        if self.source is None:
            raise NotStoredError("this capture has no source: its model is no encoder–decoder")
        return self.source.tokens

    def _refuse(self, name: str) -> NoReturn:
        held = ", ".join(self.parts.names) or "nothing"
        raise NotStoredError(
            f"{name} was not captured: this capture holds {held}; capture with {_HOW[name]}"
        )

    @property
    def text(self) -> str:
        """The prompt's text, without special tokens; `NotStoredError` where it is not known."""
        return self._written().text

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Per token, the (start, stop) characters of `text` that it covers.

        Empty, start = stop, for a special token; a token that holds a part of a character's bytes
        covers the whole character. `NotStoredError` where the text is not known.
        """
        return self._written().spans

    def find(self, text: str, occurrence: SupportsIndex | None = None) -> tuple[int, ...]:
        """Positions of the tokens that cover a text, ascending; a token covered in part counts.

        Args:
            text: looked for in `text` as it is written: case and spaces count.
            occurrence: which one, from 0, negative from the end; all of them where not given.

        Raises:
            TextNotFoundError: it does not occur; names what is nearest.
            OutOfRangeError: it occurs less often.
            ValueRangeError: an empty text.
            NotStoredError: this prompt's text is not known.
        """
        return self._written().find(text, self.tokens, occurrence)

    def image_positions(
        self, number: SupportsIndex = 0, *, tile: SupportsIndex | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The positions of the tokens that stand for an image, laid out as the image is.

        An answer about tokens becomes a map of the image:
        `cap.attention.attention_from_position(layer, i)[cap.image_positions(0)]`.

        Args:
            number: of the image among the prompt's images, negative from the end.
            tile: of an image that was cut into tiles.

        Returns:
            int64 [rows, cols]; [tokens] where no token belongs to one place of the image.

        Raises:
            NotStoredError: no token of this prompt stands for an image.
            OutOfRangeError: no such image or tile; or several tiles, and none is named.
        """
        return positions_of(self.media, "image", number, tile)

    def align(self, other: Capture) -> Alignment:
        """This prompt's tokens beside another's, such as a corrupted one's.

        Token ids are compared, or the tokens as text where the captures are of different models.
        """
        if self.model == other.model:
            keys = self.token_ids.tolist(), other.token_ids.tolist()
            return align(self.tokens, other.tokens, keys)
        return align(self.tokens, other.tokens, (self.tokens, other.tokens))

    def _written(self) -> PromptText:
        if self.prompt_text is not None:
            return self.prompt_text
        ids = self.token_ids.tolist()
        if -1 in ids:
            why = "it was given as vectors (inputs_embeds), which stand for no text"
        elif any(token == f"<{i}>" for token, i in zip(self.tokens, ids, strict=True)):
            why = "it was captured by a lens without a tokenizer; give Lens(model, tokenizer) one"
        else:
            why = "its file is from before texts were kept; capture again"
        raise NotStoredError(f"the text of this prompt is not known: {why}")

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
            "model": self.model.to_dict(),
            "text": None if self.prompt_text is None else self.prompt_text.to_dict(),
            **({} if self.source is None else {"source": self.source.to_dict()}),
            **described(self.parts),
            **({"media": [each.to_dict() for each in self.media]} if self.media else {}),
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
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            UsageError,
        ) as error:
            raise CorruptFileError(
                f"{path} is not a whole capture: {type(error).__name__}: {error}; capture again"
            ) from error

    @classmethod
    def _rebuild(cls, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Capture:
        if len(manifest["tokens"]) != len(tensors["token_ids"]):
            raise ValueError("tokens and token ids differ in number")
        # Files from before texts were kept do not speak of them.
        text = manifest.get("text")
        written = None if text is None else PromptText.from_dict(text)
        if written is not None and len(written.spans) != len(tensors["token_ids"]):
            raise ValueError("spans and token ids differ in number")
        model = typed(ModelInfo, manifest["model"])
        return cls(
            tokens=[str(token) for token in manifest["tokens"]],
            token_ids=tensors["token_ids"],
            model=model,
            hash_checked=manifest["hashed"] is True,
            parts=rebuilt(tensors, manifest, model.n_layers),
            prompt_text=written,
            media=tuple(
                Media.from_dict(each, len(tensors["token_ids"]))
                for each in manifest.get("media", ())
            ),
            source=None if manifest.get("source") is None else Source.from_dict(manifest["source"]),
        )
