"""The effective attention of a layer with a matrix state, kept as what its recurrence was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from trilens.caches.patterns.recurrent.base import RecurrenceBase, check_decay, check_tensor, cut
from trilens.caches.patterns.recurrent.blocks import Recurrence, row_sums
from trilens.caches.patterns.softmax.checks import check_number
from trilens.errors import ShapeError, UsageError

__all__ = ["RecurrentPattern", "running_maximum"]

_FULL = ("q", "k", "a", "b")
_SCALES = ("k_scale", "b_scale", "row_scale")


class RecurrentPattern(RecurrenceBase):
    """The signed weights W of y = W v, where v goes through a recurrence with a matrix state.

        S_t = (diag(w_t) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ        y_t = scaling · q_tᵀ S_t

    Tensors are kept by reference and detached: O(tokens) memory, nothing copied, heads that share
    one stay shared. Computed in float32 at least. Rows do not sum to 1 and weights may be negative;
    entropy and the like are asked of `relu_l1()`. What the layer does around its recurrence — a
    convolution, a skip, an output gate, a norm — is not in the weights.

    The decay comes as its logarithm: that is what models compute first, products of decays are
    sums of it, and a decay close to 1 has no digits left in w.

    Where a term is a vector times a number per head and token (a step size, a write strength), the
    number goes into `k_scale` or `b_scale`, so that heads can share the vector.

    Args:
        q: [batch, own, seq, d]. A tensor has one entry per head, or one per group: the pattern has
            as many heads as the tensor with the most, and head h reads entry h // (heads // own).
        k: [batch, own, seq, d].
        log_w: log of the decay, up to 0, minus infinity forgets: [1 or batch, own, 1 or seq, 1 or
            d], or static [own, 1 or d].
        a: [batch, own, seq, d], what the state is read with before a token changes it; with b.
        b: [batch, own, seq, d], where that reading is added back.
        k_scale: [batch, own, seq], factor of k.
        b_scale: [batch, own, seq], factor of b.
        row_scale: [batch, own, seq], factor of every row.
        bonus: [own, d]. Where given, a query reads the state before its own token, and its own
            token's weight is Σ_d q · bonus · k.
        scaling: factor of every weight.

    Raises:
        UsageError: not a tensor; a without b; tensors on several devices.
        ShapeError: axes that do not fit each other.
        DtypeError: a tensor that is not floating point.
        ValueRangeError: a log decay above 0, or scaling not finite.

    Source: arXiv 2503.14456 and 2412.06464 for the recurrences, 2403.01590 for their weights.
    """

    __slots__ = ("_heads", "_scaling")

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        log_w: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        k_scale: Tensor | None = None,
        b_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        bonus: Tensor | None = None,
        scaling: float = 1.0,
    ) -> None:
        given = {
            "q": q,
            "k": k,
            "log_w": log_w,
            "a": a,
            "b": b,
            "k_scale": k_scale,
            "b_scale": b_scale,
            "row_scale": row_scale,
            "bonus": bonus,
        }
        if (a is None) != (b is None) or (b is None and b_scale is not None):
            raise UsageError("a, b and b_scale belong together: give a and b, or none of them")
        self._heads = _check(given)
        self._scaling = check_number(scaling, "scaling")
        super().__init__(given)

    @classmethod
    def gated_delta(
        cls, q: Tensor, k: Tensor, *, log_w: Tensor, beta: Tensor, scaling: float = 1.0
    ) -> RecurrentPattern:
        """The gated delta rule: what k already holds is taken out before v is written.

            S_t = (I − β_t k_t k_tᵀ) diag(w_t) S_{t−1} + β_t k_t v_tᵀ

        Args:
            q: [batch, own, seq, d], normalised as the model does it.
            k: [batch, own, seq, d], normalised as the model does it.
            log_w: log decay, [batch, heads, seq, 1] for one per head or [batch, heads, seq, d].
            beta: [batch, heads, seq], write strength.
            scaling: factor of q, usually d^−½.

        Raises:
            UsageError, ShapeError, DtypeError, ValueRangeError: as the constructor.

        Source: arXiv 2412.06464, equation 10.
        """
        one_per_token = {"batch": (), "heads": (), "seq": ()}
        check_tensor(beta, "beta", one_per_token)
        batch, heads, seq = beta.shape
        d = check_tensor(k, "k", {"batch": (batch,), "heads": (), "seq": (seq,), "d": ()}).shape[3]
        axes = {"batch": (batch,), "heads": (heads,), "seq": (seq,), "d": (1, d)}
        check_tensor(log_w, "log_w", axes)
        # diag(w) goes to the side where it is small: a = w ⊙ k, or a number per head in b_scale.
        if log_w.shape[-1] == 1:
            a, strength = k, -beta * log_w[..., 0].exp()
        else:
            # Heads that cannot be shared out are refused by the constructor, by name.
            a, strength = k.repeat_interleave(max(1, heads // k.shape[1]), dim=1), -beta
            a = a * log_w.exp() if a.shape[1] == heads else a
        return cls(q, k, log_w=log_w, a=a, b=k, k_scale=beta, b_scale=strength, scaling=scaling)

    @classmethod
    def exponential_gating(
        cls,
        q: Tensor,
        k: Tensor,
        *,
        input_gate: Tensor,
        forget_gate: Tensor,
        scaling: float,
        eps: float = 1e-6,
    ) -> RecurrentPattern:
        """Scalar gates before exp and sigmoid, with a normaliser that is carried along.

            S_t = σ(f_t) S_{t−1} + exp(i_t) k_t v_tᵀ      n_t = σ(f_t) n_{t−1} + exp(i_t) k_t
            y_t = q_tᵀ S_t / max(|q_tᵀ n_t|, 1), q scaled

        exp(i) may be too large for any float. The model's own running maximum m is divided out, of
        S and n alike: decays become exp(log σ(f_t) + m_{t−1} − m_t), writes exp(i_t − m_t), both at
        most 1, and the 1 becomes exp(−m_t).

        Args:
            q: [batch, heads, seq, d].
            k: [batch, heads, seq, d].
            input_gate: [batch, heads, seq], i before exp.
            forget_gate: [batch, heads, seq], f before the sigmoid.
            scaling: factor of q, usually d^−½.
            eps: added to the denominator.

        Raises:
            UsageError, ShapeError, DtypeError, ValueRangeError: as the constructor.

        Source: arXiv 2405.04517, equations 19–27.
        """
        axes = {"batch": (), "heads": (), "seq": ()}
        check_tensor(input_gate, "input_gate", axes)
        size = {name: (n,) for name, n in zip(axes, input_gate.shape, strict=True)}
        check_tensor(forget_gate, "forget_gate", size)
        check_tensor(q, "q", {**size, "heads": (), "d": ()})
        log_f, maximum = running_maximum(input_gate.detach(), forget_gate.detach())
        log_w = (log_f + pad(maximum, (1, -1)) - maximum).clamp(max=0)
        work = torch.promote_types(q.dtype, torch.float32)
        bare = cls(
            q,
            k,
            log_w=log_w[..., None].to(work),
            k_scale=(input_gate.detach() - maximum).exp().to(work),
            scaling=scaling,
        )
        found = torch.stack([row_sums(next(bare.recurrences(row))) for row in range(bare.batch)])
        floor = (-maximum).exp().to(found.dtype)
        scale = 1 / (torch.maximum(found.abs(), floor) + eps)
        return cls(**bare.tensors(), row_scale=scale, scaling=scaling)

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        batch, _, seq, _ = self._tensors["q"].shape
        return batch, self._heads, seq, seq

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 where q or k is float64."""
        both = torch.promote_types(self._tensors["q"].dtype, self._tensors["k"].dtype)
        return torch.promote_types(both, torch.float32)

    def recurrences(self, batch: int, head: int | None = None) -> Iterator[Recurrence]:
        """One recurrence, over all heads or over one."""
        parts = {name: self._of(name, batch, head) for name in self._tensors}
        log_w, bonus = parts.pop("log_w"), parts.pop("bonus", None)
        heads = self.heads if head is None else 1
        diagonal = None
        if bonus is not None:
            diagonal = _own_weight(parts, bonus, heads, self.dtype)
        yield Recurrence(
            heads=heads,
            dtype=self.dtype,
            log_w=log_w,
            diagonal=diagonal,
            scaling=self._scaling,
            **parts,
        )

    def params(self) -> dict[str, Any]:
        """The kind and the scaling."""
        return {"kind": "recurrent", "scaling": self._scaling}

    def _of(self, name: str, batch: int, head: int | None) -> Tensor:
        """A tensor of one prompt, [own, …]; of one head, where one is asked."""
        tensor = self._tensors[name]
        if name == "log_w" and tensor.ndim == 2:
            tensor = tensor[:, None]
        elif name != "bonus":
            tensor = tensor[batch if tensor.shape[0] > 1 else 0]
        if head is None:
            return tensor
        group = head // (self._heads // tensor.shape[0])
        return tensor[group : group + 1]

    def _cut(self, name: str, row: int, n: int) -> Tensor:
        tensor = self._tensors[name]
        if name == "bonus" or tensor.ndim == 2:
            return tensor  # a parameter of the model: nothing of the batch
        return cut(tensor, row, n, seq_axis=2)


def running_maximum(input_gate: Tensor, forget_gate: Tensor) -> tuple[Tensor, Tensor]:
    """log σ(f_t), and m_t = max(log σ(f_t) + m_{t−1}, i_t) from m = 0 before the first token.

    Shapes
        all [..., seq]; the results are float64.
    """
    # PROMOTE: m is a difference of sums over the whole sequence.
    log_f = logsigmoid(forget_gate.double())
    past = log_f.cumsum(-1)
    return log_f, past + (input_gate.double() - past).cummax(-1).values.clamp(min=0)


def _check(given: dict[str, Tensor | None]) -> int:
    """Refuse tensors that do not belong together; the number of heads."""
    any_size: tuple[int, ...] = ()
    q = check_tensor(given["q"], "q", {"batch": (), "heads": (), "seq": (), "d": ()})
    batch, _, seq, d = q.shape
    full = {"batch": (batch,), "heads": any_size, "seq": (seq,), "d": (d,)}
    scale = {"batch": (batch,), "heads": any_size, "seq": (seq,)}
    found = {"q": q}
    for name in (*_FULL[1:], *_SCALES):
        tensor = given[name]
        if tensor is not None:
            found[name] = check_tensor(tensor, name, full if name in _FULL else scale)
    log_w = given["log_w"]
    if isinstance(log_w, Tensor) and log_w.ndim == 2:
        decay: dict[str, tuple[int, ...]] = {"heads": any_size, "d": (1, d)}
    else:
        decay = {"batch": (1, batch), "heads": any_size, "seq": (1, seq), "d": (1, d)}
    found["log_w"] = check_tensor(log_w, "log_w", decay)
    check_decay(found["log_w"])
    if given["bonus"] is not None:
        found["bonus"] = check_tensor(given["bonus"], "bonus", {"heads": any_size, "d": (d,)})
    own = {
        name: tensor.shape[0] if tensor.ndim == 2 else tensor.shape[1]
        for name, tensor in found.items()
    }
    heads = max(own.values())
    for name, entries in own.items():
        if heads % entries:
            raise ShapeError(
                f"{heads} heads cannot share the {entries} of {name}: the first has to be a "
                "multiple of the second"
            )
        if found[name].device != q.device:
            raise UsageError(
                f"{name} is on {found[name].device}, q on {q.device}: put all on one device"
            )
    return heads


def _own_weight(parts: dict[str, Tensor], bonus: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Σ_d q · bonus · k of every token with itself: [heads, seq]."""

    def spread(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).repeat_interleave(heads // tensor.shape[0], dim=0)

    weight = (spread(parts["q"]) * spread(bonus)[:, None] * spread(parts["k"])).sum(-1)
    return weight * spread(parts["k_scale"]) if "k_scale" in parts else weight
