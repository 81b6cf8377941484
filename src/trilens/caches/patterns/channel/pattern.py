"""The effective attention of layers whose every channel has weights of its own: the mean of them.

Thousands of channels are too many to show, and [seq, channels, states] is too much to hold. The
mean over channels of such weights is again one recurrence, whose state runs over (channel, state)
pairs; it is walked through in blocks of channels, and the blocks' weights add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilens.caches.patterns.channel.blocks import ChannelInputs
from trilens.caches.patterns.protocol import BLOCK_BYTES
from trilens.caches.patterns.recurrent.base import RecurrenceBase, check_decay, check_tensor, cut
from trilens.caches.patterns.recurrent.blocks import Recurrence
from trilens.caches.patterns.relu_l1 import RowSummary, SummarisedPattern, summarise
from trilens.errors import UsageError, ValueRangeError

__all__ = ["ChannelPattern", "DecayedSoftmaxPattern"]

# Up to so many rows or columns are cheaper pair by pair than in a walk through the chunks.
_FEW = 6


class _ChannelMean(RecurrenceBase):
    """A mean over the channels of the first tensor it keeps, [batch, seq, channels]."""

    __slots__ = ()

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        batch, seq, _ = next(iter(self._tensors.values())).shape
        return batch, 1, seq, seq  # one head: the mean

    @property
    def n_channels(self) -> int:
        """Channels that the mean runs over."""
        return next(iter(self._tensors.values())).shape[2]


class ChannelPattern(_ChannelMean):
    """Mean over channels of the signed weights of a diagonal recurrence per channel.

        h_t[c, n] = exp(step_t[c] · rate[c, n]) h_{t−1}[c, n] + write_t[c] · k_t[n] · v_t[c]
        y_t[c] = Σ_n q_t[n] h_t[c, n]
        W_c[t, j] = Σ_n q_t[n] exp(Σ_{i=j+1..t} step_i[c] · rate[c, n]) write_j[c] k_j[n]

    One head: the mean of W_c over all channels, with its sign. Channels of opposite sign cancel in
    it. `channels` makes the pattern of a few channels alone.

    Costs: a row O(seq · channels · states), in blocks of at most 32 MiB.

    Args:
        step: [batch, seq, channels], 0 or more.
        rate: [channels, states], 0 or less.
        q: [batch, seq, states]; 1 unless given (with one state).
        k: [batch, seq, states]; 1 unless given.
        write: [batch, seq, 1 or channels]; the step itself unless given.

    Raises:
        UsageError: not a tensor, or tensors on several devices.
        ShapeError: axes that do not fit each other.
        DtypeError: a tensor that is not floating point.
        ValueRangeError: a step below 0 or a rate above 0.

    Source: arXiv 2403.01590, equation 11.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        step: Tensor,
        rate: Tensor,
        q: Tensor | None = None,
        k: Tensor | None = None,
        write: Tensor | None = None,
    ) -> None:
        check_tensor(step, "step", {"batch": (), "seq": (), "channels": ()})
        batch, seq, channels = step.shape
        check_tensor(rate, "rate", {"channels": (channels,), "states": ()})
        states = rate.shape[1]
        given = {"step": step, "rate": rate, "q": q, "k": k, "write": write}
        sizes = {"q": (states,), "k": (states,), "write": (1, channels)}
        for name, width in sizes.items():
            if given[name] is not None:
                axes = {"batch": (batch,), "seq": (seq,), "width": width}
                check_tensor(given[name], name, axes)
        _one_device(given)
        check_decay(rate, "rate")
        lowest = float(step.detach().amin())
        if lowest < 0:
            raise ValueRangeError(
                f"step down to {lowest:g} is out of range: a step is 0 or more; give it after its "
                "activation"
            )
        super().__init__(given)

    @classmethod
    def gated(cls, log_w: Tensor, gate: Tensor | None = None) -> ChannelPattern:
        """A gated linear recurrence without states: h_t = w_t ⊙ h_{t−1} + gate_t ⊙ v_t, y = h.

        Args:
            log_w: [batch, seq, channels], log decay up to 0, minus infinity forgets.
            gate: [batch, seq, channels], what the value is multiplied by; 1 unless given.

        Raises:
            UsageError, ShapeError, DtypeError, ValueRangeError: as the constructor.

        Source: arXiv 2402.19427, equation 4.
        """
        check_tensor(log_w, "log_w", {"batch": (), "seq": (), "channels": ()})
        check_decay(log_w)
        rate = log_w.new_full((log_w.shape[2], 1), -1)
        write = log_w.new_ones(log_w.shape[:2])[..., None] if gate is None else gate
        return cls(step=-log_w, rate=rate, write=write)

    def channels(self, start: int, stop: int) -> ChannelPattern:
        """The pattern of channels start … stop − 1 alone, from the same tensors.

        Raises:
            ValueRangeError: no such channels.
        """
        if not 0 <= start < stop <= self.n_channels:
            raise ValueRangeError(
                f"channels {start}–{stop} are out of range: 0 ≤ start < stop ≤ {self.n_channels}"
            )
        parts = self.tensors()
        for name in ("step", "write"):
            if name in parts and parts[name].shape[2] > 1:
                parts[name] = parts[name][..., start:stop]
        parts["rate"] = parts["rate"][start:stop]
        return ChannelPattern(**parts)

    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        if not 0 < len(positions) <= _FEW:
            return super()._rows(positions, head, row)
        inputs = ChannelInputs.of(*self._inputs(row))
        return torch.stack([inputs.row(position) for position in positions])[None]

    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        if not 0 < len(positions) <= _FEW:
            return super()._columns(positions, head, row)
        inputs = ChannelInputs.of(*self._inputs(row))
        return torch.stack([inputs.column(position) for position in positions], dim=-1)[None]

    def recurrences(self, batch: int, head: int | None = None) -> Iterator[Recurrence]:
        """One recurrence per block of channels; states run over (channel, state) pairs."""
        seq = self.seq_q
        step, rate, q, k, write = self._inputs(batch)
        width = _block_channels(seq, rate.shape[1] * self.dtype.itemsize)
        for start in range(0, self.n_channels, width):
            part = slice(start, start + width)
            moves = step[:, part, None]
            yield Recurrence(
                heads=1,
                dtype=self.dtype,
                q=q[:, None].expand(-1, moves.shape[1], -1).reshape(1, seq, -1),
                k=(write[:, part, None] * k[:, None]).reshape(1, seq, -1),
                log_w=(moves * rate[part]).reshape(1, seq, -1),
                scaling=1 / self.n_channels,
            )

    def inputs(self, batch: int = 0) -> ChannelInputs:
        """One prompt's inputs, in the dtype to compute in.

        Raises:
            OutOfRangeError: no such prompt.
        """
        return ChannelInputs.of(*self._inputs(self._row(batch)))

    def params(self) -> dict[str, Any]:
        """The kind alone."""
        return {"kind": "channel"}

    def _inputs(self, batch: int) -> tuple[Tensor, ...]:
        """step, rate, q, k and write of one prompt, in the dtype to compute in."""
        found = {
            name: (tensor if name == "rate" else tensor[batch]).to(self.dtype)
            for name, tensor in self._tensors.items()
        }
        step, rate = found["step"], found["rate"]
        ones = step.new_ones(step.shape[0], rate.shape[1])
        write = found.get("write", step).expand_as(step)
        return step, rate, found.get("q", ones), found.get("k", ones), write

    def cut(self, name: str, row: int, n: int) -> Tensor:
        """One prompt's own tokens of the tensor `name`; rates belong to no prompt."""
        tensor = self._tensors[name]
        return tensor if name == "rate" else cut(tensor, row, n)

    def _cut(self, name: str, row: int, n: int) -> Tensor:
        return self.cut(name, row, n)


