"""What each layer would predict: its residual stream through the final norm and unembedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.analysis.metrics import Token, token_id
from trilens.analysis.residual_logits import residual_logits
from trilens.caches.activation import ActivationCache
from trilens.caches.indices import check_positions
from trilens.errors import (
    IncomparableError,
    NonFiniteError,
    NotStoredError,
    OutOfRangeError,
    ShapeError,
)
from trilens.io.messages import listed
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.token_strings import token_strings
from trilens.numbers import at_least, whole_number
from trilens.results import Tabular

__all__ = ["LogitLens", "Translator", "logit_lens", "need_same_model"]

Translator = Callable[[int, Tensor], Tensor]
"""(layer, its residuals [positions, d_model]) → what stands for the last layer's."""

_FORMAT = "trilens.logit_lens"
_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LogitLens(Tabular):
    """What each layer would predict after each position.

    Attributes:
        layers: the model's own numbers.
        positions: of the prompt, from 0.
        tokens: the tokens there, as text.
        top_ids: int64 [layers, positions, k], most probable first.
        top_probabilities: float32 [layers, positions, k], in [0, 1].
        entropy_nats: float32 [layers, positions].
        kl_nats: float32 [layers, positions]: KL(last layer ‖ this layer), 0 in the last layer.
        target: the token that is followed, or None.
        target_rank: int64 [layers, positions]; 0 where it is the most probable. None without.
        target_probability: float32 [layers, positions], or None.
        target_logit: float32 [layers, positions], or None.
        texts: every token id above as text.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    top_ids: NDArray[np.int64]
    top_probabilities: NDArray[np.float32]
    entropy_nats: NDArray[np.float32]
    kl_nats: NDArray[np.float32]
    target: int | None
    target_rank: NDArray[np.int64] | None
    target_probability: NDArray[np.float32] | None
    target_logit: NDArray[np.float32] | None
    texts: dict[int, str]

    def table(self) -> list[dict[str, Any]]:
        """One row per layer and position."""
        rows = []
        for i, layer in enumerate(self.layers):
            for j, position in enumerate(self.positions):
                at = i, j
                rows.append(
                    {
                        "layer": layer,
                        "position": position,
                        "token": self.tokens[j],
                        "top_ids": self.top_ids[at].tolist(),
                        "top_tokens": [self.texts[each] for each in self.top_ids[at].tolist()],
                        "top_probabilities": self.top_probabilities[at].tolist(),
                        "entropy_nats": float(self.entropy_nats[at]),
                        "kl_nats": float(self.kl_nats[at]),
                        "target_rank": _at(self.target_rank, at),
                        "target_probability": _at(self.target_probability, at),
                        "target_logit": _at(self.target_logit, at),
                    }
                )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with format and version."""
        target = self.target
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "target": target,
            "target_token": None if target is None else self.texts[target],
            "rows": self.table(),
        }


def logit_lens(
    cap: Capture,
    lens: Lens,
    *,
    k: SupportsIndex = 5,
    target: Token | None = None,
    positions: Iterable[SupportsIndex] | None = None,
    layers: Iterable[SupportsIndex] | None = None,
    translator: Translator | None = None,
) -> LogitLens:
    """Read each layer's residual stream as the model reads its last one.

    The last layer's row is the model's own logits, within 1e-5 of the largest of them in float32
    and within the rounding of a narrower dtype. Probabilities and entropies are of float32.

    Args:
        cap: with the residual stream (of the last token or of all) and the model's last layer.
        lens: the model that it is of.
        k: how many tokens per row.
        target: a token to follow: its id, or a text that is one token.
        positions: of the prompt, negative from its end; all that are captured where not given.
        layers: all that are captured where not given.
        translator: makes of a layer's residuals what is read instead, such as a `TunedLens`; the
            last layer's are never translated.

    Raises:
        NotStoredError: no residual stream, not of these layers or positions, or not of the last
            layer.
        IncomparableError: the capture is of another model.
        TokenIdError: a target that is not one token.
        UsageError: the model has no unembedding.
        ShapeError: a translator that changes the shape.
        NonFiniteError: a layer whose logits hold NaN or +Inf.

    Memory
        A few times 32 MB, or a few times one position's float32 logits in all layers where they
        are more, whatever the prompt's length and the vocabulary.
    """
    need_same_model(cap, lens)
    stored, at = _residuals(cap, positions)
    chosen = _layers(tuple(stored), layers)
    last = lens.n_layers - 1
    if last not in stored:
        raise NotStoredError(
            f"this capture lacks layer {last}, the last one, which gives the final distribution: "
            f"capture with layers that hold {last}"
        )
    wanted = None if target is None else token_id(target, lens)
    count = at_least(1, k, "k")
    streams = [stored[last], *(stored[layer] for layer in chosen)]
    if translator is not None:
        streams[1:] = [_translated(translator, layer, stored[layer], last) for layer in chosen]
    parts = [
        _measured(logits, count, wanted, chosen, at[some])
        for some, logits in residual_logits(lens, streams)
    ]
    found = {name: torch.cat([part[name] for part in parts], 1).numpy() for name in parts[0]}
    ids = sorted({*found["ids"].ravel().tolist(), *([] if wanted is None else [wanted])})
    return LogitLens(
        layers=chosen,
        positions=tuple(at),
        tokens=tuple(cap.tokens[position] for position in at),
        top_ids=found["ids"],
        top_probabilities=found["probabilities"],
        entropy_nats=found["entropy"],
        kl_nats=found["kl"],
        target=wanted,
        target_rank=found.get("rank"),
        target_probability=found.get("probability"),
        target_logit=found.get("logit"),
        texts=dict(zip(ids, token_strings(ids, lens.tokenizer), strict=True)),
    )


