"""What can be compared inside: the attention, gates and recurrences that both models give away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from trilens.errors import CaptureError, NonFiniteError
from trilens.io.messages import listed
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.forward_call import probe_ids
from trilens.models.tokens import vocab_size_of

__all__ = ["CommonSites", "common_sites", "refuse_nonfinite"]

_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class CommonSites:
    """What to capture of both models.

    Attributes:
        states: (layer, part) of the recurrent states, of one shape in both.
        attention: layers of softmax attention.
        effective: recurrent layers with effective attention.
        gates: (name, layer) of the gates.
        notes: what one of the models does not give, in words.
    """

    attention: tuple[int, ...]
    effective: tuple[int, ...]
    gates: tuple[tuple[str, int], ...]
    states: tuple[tuple[int, str], ...]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Own:
    attention: set[int] = field(default_factory=set)
    effective: set[int] = field(default_factory=set)
    gates: set[tuple[str, int]] = field(default_factory=set)
    # By name and shape, and layer.
    states: set[tuple[str, int]] = field(default_factory=set)


def common_sites(before: Lens, after: Lens) -> CommonSites:
    """Ask both models with a short probe."""
    notes: list[str] = []
    mine = _sites(before, "before", notes)
    other = mine if after is before else _sites(after, "after", notes)
    for what, left, right in (
        ("attention", mine.attention, other.attention),
        ("effective attention", mine.effective, other.effective),
        ("gates", mine.gates, other.gates),
        ("recurrent states", mine.states, other.states),
    ):
        for side, alone in (("before", left - right), ("after", right - left)):
            if alone:
                notes.append(f"{what} only in the model {side}: {_spelt(alone)}")
    return CommonSites(
        attention=tuple(sorted(mine.attention & other.attention)),
        effective=tuple(sorted(mine.effective & other.effective)),
        gates=tuple(sorted(mine.gates & other.gates)),
        states=tuple(sorted((i, name.split(" ")[0]) for name, i in mine.states & other.states)),
        notes=tuple(notes),
    )


def refuse_nonfinite(capture: Capture, side: str, prompt: int) -> None:
    """Refuse a residual stream with NaN or Inf, naming the first layer and token.

    Raises:
        NonFiniteError: where it arises.
    """
    residual = capture.parts.residual
    for layer in () if residual is None else residual.layers:
        stream = None if residual is None else residual.get_layer(layer)
        if stream is not None and not bool(stream.isfinite().all()):
            token = int((~stream.isfinite().all(-1)).nonzero()[0, 0])
            logits = capture.logits
            follow = logits is not None and bool(logits.isnan().any())
            raise NonFiniteError(
                f"model {side} gives NaN or Inf: prompt {prompt}, first after layer {layer}, at "
                f"token {token}{'; its logits are NaN' if follow else ''}; look at that layer's "
                "weights and dtype"
            )


def _sites(lens: Lens, side: str, notes: list[str]) -> _Own:
    # Asked for no logits, some models run their last layers for the last token alone.
    own, anatomy = _Own(), lens.anatomy
    probe = probe_ids(lens.model, vocab_size_of(lens.model), _PROBE_TOKENS)
    if anatomy.other_attention:
        layer, why = next(iter(anatomy.other_attention.items()))
        notes.append(f"no attention patterns of the model {side}: layer {layer}: {why}")
    else:
        own.attention = set(lens.attention_layers)
    if lens.effective_layers:
        try:
            found = lens.capture(
                probe,
                residual=None,
                logits="last",
                attention=bool(own.attention),
                effective=True,
            ).parts.attention
            layers = set() if found is None else set(found.layers)
            own.effective = layers - own.attention
        except CaptureError as error:
            notes.append(f"no effective attention of the model {side}: {error}")
    if lens.gate_layers:
        try:
            gates = lens.capture(probe, residual=None, logits="last", gates=True).parts.gates
            if gates is not None:
                own.gates = {(name, i) for name in gates.names for i in gates.layers(name)}
        except CaptureError as error:
            notes.append(f"no gates of the model {side}: {error}")
    if lens.state_layers:
        try:
            states = lens.capture(probe, residual=None, logits="last", states=True).states
            own.states = {
                (f"{part} {list(tensor.shape[1:])}", layer)
                for layer, part, tensor in states.tensors()
            }
        except CaptureError as error:
            notes.append(f"no recurrent states of the model {side}: {error}")
    return own


def _spelt(alone: Iterable[int | tuple[str, int]]) -> str:
    words = [
        f"{each[0]} of layer {each[1]}" if isinstance(each, tuple) else f"layer {each}"
        for each in alone
    ]
    return listed(sorted(words))
