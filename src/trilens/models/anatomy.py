"""Where the blocks, the final norm and the unembedding are: found by rule in any model's trace.

The rules read what one probe did, never a family's name:

- blocks: sibling modules called in a row, each one's output the next one's input, bit for bit;
- final norm: what turned the last block's output into the model's last hidden state;
- unembedding: the outermost module that takes the last hidden state and gives the logits, up to a
  constant factor or a tanh cap that is measured on the probe.

What they find is returned with the facts that prove it. What they can't prove is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn

from trilens.errors import AnatomyError, SeveralStreamsError
from trilens.io.messages import listed
from trilens.models.logit_relation import relate
from trilens.models.own_code import why_not_inline
from trilens.models.trace import ModuleCall, Trace, parent_path, same

__all__ = ["Anatomy", "Block", "chains", "find_anatomy"]

_LONGEST_WAY = 4


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
        d_model: width of the residual stream.
        batch_first: whether the residual is [batch, seq, d_model] (else [seq, batch, d_model]).
        final_norm: paths of the modules between the last block and the last hidden state; empty
            where the last block's output is the last hidden state.
        final_scale: factor on the last block's output before the final norm (1 nearly always).
        unembedding: paths of the modules from the last hidden state to the logits; empty for a
            bare encoder.
        logit_scale: factor between the unembedding's output and the logits.
        logit_softcap: c in c·tanh(x/c), or None.
        vocab: width of the logits, or None.
        attention: per layer, the module that calls the attention registry there.
        other_attention: per layer, attention that goes another way, in words.
        facts: what the probe proved, in words.
        inline: per layer whose module computes attention in its own code, which of the module's
            products gives the scores; -1 for a fused function.
    """

    blocks: tuple[Block, ...]
    d_model: int
    batch_first: bool
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

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class _Chain:
    calls: tuple[ModuleCall, ...]
    output_index: tuple[int, ...]

    @property
    def last(self) -> Tensor:
        return self.calls[-1].outputs[self.output_index[-1]]


def find_anatomy(
    trace: Trace, *, constants: Sequence[float] = (), width: int | None = None
) -> Anatomy:
    """Apply the rules to a trace.

    Args:
        trace: what a probe of the model did.
        constants: the numbers of the model's config: what a factor or a tanh cap may be.
        width: the config's hidden size: a stream that is a multiple of it holds several.

    Raises:
        SeveralStreamsError: blocks pass on a residual of rank 4, or two residual streams.
        AnatomyError: no chain of blocks, or its end is not the last hidden state.
    """
    chain, norm, hidden = _choose(trace)
    last = chain.last
    if width is not None and last.shape[-1] != width and last.shape[-1] % width == 0:
        raise SeveralStreamsError(
            f"the residual has several streams: {chain.calls[-1].path} passes on width "
            f"{last.shape[-1]}, {last.shape[-1] // width} × the model's hidden size {width}; "
            "a single residual stream [batch, seq, d_model] is needed"
        )
    facts = [
        f"{len(chain.calls)} blocks in {parent_path(chain.calls[0].path) or 'the model'}: "
        "each block's output is the next one's input, bit for bit",
        f"last hidden state = {' → '.join(norm.path) or 'the output'} of the last block",
    ]
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
    return Anatomy(
        blocks=tuple(
            Block(call.path, call.module, index)
            for call, index in zip(chain.calls, chain.output_index, strict=True)
        ),
        d_model=last.shape[-1],
        batch_first=last.shape[-2] == trace.seq,
        final_norm=norm.path,
        final_scale=norm.scale,
        unembedding=head.path,
        logit_scale=head.scale,
        logit_softcap=head.softcap,
        vocab=trace.logits.shape[-1] if trace.logits is not None else None,
        attention=attention,
        other_attention=other,
        facts=tuple(facts),
        inline=inline,
    )


def _is_stream(tensor: Tensor, seq: int) -> bool:
    return tensor.is_floating_point() and tensor.dim() == 3 and sorted(tensor.shape[:2]) == [1, seq]


def _choose(trace: Trace) -> tuple[_Chain, _Norm, Tensor]:
    """The outermost chain of sibling modules that ends in the last hidden state."""
    chains = _chains(trace)
    ends = []
    for chain in chains:
        for hidden in trace.last_hidden:
            norm = _final_norm(trace, chain, hidden)
            if norm is not None:
                ends.append((chain, norm, hidden))
                break
    if not ends:
        raise _why_not(trace, chains)
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
    return [chain.calls for chain in _chains(trace)]


def _chains(trace: Trace) -> list[_Chain]:
    """Runs of sibling modules in which every output is the next input."""
    groups: dict[str, list[ModuleCall]] = {}
    for call in trace.calls:
        parent, _, name = call.path.rpartition(".")
        if name.isdigit() and any(_is_stream(tensor, trace.seq) for tensor in call.outputs):
            groups.setdefault(parent, []).append(call)
    found = []
    for calls in groups.values():
        chain = _link(calls, trace.seq)
        if chain is not None:
            found.append(chain)
    return found


def _link(calls: list[ModuleCall], seq: int) -> _Chain | None:
    index: list[int] = []
    for call, following in pairwise(calls):
        if following.start < call.end:
            return None
        streams = [(i, t) for i, t in enumerate(call.outputs) if _is_stream(t, seq)]
        linked = next((i for i, tensor in streams if _carried(tensor, following) is not None), None)
        if linked is None:
            return None
        index.append(linked)
    fallback = next(i for i, t in enumerate(calls[-1].outputs) if _is_stream(t, seq))
    index.append(index[-1] if index and index[-1] < len(calls[-1].outputs) else fallback)
    return _Chain(tuple(calls), tuple(index))


