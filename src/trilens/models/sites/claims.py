"""All sites of a model: what the rules proved on one probe, and why the others are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trilens.axes import SITES
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.gates.block import BlockView, blocks_of
from trilens.models.gates.claims import GateClaims
from trilens.models.gates.events import GateEvents
from trilens.models.gates.site import GateSite, layout_of, layout_of_streams
from trilens.models.gates.stream_correction import find_correction
from trilens.models.logit_relation import relate
from trilens.models.sites import attention, mlp
from trilens.models.sites.block import Kind, Parts, find_parts, find_stream_sites
from trilens.models.sites.ends import find_model_sites
from trilens.models.sites.found import Found
from trilens.models.sites.gates import find_gate_sites
from trilens.models.sites.several import READS, claim_correction, claim_parts
from trilens.models.sites.site import Site, SiteKey, Tap
from trilens.models.sites.states import find_state_site
from trilens.models.sites.streams import BlockStreams
from trilens.models.stream_form import StreamForm
from trilens.models.stream_steps import StreamStep, base_of, steps_of
from trilens.models.trace import AttentionSite, ModuleCall, Trace, same

__all__ = ["SiteClaims", "find_sites"]

_CROSS = ("cross.in", "cross.out", "cross.add")
_STREAM = ("resid_mid", "attn.add", "mlp.add", "mixer.add", "mlp.in", "mlp.out", "mixer.in",
           "mixer.out", "mlp.gate", "mlp.up", "mlp.post", *_CROSS)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SiteClaims:
    """The sites of a model.

    Attributes:
        sites: what is proven, by name and layer.
        reasons: for what is not, why, in a sentence.
        absent: those of the reasons that are no limit of the rules: there is no such place in the
            layer (no attention, no MLP, nothing between two parallel parts).
    """

    sites: dict[SiteKey, Site] = field(default_factory=dict)
    reasons: dict[SiteKey, str] = field(default_factory=dict)
    absent: frozenset[SiteKey] = frozenset()

    def layers(self, name: str) -> tuple[int, ...]:
        """The layers in which a site is proven."""
        return tuple(
            sorted(layer for own, layer in self.sites if own == name and layer is not None)
        )


def find_sites(trace: Trace, events: GateEvents, anatomy: Anatomy, gates: GateClaims) -> SiteClaims:
    """Apply all rules to one probe."""
    views = list(blocks_of(trace, events, anatomy))
    every = [find_model_sites(trace, anatomy, views[0].block.start)]
    for layer, view in enumerate(views):
        found = Found(layer)
        streams = BlockStreams(trace, view.block, anatomy.d_model)
        _Layer(trace, anatomy, gates, view, streams, found).find(views)
        every.append(found)
    sites = {key: site for found in every for key, site in found.sites.items()}
    reasons = {key: why for found in every for key, why in found.reasons.items()}
    absent = frozenset(key for found in every for key in found.absent)
    return SiteClaims(sites, reasons, absent)


@dataclass(frozen=True, slots=True)
class _Layer:
    trace: Trace
    anatomy: Anatomy
    gates: GateClaims
    view: BlockView
    streams: BlockStreams
    found: Found

    @property
    def layer(self) -> int:
        assert self.found.layer is not None
        return self.found.layer

    def find(self, views: Sequence[BlockView]) -> None:
        """Apply the rules to this layer."""
        found, streams = self.found, self.streams
        output = self.anatomy.blocks[self.layer].output
        y = streams.block.made[output]
        form = self.anatomy.form
        tap = streams.output_tap(streams.block, output)
        _claim_residual("resid_post", tap, y, form, streams, found)
        base = self._base(views)
        if base is None:
            found.refuse(("resid_pre",), "no input of the block is the output of the one before")
        else:
            tap = streams.input_tap(streams.block, base)
            _claim_residual("resid_pre", tap, streams.block.read[base], form, streams, found)
        calls = self.trace.attention_in(self.view.block)
        site = calls[0] if len(calls) == 1 else None
        projection = None if site is None else attention.find_projection(self.view, streams, site)
        if site is None:
            found.refuse(
                attention.INSIDE, self._why_no_attention(calls), absent=self._has_none(calls)
            )
        else:
            attention.find_attention_sites(self.view, streams, site, projection, found)
        self._find_router()
        find_gate_sites(self.view, self.gates, self.layer, found)
        find_state_site(self.view, self.gates, self.layer, found)
        if not any(self._mine(site.tick) for site in self.trace.cross):
            found.refuse(_CROSS, "the layer attends to no source", absent=True)
        if form.n_streams > 1:
            self._find_in_streams(base, calls, projection)
        else:
            found.refuse(READS, "the model has one residual stream: resid_pre", absent=True)
            self._find_between(None if base is None else streams.block.read[base], y, projection)
        found.refuse(
            (name for name, spec in SITES.items() if spec.per_layer), "no rule proves it here"
        )

    def _find_between(self, base: Tensor | None, y: Tensor, projection: ModuleCall | None) -> None:
        """The parts that lead from one stream to another."""
        parts: Parts | str = "no input of the block is the output of the one before"
        calls = self.trace.attention_in(self.view.block)
        if base is not None:
            parts = find_parts(
                self.streams, base, y, lambda call: self._kind(call, calls, projection)
            )
        if isinstance(parts, str):
            self.found.refuse(_STREAM, parts)
        else:
            self._find_in_parts(parts)

    def _find_in_streams(
        self, base: int | None, calls: Sequence[AttentionSite], projection: ModuleCall | None
    ) -> None:
        """The parts of a block with several residual streams."""
        steps: list[StreamStep] | str = "no input of the block is the output of the one before"
        block, output = self.view.block, self.anatomy.blocks[self.layer].output
        correction = find_correction(self.view, self.anatomy, self.layer)
        if correction is not None:
            steps = f"{block.path} writes what its parts change into all streams at once"
            active, end = claim_correction(correction, self.streams, self.found)
            if end is not None:
                self._find_between(active, end, projection)
        elif base is not None:
            steps = steps_of(
                block, self.view.calls[1:], self.anatomy.form, self.view.seq, base, output
            )
        module = claim_parts(
            steps,
            self.streams,
            self.anatomy.form,
            lambda call: self._kind(call, calls, projection),
            self.found,
        )
        if module is not None:
            without = self.gates.without.get(self.layer, "")
            mlp.find_mlp_sites(self.view, self.streams, module, self._glu(), without, self.found)

    def _find_in_parts(self, parts: Parts) -> None:
        found, streams = self.found, self.streams
        kinds = tuple(dict.fromkeys(kind for part in parts.parts for kind in part.kinds))
        calls = self.trace.attention_in(self.view.block)
        absent: dict[Kind, tuple[str, bool]] = {
            "attn": (self._why_no_attention(calls), self._has_none(calls)),
            "mixer": ("the layer has no recurrent mixer", not self.view.kernels),
            "mlp": ("the block adds no MLP of its own to the stream", "extra" not in kinds),
        }
        for kind, (why, is_absent) in absent.items():
            if kind not in kinds:
                own = (name for name in SITES if name.startswith(f"{kind}."))
                found.refuse(own, why, absent=is_absent)
        find_stream_sites(streams, parts, kinds, found)
        for kind in (each for each in kinds if each in ("cross", "mixer")):
            mlp.find_ends(kind, streams, parts, found)
        if "mlp" in kinds:
            module = mlp.find_ends("mlp", streams, parts, found)
            gate = self._glu()
            without = self.gates.without.get(self.layer, "")
            mlp.find_mlp_sites(self.view, streams, module, gate, without, found)

    def _mine(self, tick: int) -> bool:
        return self.view.block.start < tick < self.view.block.end

    def _kind(
        self, call: ModuleCall, sites: Sequence[AttentionSite], projection: ModuleCall | None
    ) -> Kind:
        if any(attention.is_attention_of(call, site, projection) for site in sites):
            return "attn"
        strays = [s for s in self.trace.softmax if self._mine(s.tick)]
        other = strays if self.layer in self.anatomy.other_attention else []
        places = [*((s.tick, s.path) for s in other), *((s.tick, s.path) for s in sites)]
        if any(attention.is_behind(call, tick, path, self.view) for tick, path in places):
            return "attn"
        across = [s for s in self.trace.cross if self._mine(s.tick)]
        if any(attention.is_behind(call, s.tick, s.path, self.view) for s in across):
            return "cross"
        if any(call.start < kernel.start < call.end for kernel in self.view.kernels):
            return "mixer"
        if self.view.mixer_of(call.path) is not None:
            return "mixer"
        gate = self._glu()
        glu = gate is not None and gate.check is not None and gate.check.down is call.module
        return "mlp" if glu or mlp.is_whole(call, self.streams) else "extra"

    def _glu(self) -> GateSite | None:
        return self.gates.gates.get(("mlp.gate", self.layer))

    def _base(self, views: Sequence[BlockView]) -> int | None:
        """Which of the block's inputs is the residual stream: the output of the block before."""
        block, streams = self.view.block, self.streams
        if self.anatomy.n_streams > 1:
            return base_of(block, self.anatomy.blocks[self.layer].output)
        own = [i for i, tensor in enumerate(block.read) if streams.is_stream(tensor)]
        if self.layer in self.anatomy.starts:
            return own[0] if own else None
        if self.layer:
            before = views[self.layer - 1].block.made[self.anatomy.blocks[self.layer - 1].output]
            return next((i for i in own if _carries(before, block.read[i], streams)), None)
        if len(views) > 1:
            after, made = views[1].block, block.made[self.anatomy.blocks[0].output]
            for i, tensor in enumerate(after.read):
                if i in own and streams.is_stream(tensor) and _carries(made, tensor, streams):
                    return i
        return own[0] if own else None

    def _why_no_attention(self, calls: Sequence[AttentionSite]) -> str:
        if self.layer in self.anatomy.other_attention:
            return self.anatomy.other_attention[self.layer]
        paths = list(dict.fromkeys(call.path for call in calls))
        if len(paths) > 1:
            return f"{len(paths)} modules attend in one block ({listed(paths)})"
        if len(calls) > 1:
            return f"{calls[0].path} calls attention {len(calls)} times in one block"
        if calls:
            return f"the block adds what {calls[0].path} gives only through another part"
        return "the layer has no softmax attention"

    def _has_none(self, calls: Sequence[AttentionSite]) -> bool:
        return not calls and self.layer not in self.anatomy.other_attention

    def _find_router(self) -> None:
        gate = self.gates.gates.get(("router", self.layer))
        if gate is None:
            self.found.refuse(("router",), "the layer has no router", absent=True)
            return
        source = gate.source
        if gate.spec.function == "unit" or source.module is None or source.event == "kernel":
            self.found.refuse(("router",), "the router shows its probabilities, not its logits")
            return
        assert source.event != "function"
        tap = Tap(source.event, source.module, source.index, source.order)
        calls = (c for c in self.view.calls if c.module is source.module)
        call = next((c for c in calls if len(c.outputs) > 1), None)
        if source.event != "output" or call is None:
            self.found.claim("router", tap, gate.layout, gate.spec.shape, closed=-math.inf)
            return
        # Its logits are a by-product: what the model goes on with was made of them inside.
        write = self._inside_router(call, call.outputs[source.index])
        why = f"{gate.spec.where} hands its logits out beside what it has made of them"
        fixed = why if write is None else ""
        shape, closed = gate.spec.shape, -math.inf
        self.found.claim("router", tap, gate.layout, shape, write=write, fixed=fixed, closed=closed)

    def _inside_router(self, call: ModuleCall, logits: Tensor) -> Tap | None:
        """The product in a router, or the module in it, that gives its logits, up to a cast."""
        for each in self.trace.linears:
            own = each.path == call.path and call.start < each.tick < call.end
            if own and _is_cast(each.result, logits):
                return Tap("linear", call.module, order=each.order)
        for inner in (c for c in self.view.calls if call.encloses(c)):
            if len(inner.outputs) == 1 and _is_cast(inner.outputs[0], logits):
                return Tap("output", inner.module, order=self.streams.order(inner))
        return None


def _is_cast(made: Tensor, logits: Tensor) -> bool:
    return made.shape == logits.shape and same(made.to(logits.dtype), logits)


def _carries(before: Tensor, tensor: Tensor, streams: BlockStreams) -> bool:
    if not streams.is_stream(before):
        return False
    return streams.equal(before, tensor) or relate(before, tensor) is not None


def _claim_residual(
    name: str,
    tap: tuple[Tap, bool],
    tensor: Tensor,
    form: StreamForm,
    streams: BlockStreams,
    found: Found,
) -> None:
    layout = layout_of_streams(form) if form.n_streams > 1 else layout_of(tensor, streams.seq)
    if layout is not None:
        found.claim(name, tap[0], layout, form.shape, overwritten=tap[1])
