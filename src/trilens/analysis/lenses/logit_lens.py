"""What each layer would predict: its residual stream through the model's own unembedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor

from trilens.analysis.lenses.readout import logit_blocks
from trilens.analysis.lenses.vocabulary_statistics import RunningVocabulary, VocabularyStatistics
from trilens.analysis.tokens import Token, token_id
from trilens.caches.activation import FullActivationCache
from trilens.caches.indices import check_positions
from trilens.errors import IncomparableError, NonFiniteError, NotStoredError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.lens.parts import ModelInfo
from trilens.models.token_strings import token_strings
from trilens.numbers import at_least, whole_number
from trilens.results import Tabular

__all__ = ["LogitLens", "Translator", "logit_lens", "same_model"]

_FORMAT = "trilens.logit_lens"
_VERSION = 1


class Translator(Protocol):
    """Takes a layer's residual stream to where the last layer's lies: see `tuned_lens`."""

    def check(self, lens: Lens) -> None:
        """Refuse another model."""

    def translate(self, layer: int, residual: Tensor) -> Tensor:
        """[..., d_model] → [..., d_model]."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LogitLens(Tabular):
    """What each layer would predict at each position. Tensors lie on the CPU.

    Attributes:
        layers: the model's own numbers; layer i is the stream after block i.
        positions: of the prompt, from 0.
        tokens: the prompt's tokens at these positions, as text.
        top_ids: the k most probable next tokens, descending: int64 [layers, positions, k].
        top_probabilities: theirs, in [0, 1]: [layers, positions, k].
        entropy_nats: of the distribution, in [0, ln vocab]: [layers, positions].
        kl_nats: KL(last layer ‖ layer), in [0, Inf]: [layers, positions]; None where the capture
            does not hold the last layer.
        target: a token id, or None.
        target_logits: of the target [layers, positions]; None without one.
        target_probabilities: in [0, 1], likewise.
        target_ranks: int64, likewise: how many tokens have a larger logit; 0 is the top token.
        texts: text of each token id that stands here.
        translated: whether a tuned lens was applied.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    top_ids: Tensor
    top_probabilities: Tensor
    entropy_nats: Tensor
    kl_nats: Tensor | None
    target: int | None
    target_logits: Tensor | None
    target_probabilities: Tensor | None
    target_ranks: Tensor | None
    texts: Mapping[int, str]
    translated: bool

    def __repr__(self) -> str:
        return f"LogitLens({len(self.layers)} layers × {len(self.positions)} positions)"

    def top_tokens(self, layer: int, position: SupportsIndex = -1) -> list[tuple[str, float]]:
        """The most probable next tokens of a layer: (text, probability), descending.

        Args:
            layer: one of `layers`.
            position: one of `positions`, or −1 for the last of them.

        Raises:
            NotStoredError: a layer or position that is not here.
        """
        i, at = _place(layer, self.layers, "layer"), whole_number(position, "position")
        j = _place(self.positions[-1] if at == -1 else at, self.positions, "position")
        ids, shares = self.top_ids[i, j].tolist(), self.top_probabilities[i, j].tolist()
        return [(self.texts[token], share) for token, share in zip(ids, shares, strict=True)]

    def table(self) -> list[dict[str, Any]]:
        """One row for each layer and position, with the most probable token."""
        rows = []
        for i, layer in enumerate(self.layers):
            for j, position in enumerate(self.positions):
                top = int(self.top_ids[i, j, 0])
                rows.append(
                    {
                        "layer": layer,
                        "position": position,
                        "token": self.tokens[j],
                        "top_id": top,
                        "top_token": self.texts[top],
                        "top_probability": float(self.top_probabilities[i, j, 0]),
                        "entropy_nats": float(self.entropy_nats[i, j]),
                        "kl_nats": _item(self.kl_nats, i, j),
                        "target_logit": _item(self.target_logits, i, j),
                        "target_probability": _item(self.target_probabilities, i, j),
                        "target_rank": _item(self.target_ranks, i, j),
                    }
                )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: a row as in the table, with all of the top tokens."""
        rows = self.table()
        tops = zip(self.top_ids.flatten(0, 1), self.top_probabilities.flatten(0, 1), strict=True)
        for row, (ids, shares) in zip(rows, tops, strict=True):
            pairs = zip(ids.tolist(), shares.tolist(), strict=True)
            row["top"] = [
                {"token_id": token, "token": self.texts[token], "probability": share}
                for token, share in pairs
            ]
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "layers": list(self.layers),
            "positions": list(self.positions),
            "tokens": list(self.tokens),
            "target": self.target,
            "target_token": None if self.target is None else self.texts[self.target],
            "translated": self.translated,
            "rows": rows,
        }