def _carried(tensor: Tensor, call: ModuleCall) -> float | None:
    """The constant times which a call takes the tensor, or None.

    RWKV-4 halves its residual stream every few blocks in inference; the blocks' weights make up
    for it. The stream is still one chain.
    """
    if call.takes(tensor):
        return 1.0
    return next((c.scale for item in call.inputs if (c := relate(tensor, item)) is not None), None)


@dataclass(frozen=True, slots=True)
class _Norm:
    """last hidden state = modules(scale · last block's output)."""

    end: int
    path: tuple[str, ...] = ()
    scale: float = 1.0


def _final_norm(trace: Trace, chain: _Chain, hidden: Tensor) -> _Norm | None:
    """The way from the last block's output to the last hidden state; None where there is none."""
    after = chain.calls[-1].end
    # Streams [seq, batch, d_model] are turned round before they are handed out.
    if same(chain.last, hidden) or _same_flat(chain.last, hidden):
        return _Norm(after)
    first = next((c for c in trace.calls if c.start > after and _carried(chain.last, c)), None)
    if first is None:
        return None
    scale = _carried(chain.last, first)
    start = chain.last if scale in (None, 1.0) else first.inputs[0]
    for path, output, end in _way(trace, start, after):
        if same(output, hidden) or _same_flat(output, hidden):
            return _Norm(end, path, scale or 1.0)
    return None


def _way(trace: Trace, tensor: Tensor, after: int) -> Iterator[tuple[tuple[str, ...], Tensor, int]]:
    """Follow a tensor through modules that read nothing else, outermost modules first.

    Yields:
        The paths so far, what the last of them gave, and the tick at which it ended.
    """
    path: tuple[str, ...] = ()
    while len(path) < _LONGEST_WAY:
        later = (call for call in trace.calls if call.start > after and call.outputs)
        step = next((call for call in later if _reads(call, tensor)), None)
        if step is None or not _reads_only(step, tensor):
            return
        path = (*path, step.path)
        tensor, after = step.outputs[0], step.end
        yield path, tensor, after


def _ways(trace: Trace, tensor: Tensor, after: int) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Each way that begins at a reader of a tensor: a pooler may read it before the head does."""
    for first in (c for c in trace.calls if c.start > after and c.outputs and _reads(c, tensor)):
        if _reads_only(first, tensor):
            yield (first.path,), first.outputs[0]
            for path, output, _ in _way(trace, first.outputs[0], first.end):
                yield (first.path, *path), output


def _reads(call: ModuleCall, tensor: Tensor) -> bool:
    return any(_is_read_as(item, tensor) for item in call.inputs)


def _reads_only(call: ModuleCall, tensor: Tensor) -> bool:
    return all(_is_read_as(item, tensor) for item in call.inputs if item.is_floating_point())


def _is_read_as(item: Tensor, tensor: Tensor) -> bool:
    """The tensor itself, or cast: Mamba keeps a float32 stream under half-precision weights."""
    cast = tensor if item.dtype == tensor.dtype else tensor.to(item.dtype)
    return item.is_floating_point() and same(item, cast)


def _same_flat(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel() or a.shape[-1:] != b.shape[-1:]:
        return False
    return same(a.reshape(-1), b.reshape(-1))


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
    ways = list(_ways(trace, hidden, after))
    # A head that reads a scaled hidden state: for a linear map the factor commutes.
    for call in (call for call in trace.calls if call.start > after):
        plain = isinstance(call.module, nn.Linear) and getattr(call.module, "bias", None) is None
        if plain and call.inputs:
            factor = relate(hidden, call.inputs[0])
            if factor is not None and factor.scale != 1.0:
                ways.append(((call.path,), call.outputs[0] / factor.scale))
    for path, output in ways:
        relation = relate(output[..., : logits.shape[-1]], logits, constants)
        if relation is not None:
            return _Head(path, relation.scale, relation.softcap)
    raise AnatomyError(
        "the logits could not be rebuilt: no modules lead from the last hidden state to the "
        f"logits [{', '.join(map(str, logits.shape))}], up to a factor or a tanh cap"
    )


def _attention_by_layer(
    trace: Trace, chain: _Chain
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
        elif len({site.path for site in inside}) == 1 and inside[0].product is None:
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


def _why_not(trace: Trace, chains: list[_Chain]) -> AnatomyError:
    many = [
        call
        for call in trace.calls
        if call.path.rpartition(".")[2].isdigit()
        and any(
            t.is_floating_point() and t.dim() == 4 and trace.seq in t.shape[:3]
            for t in call.outputs[:1]
        )
    ]
    if many:
        shape = ", ".join(map(str, many[0].outputs[0].shape))
        return SeveralStreamsError(
            f"the residual has several streams: {many[0].path} passes on a tensor [{shape}]; "
            "a single residual stream [batch, seq, d_model] is needed"
        )
    if chains:
        longest = max(chains, key=lambda chain: len(chain.calls))
        return AnatomyError(
            f"the last hidden state could not be rebuilt from {longest.calls[-1].path}'s output: "
            "no modules that read it alone lead from one to the other"
        )
    return AnatomyError(
        "no chain of blocks: there are no sibling modules whose outputs "
        f"[1, {trace.seq} tokens, d_model] are each the next one's input"
    )