def need_same_model(cap: Capture, lens: Lens) -> None:
    """Refuse a capture of another model than the lens'.

    Raises:
        IncomparableError: class, depth or width differ.
    """
    of = cap.model.model_class, cap.model.n_layers, cap.model.d_model
    own = type(lens.model).__name__, lens.n_layers, lens.d_model
    if of != own:
        words = ["{} of {} layers and d_model {}".format(*each) for each in (of, own)]
        raise IncomparableError(
            f"this capture is of {words[0]}, the lens of {words[1]}: give the lens that made it"
        )


def _residuals(
    cap: Capture, positions: Iterable[SupportsIndex] | None
) -> tuple[dict[int, Tensor], list[int]]:
    """Per layer the residuals [positions, d_model], and their positions."""
    residual, seq = cap.residual, len(cap.token_ids)
    asked = None if positions is None else check_positions(positions, seq, "position", "the prompt")
    if asked == []:
        raise OutOfRangeError("positions are empty: give one or more, or leave them out")
    if isinstance(residual, ActivationCache):
        beyond = [each for each in asked or () if each != seq - 1]
        if beyond:
            raise NotStoredError(
                f"this capture holds the residual of position {seq - 1} alone, not of "
                f"{beyond[0]}: capture with residual='all'"
            )
        at = [seq - 1] if asked is None else asked
        one = [0] * len(at)
        return {layer: residual[layer][None][one] for layer in residual.layers}, at
    at = list(range(seq)) if asked is None else asked
    if asked is None:
        return {layer: residual[layer] for layer in residual.layers}, at
    return {layer: residual[layer][at] for layer in residual.layers}, at


def _translated(translator: Translator, layer: int, residual: Tensor, last: int) -> Tensor:
    made = residual if layer == last else translator(layer, residual)
    if not isinstance(made, Tensor) or made.shape != residual.shape:
        shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ShapeError(
            f"the translator made {shape} of layer {layer}'s residuals {list(residual.shape)}: "
            "the same shape is needed"
        )
    return made.to(residual)


def _layers(stored: tuple[int, ...], asked: Iterable[SupportsIndex] | None) -> tuple[int, ...]:
    if asked is None:
        return stored
    chosen = sorted({whole_number(layer, "layer") for layer in asked})
    absent = [layer for layer in chosen if layer not in stored]
    if absent or not chosen:
        raise NotStoredError(
            f"layers {chosen} are not all captured: this capture holds {listed(stored, 8)}"
        )
    return tuple(chosen)


def _measured(
    logits: Tensor, k: int, target: int | None, layers: Sequence[int], positions: Sequence[int]
) -> dict[str, Tensor]:
    """[layers, positions, …] of logits [1 + layers, positions, vocab], the last layer's first."""
    # PROMOTE: a softmax over a vocabulary loses its tail in half precision.
    values = logits.float()
    bad = ~values.amax(-1).isfinite()
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        where = f"layer {layers[row - 1]}" if row else "the last layer"
        raise NonFiniteError(
            f"logits of {where} at position {positions[column]} hold NaN or +Inf: check the "
            "model's weights, or load it in another dtype"
        )
    shares = values.log_softmax(-1)
    final, own = shares[0], shares[1:]
    top = own.topk(min(k, own.shape[-1]), dim=-1)
    found = {
        "ids": top.indices,
        "probabilities": top.values.exp(),
        "entropy": -(own.exp() * own).masked_fill(own == -torch.inf, 0.0).sum(-1),
        # Rounding can leave a divergence a little below 0.
        "kl": torch.stack([_kl(final, each) for each in own]).clamp_min(0.0),
    }
    if target is not None:
        logit = values[1:, :, target]
        found["logit"] = logit
        found["probability"] = own[..., target].exp()
        found["rank"] = (values[1:] > logit[..., None]).sum(-1)
    return {name: each.cpu() for name, each in found.items()}


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0).sum(-1)


def _at(values: NDArray[Any] | None, at: tuple[int, int]) -> Any:
    return None if values is None else values[at].item()
