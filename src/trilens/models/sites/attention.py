"""Sites inside attention: queries to heads, and the projection that joins them."""

from __future__ import annotations

import torch
from torch import Tensor

from trilens.models.gates.block import BlockView
from trilens.models.gates.site import Layout, find_columns, layout_of
from trilens.models.sites.found import Found
from trilens.models.sites.head_out import by_head, gives_tensor, is_projection, projection_bias
from trilens.models.sites.site import Tap
from trilens.models.sites.streams import BlockStreams, is_norm_like
from trilens.models.trace import AttentionSite, ModuleCall, same

__all__ = ["INSIDE", "find_attention_sites", "find_projection", "is_attention_of", "is_behind"]

INSIDE = ("attn.q", "attn.k", "attn.q_rot", "attn.k_rot", "attn.v", "attn.scores", "attn.pattern",
          "attn.z", "attn.head_out", "attn.out")  # fmt: skip
_EPS = 64
"""Roundings of one that probabilities · values may be away from what attention gave, at most."""
_PLAIN = Layout("batched")


def find_attention_sites(
    view: BlockView,
    streams: BlockStreams,
    site: AttentionSite,
    projection: ModuleCall | None,
    found: Found,
) -> None:
    """Claim what one attention call shows of itself."""
    query, keys, value, z = site.query, site.keys, site.value, site.output
    call = next((c for c in view.calls if c.path == site.path and _spans(c, site.tick)), None)
    if query is None or keys is None or value is None or z is None or call is None:
        found.refuse(INSIDE, f"{site.path} calls attention in a way that shows no tensors")
        return
    if z.dim() != 4 or query.dim() != 4 or tuple(z.shape[:2]) != (1, view.seq):
        found.refuse(
            INSIDE, f"{site.path} attends in another form than [batch, heads, seq, d_head]"
        )
        return
    _claim_values(view, site, call, found)
    _claim_projection(view, streams, site, projection, found)
    for name, rotated in (("attn.q", query), ("attn.k", keys)):
        if rotated.shape[2] == view.seq:
            _claim_before_rotation(name, rotated, view, site, found)
        else:
            found.refuse((name,), f"{site.path} attends to other positions beside the tokens")


def _spans(call: ModuleCall, tick: int) -> bool:
    return call.start < tick < call.end


def _claim_values(view: BlockView, site: AttentionSite, call: ModuleCall, found: Found) -> None:
    """The call's arguments and results, proven by probabilities · values = z."""
    query, keys, value, z = site.query, site.keys, site.value, site.output
    assert query is not None and keys is not None and value is not None and z is not None
    names = ("attn.q_rot", "attn.k_rot", "attn.v", "attn.scores", "attn.pattern", "attn.z")
    if site.error is None:
        found.refuse(names, f"{site.path} ({site.key}) shows no pattern to hold its output against")
        return
    allowed = _EPS * torch.finfo(z.dtype).eps
    if not site.error <= allowed:
        found.refuse(
            names,
            f"pattern times values is not the output of {site.path}: they differ by "
            f"{site.error:.1g} of its largest terms",
        )
        return
    heads, width = z.shape[2], z.shape[3]

    def tap(part: str) -> Tap:
        return Tap("attention", call.module, part=part)

    found.claim("attn.q_rot", tap("query"), _PLAIN, (query.shape[1], query.shape[3]))
    for name, part, tensor in (("attn.k_rot", "key", keys), ("attn.v", "value", value)):
        if tensor.shape[2] == view.seq:
            found.claim(name, tap(part), _PLAIN, (tensor.shape[1], tensor.shape[3]))
        else:
            found.refuse((name,), f"{site.path} attends to other positions beside the tokens")
    found.claim("attn.pattern", tap("pattern"), _PLAIN, (heads, keys.shape[2]))
    if site.has_scores:
        found.claim("attn.scores", tap("scores"), _PLAIN, (heads, keys.shape[2]))
    else:
        found.refuse(("attn.scores",), f"{site.path} gives its weights, and no scores rebuild them")
    found.claim("attn.z", tap("output"), _PLAIN, (heads, width))


def find_projection(
    view: BlockView, streams: BlockStreams, site: AttentionSite
) -> ModuleCall | None:
    """The first module with a weight matrix that reads the heads side by side, perhaps gated."""
    z = site.output
    if z is None or z.dim() != 4:
        return None
    width = z.shape[2] * z.shape[3]
    later = [c for c in view.calls if c.start > site.tick and is_projection(c.module)]
    later = [c for c in later if c.read and c.read[0].shape[-1] == width and c.made]
    later = [c for c in later if streams.is_stream(c.made[0])]
    joined = z.reshape(view.seq, width)
    for call in later:
        x = call.read[0]
        if x.numel() == joined.numel() and x.is_floating_point():
            wide = torch.promote_types(x.dtype, joined.dtype)
            if torch.equal(x.reshape(view.seq, width).to(wide), joined.to(wide)):
                return call
    # An output gate or a norm stands between: inside the module that attends, nothing else of
    # this width is projected to the stream.
    inside = [c for c in later if c.path.startswith(f"{site.path}.")]
    inside = [c for c in inside if c.read[0].numel() == joined.numel()]
    inside = [c for c in inside if not _was_there(c.read[0], site.tick, view)]
    return inside[0] if len(inside) == 1 else None


def _was_there(tensor: Tensor, tick: int, view: BlockView) -> bool:
    """Whether a module was given these bits before a tick: they come from no attention then."""
    return any(call.start < tick and any(same(tensor, x) for x in call.read) for call in view.calls)


