"""What a forward pass is asked for, and what it left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from trilens.caches.patterns.protocol import Pattern
from trilens.models.cross_attention import CrossAttention
from trilens.models.gates.kernels import KernelRecord
from trilens.models.gates.mixers import Boundary
from trilens.models.gates.recurrent_states import LayerState
from trilens.models.gates.site import GateSite
from trilens.models.sites.site import Site, SiteKey
from trilens.taps.registry import AttentionCall
from trilens.taps.span import Span

__all__ = ["CaptureRequest", "Recording", "StateRequest"]


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Which recurrent states one pass is to leave behind.

    Attributes:
        layers: layers whose state is requested.
        positions: after which tokens, per row of the batch: from 0, ascending, distinct.
        reasons: why the model's other layers have no state in this capture.
    """

    layers: tuple[int, ...] = ()
    positions: tuple[tuple[int, ...], ...] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What one pass is to leave behind.

    Attributes:
        layers: layer numbers, ascending.
        residual: "last", "all" or None.
        lengths: real tokens of each row of the batch, on the CPU.
        attention: layers whose attention is requested.
        gates: requested gate sites, by (name, layer).
        kernels: layers whose recurrence is requested, with all its arguments.
        states: requested recurrent states.
        boundaries: the recurrences that no kernel function carries, with where they begin and end.
        absent: why other layers have no attention pattern in this capture.
        absent_effective: why other layers have no effective attention in it.
        copy: copy what is recorded, for a model that overwrites its own tensors.
        sites: requested sites, by name and layer.
        gradients: keep sites as they are in the graph, so that gradients reach them.
        prompts: tokens of each row's prompt, where the pass does not hold just those.
        numbers: of the rows' prompts among those that edits were made ready for.
        cross: layers whose attention to the encoder's positions is requested.
        absent_cross: why other layers have no such attention in this capture.
    """

    layers: tuple[int, ...]
    residual: str | None
    lengths: tuple[int, ...]
    attention: tuple[int, ...]
    gates: Mapping[tuple[str, int], GateSite]
    copy: bool = False
    kernels: tuple[int, ...] = ()
    boundaries: Mapping[int, Boundary] = field(default_factory=dict)
    states: StateRequest = field(default_factory=StateRequest)
    absent: Mapping[int, str] = field(default_factory=dict)
    absent_effective: Mapping[int, str] = field(default_factory=dict)
    sites: Mapping[SiteKey, Site] = field(default_factory=dict)
    gradients: bool = False
    prompts: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    cross: Mapping[int, CrossAttention] = field(default_factory=dict)
    absent_cross: Mapping[int, str] = field(default_factory=dict)

    def span(self, start: int) -> Span:
        """The tokens of a pass that begins at a position of the text."""
        seq = max(self.lengths)
        return Span(start, seq, self.lengths, self.prompts or self.lengths, self.numbers)


@dataclass(slots=True)
class Recording:
    """What a pass left behind, still batched and padded.

    Attributes:
        request: what was asked of the pass.
        patterns: of attention that several passes computed, in the place of their calls.
        parts: of the layers where several modules attend, their calls by the modules' names.
        crossed: of cross attention that several passes computed, in the place of their calls.
        source: positions of the encoder, where the model's output names what it gave.
        overwritten: the model wrote into a tensor that is kept: the recording is no good.

    Shapes
        logits [batch, seq, vocab], or None where the model gave none;
        residual [batch, seq, d_model], or [batch, d_model] for the last tokens; of several
        streams [batch, seq, streams, d_model], or [batch, streams, d_model];
        readouts of several streams [batch, seq, d_model], or [batch, d_model];
        gates one tensor per call, with the axes of their source;
        states per call of a kernel one entry per prompt, without padding;
        sites [batch, seq, *shape] of the site; of attn.head_out the projection's input; of
        attn.scores and attn.pattern the layer's pattern.
    """

    request: CaptureRequest
    logits: Tensor | None = None
    residual: dict[int, Tensor] = field(default_factory=dict)
    readouts: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionCall] = field(default_factory=dict)
    parts: dict[int, dict[str, AttentionCall]] = field(default_factory=dict)
    cross: dict[int, AttentionCall] = field(default_factory=dict)
    patterns: dict[int, Pattern] = field(default_factory=dict)
    crossed: dict[int, Pattern] = field(default_factory=dict)
    gates: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    kernels: dict[int, list[KernelRecord]] = field(default_factory=dict)
    states: dict[int, list[list[LayerState]]] = field(default_factory=dict)
    sites: dict[SiteKey, Tensor | Pattern] = field(default_factory=dict)
    source: int | None = None
    overwritten: bool = False

    @property
    def has_other_keys(self) -> bool:
        """Whether an attention that is kept has other keys than the tokens, such as summaries of
        several of them: a padded row's cannot be told from those of the pads then."""
        calls = [*self.attention.values(), *(c for p in self.parts.values() for c in p.values())]
        patterns = [*self.patterns.values(), *self.sites.values()]
        return any(call.query.shape[-2] != call.key.shape[-2] for call in calls) or any(
            isinstance(each, Pattern) and each.seq_q != each.seq_k for each in patterns
        )
