"""Where the blocks, the final norm and the unembedding are: found by rule in any model's trace.

The rules read what one probe did, never a family's name:

- blocks: sibling modules called in a row, each one's output the next one's input, bit for bit;
- final norm: what turned the last block's output into the model's last hidden state; of several
  residual streams the readout is a step before it, which makes one vector of them;
- unembedding: the outermost module that takes the last hidden state and gives the logits, up to a
  constant factor or a tanh cap that is measured on the probe.

What they find is returned with the facts that prove it. What they can't prove is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from trilens.errors import AnatomyError, SeveralStreamsError
from trilens.io.messages import listed
from trilens.models.attention_parts import attend_over_same, attention_parts
from trilens.models.chain import Chain, chains_of, rounds_of
from trilens.models.final_norm import Norm, final_norm, norm_behind_code, read_out_by
from trilens.models.follow import ways
from trilens.models.logit_relation import relate
from trilens.models.own_code import why_not_inline
from trilens.models.stream_form import StreamForm, form_of, holds_one, holds_several
from trilens.models.trace import AttentionSite, ModuleCall, Trace, parent_path
from trilens.models.why_no_anatomy import why_not

__all__ = ["Anatomy", "Block", "chains", "find_anatomy"]


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: the module that runs it, and where the residual stream is in what it returns.

    A module that runs several times (ALBERT) stands in several blocks.
    """

    path: str
    module: nn.Module
    output: int


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a model, proven on a probe.

    Attributes:
        blocks: one per layer, in the order in which they run.
        form: where the residual stream, or each of several, is in what a block hands on.
        readout: paths of the modules that make one vector of several streams; None where the
            model's own code does. Empty for a single stream.
        final_norm: paths of the modules between the last block (of several streams, the readout)
            and the last hidden state; empty where that is the last hidden state.
        final_scale: factor on the last block's output before the final norm (1 nearly always).
        unembedding: paths of the modules from the last hidden state to the logits; empty for a
            bare encoder.
        logit_scale: factor between the unembedding's output and the logits.
        logit_softcap: c in c·tanh(x/c), or None.
        vocab: width of the logits, or None.
        attention: per layer, the module that calls the attention registry there; the first of
            several.
        attention_parts: all of them, of the layers where several do.
        starts: layers that begin a round of a model that runs its stacks several times: their
            stream is a sum of what earlier rounds gave, not the output of the layer before.
        other_attention: per layer, attention that goes another way, in words.
        facts: what the probe proved, in words.
        inline: per layer whose module computes attention in its own code, which of the module's
            products gives the scores; -1 for a fused function.
    """

    blocks: tuple[Block, ...]
    form: StreamForm
    readout: tuple[str, ...] | None
    final_norm: tuple[str, ...]
    final_scale: float
    unembedding: tuple[str, ...]
    logit_scale: float
    logit_softcap: float | None
    vocab: int | None
    attention: dict[int, str]
    other_attention: dict[int, str]
    facts: tuple[str, ...]
    inline: dict[int, int] = field(default_factory=dict)
    attention_parts: dict[int, tuple[str, ...]] = field(default_factory=dict)
    starts: tuple[int, ...] = ()

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.form.d_model

    @property
    def n_streams(self) -> int:
        """Number of residual streams."""
        return self.form.n_streams

    def attends(self, layer: int) -> tuple[str, ...]:
        """The modules that call the attention registry in a layer."""
        return self.attention_parts.get(layer, (self.attention[layer],))


def find_anatomy(
    trace: Trace, *, constants: Sequence[float] = (), width: int | None = None
) -> Anatomy:
    """Apply the rules to a trace.

    Args:
        trace: what a probe of the model did.
        constants: the numbers of the model's config: what a factor or a tanh cap may be.
        width: the config's hidden size: a stream that is a multiple of it holds several.

    Raises:
        SeveralStreamsError: several residual streams that could not be told apart or read out.
        AnatomyError: no chain of blocks, or its end is not the last hidden state.
    """
    chain, norm, hidden = _choose(trace)
    last = chain.last
    first = next((t for t in chain.calls[0].read if t.shape == last.shape), None)
    form = form_of(last, trace.seq, width, first)
    if isinstance(form, str):
        raise SeveralStreamsError(
            f"the residual has several streams: {chain.calls[-1].path} passes on width {form}"
        )
    readout, final = read_out_by(trace, form, norm, chain.calls[-1], last)
    facts = [
        chain.fact,
        f"last hidden state = {' → '.join(norm.path) or 'the output'} of the last block",
    ]
    if form.n_streams > 1:
        how = "the model's own code" if readout is None else " → ".join(readout)
        facts.append(f"{form.n_streams} residual streams, read out by {how}")
    head = _unembedding(trace, hidden, norm.end, constants)
    if head.path:
        facts.append(
            f"logits = {' → '.join(head.path)} of the last hidden state"
            + (f" × {head.scale:g}" if head.scale != 1.0 else "")
            + (f", capped: {head.softcap:g}·tanh(x/{head.softcap:g})" if head.softcap else "")
        )
    attention, other, inline = _attention_by_layer(trace, chain)
    if inline:
        facts.append(
            f"attention of {len(inline)} blocks is computed in their own code: weights of a "
            "softmax over [seq, seq] times values"
        )
    parts = attention_parts(trace, chain.calls, attention)
    return Anatomy(
        blocks=tuple(
            Block(call.path, call.module, index)
            for call, index in zip(chain.calls, chain.output_index, strict=True)
        ),
        form=form,
        readout=readout,
        final_norm=final,
        final_scale=norm.scale,
        unembedding=head.path,
        logit_scale=head.scale,
        logit_softcap=head.softcap,
        vocab=trace.logits.shape[-1] if trace.logits is not None else None,
        attention=attention,
        other_attention=other,
        facts=tuple(facts),
        inline=inline,
        attention_parts=parts,
        starts=chain.starts,
    )


def _choose(trace: Trace) -> tuple[Chain, Norm, Tensor]:
    """The outermost chain of sibling modules that ends in the last hidden state."""
    chains: list[Chain] = []
    ends = []
    for holds in (holds_one, holds_several):
        found = chains_of(trace, holds)
        chains += found
        for chain in found:
            for hidden in trace.last_hidden:
                norm = final_norm(trace, chain.last, chain.calls[-1].end, hidden)
                if norm is None and holds is holds_several:
                    norm = norm_behind_code(trace, chain.last, chain.calls[-1].end, hidden)
                if norm is not None:
                    ends.append((chain, norm, hidden))
                    break
        if ends:
            break
    if not ends:
        rounds = rounds_of(trace, holds_one)
        for hidden in trace.last_hidden if rounds is not None else ():
            assert rounds is not None
            norm = final_norm(trace, rounds.last, rounds.calls[-1].end, hidden)
            if norm is not None:
                return rounds, norm, hidden
        raise why_not(trace, chains)
    # Outermost first: a block's own inner chains are shorter pieces of the same way.
    best = min(ends, key=lambda end: (end[0].calls[0].path.count("."), -len(end[0].calls)))
    for chain in chains:
        first, own = chain.calls[0], best[0].calls[0]
        outside = not any(call.encloses(first) or first.encloses(call) for call in best[0].calls)
        if outside and len(chain.calls) > 1 and parent_path(first.path) != parent_path(own.path):
            raise AnatomyError(
                f"the model runs two stacks of blocks, {parent_path(first.path)} and "
                f"{parent_path(own.path)}: layer numbers would be ambiguous"
            )
    return best


def chains(trace: Trace) -> list[tuple[ModuleCall, ...]]:
    """Runs of sibling modules in which every output is the next input."""
    return [chain.calls for chain in chains_of(trace, holds_one)]


@dataclass(frozen=True, slots=True)
class _Head:
    """logits = cap(scale · modules(last hidden state))."""

    path: tuple[str, ...] = ()
    scale: float = 1.0
    softcap: float | None = None


def _unembedding(trace: Trace, hidden: Tensor, after: int, constants: Sequence[float]) -> _Head:
    """The modules from the last hidden state to the logits."""
    logits = trace.logits
    if logits is None:
        return _Head()
    found = list(ways(trace, hidden, after))
    # A head that reads a scaled hidden state: for a linear map the factor commutes.
    for call in (call for call in trace.calls if call.start > after):
        plain = isinstance(call.module, nn.Linear) and getattr(call.module, "bias", None) is None
        if plain and call.inputs:
            factor = relate(hidden, call.inputs[0])
            if factor is not None and factor.scale != 1.0:
                found.append(((call.path,), call.outputs[0] / factor.scale))
    for path, output in found:
        relation = relate(output[..., : logits.shape[-1]], logits, constants)
        if relation is not None:
            return _Head(path, relation.scale, relation.softcap)
    raise AnatomyError(
        "the logits could not be rebuilt: no modules lead from the last hidden state to the "
        f"logits [{', '.join(map(str, logits.shape))}], up to a factor or a tanh cap"
    )


def _attention_by_layer(
    trace: Trace, chain: Chain
) -> tuple[dict[int, str], dict[int, str], dict[int, int]]:
    sites: dict[int, str] = {}
    other: dict[int, str] = {}
    inline: dict[int, int] = {}
    for layer, call in enumerate(chain.calls):
        inside = trace.attention_in(call)
        strays = {site.path for site in trace.softmax if call.start < site.tick < call.end}
        unread = sorted({site.key for site in inside if not site.readable})
        if unread:
            other[layer] = (
                f"attention implementation {unread[0]!r} gives neither weights nor arguments that "
                "can be read; load the model with attn_implementation='sdpa' or 'eager'"
            )
        elif len(inside) == 1 and inside[0].product is not None:
            why = why_not_inline(inside[0])
            if why:
                other[layer] = why
                continue
            sites[layer], inline[layer] = inside[0].path, inside[0].product
        elif _are_read_by_registry(inside):
            sites[layer] = inside[0].path
        elif inside:
            paths = listed(site.path for site in inside)
            other[layer] = f"{len(inside)} attention calls in one block ({paths})"
        elif strays:
            other[layer] = (
                f"{listed(sorted(strays))} computes attention in its own code, where no matrix "
                "product of queries and keys leads to its softmax and on to values"
            )
    return sites, other, inline


def _are_read_by_registry(inside: Sequence[AttentionSite]) -> bool:
    """Whether these are calls of one module, or of several that attend over the same tokens."""
    if not inside or any(site.product is not None for site in inside):
        return False
    return len({site.path for site in inside}) == 1 or attend_over_same(inside)
