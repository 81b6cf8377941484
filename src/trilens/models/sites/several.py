"""Sites of a block with several residual streams: what its parts read, give, and write into."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trilens.axes import SITES
from trilens.models.gates.site import layout_of, layout_of_streams
from trilens.models.gates.stream_correction import Correction
from trilens.models.sites.block import Kind
from trilens.models.sites.found import Found
from trilens.models.sites.streams import BlockStreams
from trilens.models.stream_form import StreamForm
from trilens.models.stream_steps import StreamStep, rounding
from trilens.models.trace import ModuleCall

__all__ = ["READS", "claim_correction", "claim_parts"]

READS = ("attn.read", "mlp.read", "mixer.read")
_ADDS = ("attn.add", "mlp.add", "mixer.add")


def claim_parts(
    steps: list[StreamStep] | str,
    streams: BlockStreams,
    form: StreamForm,
    kind_of: Callable[[ModuleCall], Kind],
    found: Found,
) -> ModuleCall | None:
    """Claim what the parts of a block read and give, and the streams between them.

    Args:
        steps: the parts, or why they are not known.
        streams: the block's.
        form: where the streams are in a tensor.
        kind_of: what a part is.
        found: where claims go.

    Returns:
        The MLP's call; None where there is not just one.
    """
    found.refuse(
        _ADDS, "each stream gets it times a weight of its own (gate stream.write)", absent=True
    )
    if isinstance(steps, str):
        inner = (name for name in SITES if name.startswith(("mlp.", "mixer.")))
        found.refuse((*READS, *inner, "resid_mid"), steps)
        return None
    kinds = [kind_of(step.part[0]) for step in steps]
    for kind in ("attn", "mlp", "mixer"):
        own = [step for step, of in zip(steps, kinds, strict=True) if of == kind]
        names = (f"{kind}.read", f"{kind}.in", f"{kind}.out")
        if len(own) > 1:
            found.refuse(names, f"the block has {len(own)} such parts")
        elif own:
            _claim_part(kind, own[0], streams, found)
        else:
            every = [name for name in SITES if name.startswith(f"{kind}.")]
            found.refuse(names[:1] if kind == "attn" else every, "the block has no such part",
                         absent=True)  # fmt: skip
    _claim_mid(steps, kinds, streams, form, found)
    mlps = [step.part[0] for step, of in zip(steps, kinds, strict=True) if of == "mlp"]
    return mlps[0] if len(mlps) == 1 else None


def claim_correction(
    correction: Correction, streams: BlockStreams, found: Found
) -> tuple[Tensor, Tensor | None]:
    """Claim what the parts of a block read that predicts and corrects its streams.

    Returns:
        The stream that the parts are added to, and what it is behind them; None where no sum of
        the block is that.
    """
    found.refuse(
        ("resid_mid",),
        "the block adds its parts to one stream of its own: nothing lies between them in the "
        "residual streams",
        absent=True,
    )
    call, index = correction.reader
    layout = layout_of(call.read[index], streams.seq)
    assert layout is not None
    tap, written = streams.input_tap(call, index)
    fixed = f"{call.path} is not all that reads it; edit resid_pre"
    found.claim("attn.read", tap, layout, (streams.d_model,), overwritten=written, fixed=fixed)
    why = "the block's parts read one after the other: attn.read, then mlp.in"
    found.refuse(READS, why, absent=True)
    wanted = streams.rows(correction.active).double() + correction.change
    allowed = rounding(wanted.to(correction.active.dtype))
    ends = [
        each.result
        for each in streams.sums
        if float((streams.rows(each.result).double() - wanted).abs().max()) <= allowed
    ]
    return correction.active, ends[-1] if ends else None


def _claim_part(kind: str, step: StreamStep, streams: BlockStreams, found: Found) -> None:
    call, index = step.part
    shape = (streams.d_model,)
    if step.reader is None:
        found.refuse((f"{kind}.read",), f"no module hands {call.path} one vector of the streams")
    else:
        _claim(f"{kind}.read", *step.reader, streams, found)
    if kind == "attn":
        return
    _claim(f"{kind}.out", call, index, streams, found)
    ends = [i for i, tensor in enumerate(call.read) if streams.is_stream(tensor)]
    layout = layout_of(call.read[ends[0]], streams.seq) if ends else None
    if layout is None:
        found.refuse((f"{kind}.in",), f"{call.path} reads no vector of the model's width")
        return
    tap, written = streams.input_tap(call, ends[0])
    found.claim(f"{kind}.in", tap, layout, shape, overwritten=written)


def _claim(name: str, call: ModuleCall, index: int, streams: BlockStreams, found: Found) -> None:
    layout = layout_of(call.made[index], streams.seq)
    assert layout is not None
    tap, written = streams.output_tap(call, index)
    found.claim(name, tap, layout, (streams.d_model,), overwritten=written)


def _claim_mid(
    steps: list[StreamStep],
    kinds: list[Kind],
    streams: BlockStreams,
    form: StreamForm,
    found: Found,
) -> None:
    """The streams before the MLP's step, behind attention or a mixer."""
    last = len(kinds) - 1
    shown = steps[last - 1].shown if last > 0 else None
    if last < 1 or kinds[last] != "mlp" or kinds[last - 1] not in ("attn", "mixer"):
        found.refuse(("resid_mid",), "nothing lies between two parts of the block", absent=True)
    elif shown is None:
        found.refuse(("resid_mid",), "no module shows the streams between two parts")
    else:
        tap, written = (streams.input_tap if shown.is_input else streams.output_tap)(
            shown.call, shown.index
        )
        # The block's own code passes the streams on beside the module that is given them.
        fixed = f"{shown.call.path} is not all that reads the streams there; edit resid_pre"
        found.claim(
            "resid_mid", tap, layout_of_streams(form), form.shape, overwritten=written, fixed=fixed
        )