def logit_lens(
    cap: Capture,
    lens: Lens,
    *,
    k: int = 5,
    target: Token | None = None,
    positions: Sequence[SupportsIndex] | None = None,
    layers: Iterable[SupportsIndex] | None = None,
    translator: Translator | None = None,
    chunk: int | None = None,
) -> LogitLens:
    """Read each layer's residual stream with the model's final norm and unembedding.

    Of several residual streams it is their readout that is read.

    Args:
        cap: with residual="last" (its one position) or "all".
        lens: the model it came from.
        k: most probable tokens that are kept.
        target: a token id, or the text of one token, that is followed through the layers.
        positions: of the prompt, also from the end; all that the capture has where not given.
        layers: of those captured; all where not given.
        translator: a tuned lens, applied first.
        chunk: tokens of the vocabulary at once, 8,192 where not given; smaller takes less memory.

    Returns:
        A frozen result. The last layer's rows are the model's own predictions.

    Raises:
        NotStoredError: no residual stream, or a layer or position that the capture does not hold.
        OutOfRangeError: a position outside the prompt.
        TokenIdError, UsageError: a target that is no token; a model without an unembedding.
        IncomparableError: the capture, or the translator, is of another model.
        NonFiniteError: logits that are no distribution, naming layer and position.

    Memory
        About 130 MB besides the residuals, and what is returned: logits are read in blocks of
        8 MB, so that 4,096 positions × 256,000 tokens are never there at once. Where the
        unembedding is no plain matrix, the logits of one position in all layers.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    same_model(cap.model, lens, "capture")
    wanted = at_least(1, k, "k")
    held = cap.residual
    chosen = held.layers if layers is None else tuple(whole_number(i, "layer") for i in layers)
    chosen = tuple(dict.fromkeys(chosen))
    if not chosen:
        raise NotStoredError("no layers are asked, or the capture holds none: name some")
    streams = [held.readout(layer) for layer in chosen]
    at = _positions(cap, positions)
    if isinstance(held, FullActivationCache):
        # A slice where it can be one: all positions of a long prompt need no copy.
        everything = at == list(range(len(cap.tokens)))
        streams = streams if everything else [stream[at] for stream in streams]
    else:
        streams = [stream[None] for stream in streams]
    last = cap.model.n_layers - 1
    reference: int | None = None
    if last in chosen:
        reference = chosen.index(last)
    elif last in held.layers:
        reference, final = len(streams), held.readout(last)
        streams.append(final[at] if isinstance(held, FullActivationCache) else final[None])
    number = None if target is None else token_id(lens, target)
    if translator is not None:
        translator.check(lens)
        streams = [
            stream if i == reference else translator.translate(chosen[i], stream)
            for i, stream in enumerate(streams)
        ]
    parts = _statistics(lens, streams, chosen, at, wanted, number, reference, chunk)
    found = {
        each.name: _joined([getattr(part, each.name) for part in parts], len(chosen))
        for each in fields(VocabularyStatistics)
        if each.name != "good"
    }
    ids = sorted({*found["top_ids"].flatten().tolist(), *([] if number is None else [number])})
    return LogitLens(
        layers=chosen,
        positions=tuple(at),
        tokens=tuple(cap.tokens[i] for i in at),
        target=number,
        texts=MappingProxyType(dict(zip(ids, token_strings(ids, lens.tokenizer), strict=True))),
        translated=translator is not None,
        **found,
    )


def same_model(info: ModelInfo, lens: Lens, what: str) -> None:
    """Refuse what was made with another model.

    Raises:
        IncomparableError: the model's class, its layers or its width differ.
    """
    ours = (type(lens.model).__name__, lens.n_layers, lens.d_model)
    theirs = (info.model_class, info.n_layers, info.d_model)
    if ours != theirs:
        raise IncomparableError(
            f"{what} is of {theirs[0]} ({theirs[1]} layers, d_model {theirs[2]}), the lens of "
            f"{ours[0]} ({ours[1]} layers, d_model {ours[2]}): give one of the same model"
        )


def _statistics(
    lens: Lens,
    streams: Sequence[Tensor],
    layers: Sequence[int],
    positions: Sequence[int],
    k: int,
    target: int | None,
    reference: int | None,
    chunk: int | None,
) -> list[VocabularyStatistics]:
    parts, running = [], RunningVocabulary(k, target, reference)
    for block in logit_blocks(lens, streams, first=target or 0, chunk=chunk):
        if block.begins:
            running = RunningVocabulary(k, target, reference)
        running.add(block.logits, block.start)
        if block.ends:
            parts.append(running.result())
            bad = (~parts[-1].good).nonzero().tolist()
            if bad:
                i, j = bad[0]
                raise NonFiniteError(
                    f"layer {[*layers, lens.n_layers - 1][i]} gives logits that are no "
                    "distribution (NaN, +Inf, or −Inf alone) at position "
                    f"{positions[block.rows.start + j]}: load the model in another dtype"
                )
    return parts


def _joined(parts: Sequence[Tensor | None], n_layers: int) -> Any:
    return (
        None if parts[0] is None else torch.cat([p[:n_layers] for p in parts if p is not None], 1)
    )


def _positions(cap: Capture, asked: Sequence[SupportsIndex] | None) -> list[int]:
    n = len(cap.tokens)
    whole = isinstance(cap.residual, FullActivationCache)
    if asked is None:
        return list(range(n)) if whole else [n - 1]
    found = check_positions(asked, n, "position", "this prompt")
    if not found:
        raise NotStoredError("no positions are asked: name some, or leave positions out for all")
    absent = [i for i in found if not whole and i != n - 1]
    if absent:
        raise NotStoredError(
            f"position {absent[0]} was not captured: this capture holds the residual of the last "
            f"position, {n - 1}; capture with residual='all'"
        )
    return found


def _place(value: int, held: Sequence[int], noun: str) -> int:
    if value not in held:
        known = ", ".join(map(str, held[:8])) + (" …" if len(held) > 8 else "")
        raise NotStoredError(f"{noun} {value} is not in this result: it has {noun}s {known}")
    return held.index(value)


def _item(values: Tensor | None, i: int, j: int) -> Any:
    return None if values is None else values[i, j].item()
