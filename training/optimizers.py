"""The optimizers: Muon for the hidden matrices, AdamW for everything else.

AdamW alone was tried first; at the few thousand steps a CPU affords it learns far less from the
same tokens: in a probe of 200 steps of 2048 tokens the held-out loss was 5.5 nats per token, where
Muon's was 4.7 at the same rates (3e-3) and 4.5 at its own. Torch's own Muon computes in bf16, which
CPUs without bf16 arithmetic emulate slowly, hence this fp32 one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["Muon", "make_optimizers", "orthogonalise"]

# Quintic Newton-Schulz coefficients of the original Muon: they trade exactness (singular values
# land in about 0.7..1.2) for convergence in five iterations.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring every singular value of each matrix near 1.

    Args:
        matrices: ``[count, rows, columns]``, fp32.
        iterations: Newton-Schulz iterations.
    """
    a, b, c = _NEWTON_SCHULZ
    norms = matrices.flatten(1).norm(dim=1)[:, None, None]
    x: torch.Tensor = matrices / (norms + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, scaled to the size AdamW's update would have."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        """Take 2-D parameters only; ``lr`` is on AdamW's scale."""
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient; ``closure`` is not used."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            # Equal shapes go through one batched product: the matrices are small.
            for weights in by_shape.values():
                self._step_same_shape(weights, group)

    def _step_same_shape(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        directions = []
        for weight in weights:
            if weight.grad is None:
                raise RuntimeError("a matrix given to Muon took no part in the loss")
            state = self.state[weight]
            if not state:
                state["average"] = torch.zeros_like(weight)
            average = state["average"].lerp_(weight.grad, 1 - momentum)
            directions.append(weight.grad.lerp(average, momentum))
        scale = 0.2 * max(weights[0].shape) ** 0.5
        updates = orthogonalise(torch.stack(directions)) * scale
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)


def make_optimizers(
    model: PreTrainedModel, matrix_rate: float, other_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Split the parameters: hidden linears' weights to Muon, everything else to AdamW.

    Everything else is the embedding and the unembedding (tied or not), gains, biases, and whatever
    is not a linear's weight (convolutions, decays): orthogonalising those means nothing.

    Args:
        model: any causal language model.
        matrix_rate: peak learning rate of Muon.
        other_rate: peak learning rate of AdamW.
        weight_decay: of the hidden matrices; the rest is not decayed.
    """
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    hidden = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    hidden -= ends
    matrices = [weight for weight in model.parameters() if id(weight) in hidden]
    others = [weight for weight in model.parameters() if id(weight) not in hidden]
    return [
        Muon(matrices, lr=matrix_rate, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
