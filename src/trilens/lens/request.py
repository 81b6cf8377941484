"""What a caller asks of a capture, read: layers, attention, positions of recurrent states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, SupportsIndex

from trilens.caches.indices import check_index
from trilens.errors import AttentionPathError, UsageError
from trilens.io.messages import listed
from trilens.lens.proof import Proof
from trilens.lens.sites import read_sites
from trilens.models.anatomy import Anatomy
from trilens.models.gates.absent import attention_reasons, cross_reasons, effective_reasons
from trilens.models.gates.claims import GateClaims
from trilens.taps.recording import CaptureRequest, StateRequest

__all__ = ["Asked", "Which", "read_attention", "read_layers", "read_states", "request_of"]

Which = Literal["last", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a caller asks of a capture, as `Lens.capture` takes it."""

    residual: Which | None = "last"
    attention: bool = False
    gates: bool = False
    effective: bool = False
    layers: Iterable[SupportsIndex] | None = None
    logits: Which | None = "all"
    states: bool | Iterable[SupportsIndex] = False
    sites: Iterable[str] = ()

    def once(self) -> Self:
        """The same, to be read several times: an iterator would be empty by then.

        Raises:
            UsageError: an option that is none.
        """
        if self.residual not in ("last", "all", None):
            raise UsageError(f"residual {self.residual!r} is not an option: 'last', 'all' or None")
        if self.logits not in ("last", "all", None):
            raise UsageError(f"logits {self.logits!r} is not an option: 'all', 'last' or None")
        again = {
            name: tuple(value)
            for name in ("layers", "states", "sites")
            if isinstance(value := getattr(self, name), Iterator)
        }
        return replace(self, **again)  # type: ignore[arg-type]


def request_of(
    asked: Asked, lengths: Sequence[int], proof: Proof, model: str, *, copy: bool
) -> CaptureRequest:
    """What a pass over prompts of these lengths is to leave behind.

    Args:
        asked: what the caller asks.
        lengths: tokens of each prompt.
        proof: what is proven of the model.
        model: its class, for messages.
        copy: copy what is recorded.

    Raises:
        TrilensError: as `Lens.capture`.
    """
    anatomy, claims = proof.anatomy, proof.gates
    chosen = read_layers(asked.layers, anatomy.n_layers)
    softmax: tuple[int, ...] = ()
    crossing = [i for i in proof.cross if i in chosen] if asked.attention else []
    if asked.attention:
        which = "this model" if asked.layers is None else f"layers {', '.join(map(str, chosen))}"
        softmax = read_attention(chosen, which, anatomy, claims, model)
    recurrent = claims.effective_within(chosen, model) if asked.effective else ()
    remembered = read_states(asked.states, lengths, chosen, claims, model, anatomy.n_layers)
    held = {*softmax, *recurrent}
    return CaptureRequest(
        layers=chosen,
        residual=asked.residual,
        lengths=tuple(lengths),
        attention=softmax,
        gates=claims.within(chosen, model) if asked.gates else {},
        copy=copy,
        kernels=recurrent,
        boundaries=claims.boundaries((*recurrent, *remembered.layers)),
        states=remembered,
        absent=attention_reasons(anatomy, claims.recurrences, chosen, held),
        absent_effective=effective_reasons(anatomy, claims.recurrences, chosen),
        cross={i: proof.cross[i] for i in crossing},
        absent_cross=cross_reasons(proof.cross, proof.no_cross, chosen, anatomy.n_layers),
        sites=read_sites(
            asked.sites,
            chosen,
            proof.sites,
            model,
            chosen=asked.layers is not None,
            n_layers=anatomy.n_layers,
        ),
    )


def read_layers(layers: Iterable[SupportsIndex] | None, n_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending and distinct; all of them where none are given.

    Raises:
        UsageError: not a list of layer numbers, or an empty one.
        OutOfRangeError: a layer that is not there.
    """
    if layers is None:
        return tuple(range(n_layers))
    try:
        chosen = tuple(layers)
    except TypeError:
        raise UsageError(
            f"layers {layers!r} is not a list: give layer numbers, for example [2, 5]"
        ) from None
    if not chosen:
        raise UsageError("layers is empty: name at least one layer, or leave it out for all")
    return tuple(sorted({check_index(each, n_layers, "layer", "this model") for each in chosen}))


def read_attention(
    layers: Sequence[int], which: str, anatomy: Anatomy, claims: GateClaims, model: str
) -> tuple[int, ...]:
    """The layers, of those asked for, whose softmax attention is captured.

    Args:
        layers: the layers asked for.
        which: their name in messages, like "layers 2, 5" or "this model".
        anatomy: the model's parts.
        claims: what is proven of the model's recurrences.
        model: the model's class, for messages.

    Raises:
        AttentionPathError: one has an attention that can't be captured, or none has any.
    """
    for layer in layers:
        if layer in anatomy.other_attention:
            raise AttentionPathError(
                f"the attention of layer {layer} can't be captured: "
                f"{anatomy.other_attention[layer]}; the residual stream can (attention=False)"
            )
    found = tuple(layer for layer in layers if layer in anatomy.attention)
    if not found:
        have = listed(anatomy.attention, 8)
        why = attention_reasons(anatomy, claims.recurrences, layers, ())[layers[0]]
        raise AttentionPathError(
            f"{which} of {model} has no softmax attention (layers that "
            f"have it: {have}; layer {layers[0]}: {why}); capture without attention=True"
        )
    return found


def read_states(
    states: bool | Iterable[SupportsIndex],
    lengths: Sequence[int],
    layers: Sequence[int],
    claims: GateClaims,
    model: str,
    n_layers: int,
) -> StateRequest:
    """Which recurrent states a pass is to leave behind.

    Args:
        states: True for the last token, or positions, −1 for the last; False for none.
        lengths: real tokens of each prompt.
        layers: the layers asked for.
        claims: what is proven of the model's recurrences.
        model: the model's class, for messages.
        n_layers: the model's layers.

    Raises:
        UsageError: not positions, or none.
        OutOfRangeError: a position that a prompt does not have.
        RecurrentStateError: no layer asked for has a state, or one has a recurrence that is not
            known.
    """
    positions = _positions(states, lengths)
    if states is False:
        return StateRequest()
    found = claims.states_within(layers, model)
    reasons = {}
    for layer in range(n_layers):
        if layer not in claims.state_layers:
            reasons[layer] = "the layer is not recurrent"
        elif layer not in found:
            reasons[layer] = "the layer was not among those captured"
    return StateRequest(found, positions, reasons)


def _positions(
    states: bool | Iterable[SupportsIndex], lengths: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Positions per prompt: from 0, ascending, distinct."""
    try:
        # A string iterates too, and is refused below: its characters are no positions.
        chosen = [-1] if isinstance(states, bool) else list(states)
    except TypeError:
        raise UsageError(
            f"states {states!r} is not an option: True for the last token, or positions, for "
            "example (0, 5, -1)"
        ) from None
    if not chosen:
        raise UsageError("states is empty: name at least one position, or leave it out")

    def read(length: int) -> tuple[int, ...]:
        owner = f"a prompt of {length} tokens"
        index = {check_index(each, length, "position", owner, negative=True) for each in chosen}
        return tuple(sorted(index))

    return tuple(read(length) for length in lengths)