class DecayedSoftmaxPattern(SummarisedPattern, _ChannelMean):
    """Mean over channels of a softmax with exponential decay and a bonus for the own token.

        y_t = (Σ_{j<t} exp((t−1−j) · log_w + k_j) v_j + exp(bonus + k_t) v_t) / (the same without v)

    per channel. One head, unsigned: the mean over channels of these weights; every row sums to 1.

    Args:
        k: [batch, seq, channels].
        log_w: [channels], log decay up to 0.
        bonus: [channels].

    Raises:
        UsageError: not a tensor, or tensors on several devices.
        ShapeError: axes that do not fit each other.
        DtypeError: a tensor that is not floating point.
        ValueRangeError: a log decay above 0.

    Source: arXiv 2305.13048, equation 14.
    """

    __slots__ = ("_summaries",)

    def __init__(self, k: Tensor, *, log_w: Tensor, bonus: Tensor) -> None:
        check_tensor(k, "k", {"batch": (), "seq": (), "channels": ()})
        axes = {"channels": (k.shape[2],)}
        check_tensor(log_w, "log_w", axes)
        check_tensor(bonus, "bonus", axes)
        _one_device({"k": k, "log_w": log_w, "bonus": bonus})
        check_decay(log_w)
        super().__init__({"k": k, "log_w": log_w, "bonus": bonus})
        self._summaries: dict[int, RowSummary] = {}

    def recurrences(self, batch: int, head: int | None = None) -> Iterator[Recurrence]:
        """One recurrence per block of channels, each channel a state of its own.

        With g_t the log of the denominator after token t, the state divided by it decays by
        exp(log_w + g_{t−1} − g_t) and takes exp(k_t − g_t): nothing is ever above 1.
        """
        dtype, seq = self.dtype, self.seq_q
        # Half a dozen float64 arrays of this size are alive at once.
        width = _block_channels(seq, 16)
        times = torch.arange(seq, device=self._tensors["k"].device)[:, None]
        for start in range(0, self.n_channels, width):
            part = slice(start, start + width)
            # PROMOTE: the log of the denominator is a difference of terms of size seq · log_w.
            k, log_w, bonus = (
                self._tensors["k"][batch, :, part].double(),
                self._tensors["log_w"][part].double().clamp(min=-1000),
                self._tensors["bonus"][part].double(),
            )
            after = (k - times * log_w).logcumsumexp(0) + times * log_w
            before = pad(after, (0, 0, 1, -1), value=-torch.inf)
            own = bonus + k
            whole = torch.logaddexp(before, own)
            decay = (log_w + before - after).clamp(max=0)
            decay[0] = 0  # minus infinity, but there is no state yet that it could change
            yield Recurrence(
                heads=1,
                dtype=dtype,
                q=(before - whole).exp().to(dtype)[None],
                k=(k - after).exp().to(dtype)[None],
                log_w=decay.to(dtype)[None],
                diagonal=(own - whole).exp().sum(1).to(dtype)[None],
                scaling=1 / self.n_channels,
            )

    def params(self) -> dict[str, Any]:
        """The kind alone."""
        return {"kind": "decayed_softmax"}

    def _summarise(self, row: int) -> RowSummary:
        return summarise(self, row, causal=True)

    def _cut(self, name: str, row: int, n: int) -> Tensor:
        tensor = self._tensors[name]
        return cut(tensor, row, n) if name == "k" else tensor


def _block_channels(seq: int, channel_bytes: int) -> int:
    """Channels whose queries, keys, decays and their scratch stay within 32 MiB."""
    return max(1, BLOCK_BYTES // (4 * seq * channel_bytes))


def _one_device(given: dict[str, Tensor | None]) -> None:
    devices = {name: tensor.device for name, tensor in given.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        spelled = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise UsageError(f"tensors on several devices ({spelled}): put all on one device")