def is_behind(call: ModuleCall, tick: int, path: str, view: BlockView) -> bool:
    """Whether a module runs an attention, is in the module that does, or projects what it gives.

    Args:
        call: the module's call.
        tick: when attention was computed.
        path: the module in which it was.
        view: the block.
    """
    if _spans(call, tick) or (path != view.block.path and call.path.startswith(f"{path}.")):
        return True
    if not is_projection(call.module) or not call.read:
        return False
    around = (c for c in view.calls if _spans(c, tick) and c is not view.block)
    x = call.read[0]
    return any(_same_numbers(x, y) for c in around for y in c.made)


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1] or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1), b.reshape(-1))


def _claim_projection(
    view: BlockView,
    streams: BlockStreams,
    site: AttentionSite,
    projection: ModuleCall | None,
    found: Found,
) -> None:
    z = site.output
    assert z is not None
    names = ("attn.head_out", "attn.out")
    if projection is None:
        found.refuse(
            names, f"no output projection reads the {z.shape[2]} heads of {site.path} side by side"
        )
        return
    x, y = projection.read[0], projection.made[0]
    tap, written = streams.output_tap(projection)
    layout = layout_of(y, view.seq)
    if layout is not None:
        found.claim("attn.out", tap, layout, (streams.d_model,), overwritten=written)
    if not gives_tensor(projection.module, x):
        found.refuse(
            ("attn.head_out",), f"{projection.path} gives something beside what it projects"
        )
        return
    heads = z.shape[2]
    # PROMOTE: the identity is one of numbers; the model's rounding is what is allowed for. Also,
    # products of half precision take several times as long on a CPU.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = by_head(wide.reshape(1, view.seq, heads, -1), projection.module)
    bias = projection_bias(projection.module, x)
    whole = parts.double().sum(-2) + bias.double()
    terms = parts.double().abs().sum(-2) + bias.double().abs()
    error = (whole - y.reshape(whole.shape).double()).abs().max() / terms.max().clamp_min(1e-300)
    layout = layout_of(x, view.seq)
    if layout is None or not float(error) <= _EPS * torch.finfo(y.dtype).eps:
        found.refuse(
            ("attn.head_out",),
            f"the heads and the bias of {projection.path} do not sum to its output: they differ by "
            f"{float(error):.1g} of the largest terms",
        )
        return
    tap, written = streams.input_tap(projection)
    shape = (heads, streams.d_model)
    found.claim("attn.head_out", tap, layout, shape, projection=projection.module,
                overwritten=written)  # fmt: skip


def _claim_before_rotation(
    name: str, rotated: Tensor, view: BlockView, site: AttentionSite, found: Found
) -> None:
    """Find the module whose output is the queries or keys before they were rotated.

    At position 0 the rotary step is the identity; elsewhere it keeps each head's length.
    """
    heads, width = rotated.shape[1], rotated.shape[3]
    wanted = rotated.transpose(1, 2).reshape(view.seq, heads * width)
    earlier = [c for c in view.calls if c.end < site.tick]
    for call in sorted(earlier, key=lambda c: -c.end):
        for index, tensor in enumerate(call.made):
            layout = layout_of(tensor, view.seq)
            if layout is None or not tensor.is_floating_point() or layout.form == "static":
                continue
            if tensor.numel() < wanted.numel() or tensor.numel() % view.seq:
                continue
            rows = view.rows(tensor)
            columns = find_columns(wanted[:1], rows[:1])
            if columns is None:
                continue
            own = rows[:, list(columns) if isinstance(columns, tuple) else columns]
            if not _same_lengths(own, wanted, heads):
                continue
            if torch.equal(own.to(wanted.dtype), wanted) and _is_after(call, view):
                found.refuse((name,), f"{call.path} normalises what was rotated before")
                return
            tap = Tap("output", call.module, index, _order(call, view))
            whole = columns == slice(0, rows.shape[1])
            read = Layout(layout.form, layout.axis, None if whole else columns)
            written = tensor is not call.outputs[index]
            found.claim(name, tap, read, (heads, width), overwritten=written)
            return
    found.refuse((name,), f"no module shows them before the rotary step of {site.path}")


def _order(call: ModuleCall, view: BlockView) -> int:
    return sum(c.module is call.module and c.start < call.start for c in view.calls)


def _same_lengths(own: Tensor, wanted: Tensor, heads: int) -> bool:
    """Whether each head of each token is as long in both."""
    a = own.double().reshape(len(own), heads, -1).norm(dim=-1)
    b = wanted.double().reshape(len(wanted), heads, -1).norm(dim=-1)
    eps = _EPS * torch.finfo(torch.promote_types(own.dtype, wanted.dtype)).eps
    return bool(((a - b).abs() <= eps * b.max().clamp_min(1e-300)).all())


def _is_after(call: ModuleCall, view: BlockView) -> bool:
    """Whether a norm reads what no module gave: something happened to it before."""
    if not is_norm_like(call):
        return False
    x = next(tensor for tensor in call.read if tensor.is_floating_point())
    rows = view.rows(x)
    return not any(
        find_columns(rows, view.rows(tensor)) is not None
        for other in view.calls
        if other.end < call.start
        for tensor in other.made
        if tensor.is_floating_point() and layout_of(tensor, view.seq) is not None
    )


def is_attention_of(call: ModuleCall, site: AttentionSite, projection: ModuleCall | None) -> bool:
    """Whether a module is attention: it runs the call, or is the projection behind it."""
    if _spans(call, site.tick):
        return True
    return projection is not None and (call is projection or call.encloses(projection))
