"""A cheap prediction of the damage that a changed matrix does: output error × downstream gain.

The output error is ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on inputs X that the matrix gets for real text; experts
stored in one tensor, whose inputs no module sees, have ‖W−Ŵ‖² / ‖W‖² instead. The gain says what an
output error of 1 would cost: the KL that one random perturbation of the matrix causes, over that
perturbation's own output error. One gain, of one short forward pass, serves every rule.

Source: the linearity of the loss in the relative error, and its factor from inserted noise, of
arXiv 2411.17525 (theorem 1 and section 4), with output errors in the place of weight errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trilens.evaluation.reference import ReferenceLogits
from trilens.lens.lens import Lens
from trilens.planning.matrices import ModelMatrix, input_sizes
from trilens.taps.inputs import observe_inputs
from trilens.taps.parameters import swapped

__all__ = ["gain", "input_bytes", "inputs_of", "output_error"]

_NOISE = 0.1
"""‖noise‖² / ‖W‖² of the perturbation: near what ternary weights lose, above the rounding of
bfloat16."""

_ROWS = 256
_PART = 1 << 22  # weights of a matrix that are looked at together


def inputs_of(
    lens: Lens,
    matrices: Sequence[ModelMatrix],
    blocks: Sequence[Tensor],
    put_aside: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """What the matrices get as input: up to 256 tokens of each, spread over the first blocks.

    Shapes: → per parameter float32 [tokens, cols]

    Args:
        lens: the model.
        matrices: of the model; those whose inputs no module sees are left out.
        blocks: token ids, each [tokens]; the first eight are used.
        put_aside: of `spilling`, for `input_bytes`.

    Memory: `input_bytes`, where they are not put aside.
    """
    seen: dict[str, list[Tensor]] = {}
    share = -(-_ROWS // min(8, len(blocks)))

    def sample(name: str, rows: Tensor) -> None:
        picks = torch.linspace(0, len(rows) - 1, min(share, len(rows))).long()
        found = rows[picks.to(rows.device)].float().cpu()
        seen.setdefault(name, []).append(put_aside(found))

    observe_inputs(lens.model, input_sizes(matrices), blocks[:8], sample)
    return {name: put_aside(torch.cat(rows)[:_ROWS]) for name, rows in seen.items()}


def input_bytes(matrices: Sequence[ModelMatrix], blocks: Sequence[Tensor]) -> int:
    """How much memory `inputs_of` takes: at most 1 KB for each input of each matrix."""
    rows = min(_ROWS, sum(block.numel() for block in blocks[:8]))
    return 4 * rows * sum(input_sizes(matrices).values())


def output_error(
    matrix: ModelMatrix, before: Tensor, after: Tensor, inputs: Tensor | None
) -> float:
    """The squared error of the matrix's outputs, relative to their own squares.

    Shapes: before, after as the parameter; inputs [tokens, cols]

    Args:
        matrix: what is compared.
        before: its weights.
        after: what they become.
        inputs: what it multiplies; None counts the error of the weights.

    Returns:
        0 for no error, 1 where nothing survives; 0 too where there are no outputs.
    """
    error = energy = 0.0
    for old, new in zip(matrix.of(before), matrix.of(after), strict=True):
        step = max(1, _PART // old.shape[1])
        for start in range(0, len(old), step):
            rows = slice(start, start + step)
            weights = old[rows].float().cpu()
            gap = weights - new[rows].float().cpu()
            if inputs is not None:
                gap, weights = inputs @ gap.T, inputs @ weights.T
            error += float(gap.double().square().sum())
            energy += float(weights.double().square().sum())
    return error / energy if energy else 0.0


def gain(
    lens: Lens,
    matrix: ModelMatrix,
    reference: ReferenceLogits,
    inputs: Tensor | None,
    *,
    seed: int = 0,
) -> float:
    """KL in nats for an output error of 1, predicted from one random perturbation.

    Args:
        lens: the model, with its own weights.
        matrix: what is perturbed, for the length of the call.
        reference: the tokens to measure on.
        inputs: as for `output_error`.
        seed: of the perturbation.

    Memory: two float32 copies of the matrix.
    """
    weights = lens.model.get_parameter(matrix.target).detach()
    generator = torch.Generator().manual_seed(seed)
    wide = weights.float().cpu()
    size = (_NOISE * wide.square().mean()).sqrt()
    noise = torch.randn(weights.shape, generator=generator)
    changed = noise.mul_(size).add_(wide).to(weights.dtype)
    del noise, wide
    error = output_error(matrix, weights, changed, inputs)
    if error == 0:
        return 0.0
    first = reference.first_block([matrix.target])
    with swapped(lens.model, {matrix.target: changed.to(weights.device)}):
        return reference.measure(first_block=first).kl_nats / error
