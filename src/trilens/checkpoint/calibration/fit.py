"""Norms, biases and group scales of a ternary block, fitted to what the dense block gives.

A short descent by gradient on the calibration text: trits stay as they are, a few numbers for each
row move. The order of the batches comes from the seed. What does not lower the error over the whole
text, with the values as they will be stored, is thrown away.

Source: block-wise reconstruction, BRECQ, arXiv 2102.05426, without its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trilens.checkpoint.calibration.streams import Batch, Stream
from trilens.ternary.engine import round_scales
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["BlockFit", "FitOptions", "fit_block", "put_weight"]

RunBlock = Callable[[nn.Module, Batch, Tensor], Tensor]
"""Runs a block on a batch's residual stream."""


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How long and how fast.

    Attributes:
        passes: Over the text.
        rate: The first step of Adam, of each value's size, for an error of 1: it is multiplied by
            the root of the block's relative error, since what is nearly right needs small steps.
            It falls to a twentieth along a cosine.
        seed: Of the order of the batches.
    """

    passes: int = 4
    rate: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class BlockFit:
    """What the fit found.

    Attributes:
        quants: The matrices with their new scales, by path in the block.
        vectors: New norm weights and biases, by parameter name in the block, in their own dtype.
        error_before: Σ(y − ŷ)²/Σy² of the block's output over the text, before.
        error: The same after.
    """

    quants: dict[str, PerLayerQuant]
    vectors: dict[str, Tensor]
    error_before: float
    error: float


def fit_block(
    block: nn.Module,
    quants: Mapping[str, PerLayerQuant],
    vectors: Mapping[str, torch.dtype],
    *,
    batches: Sequence[Batch],
    inputs: Stream,
    targets: Stream,
    run: RunBlock,
    options: FitOptions,
) -> BlockFit:
    """Fit, and leave the block with the values that were kept.

    Args:
        block: the block with its ternary matrices in place, in float32.
        quants: these matrices, by path.
        vectors: the vectors that may move, and the dtype in which each is stored.
        batches: of the text.
        inputs: the residual stream before the block, as the ternary blocks before give it.
        targets: after it, as the dense model gives it.
        run: how to run it.
        options: how long, how fast.
    """
    before = _error(block, batches, inputs, targets, run)
    start = {name: block.get_parameter(name).detach().clone() for name in vectors}
    weights = {path: _weight_of(block, path).clone() for path in quants}
    if not before > 0:
        return BlockFit(dict(quants), {}, before, before)
    rate = options.rate * before**0.5
    values, scales = _descend(block, quants, start, batches, inputs, targets, run, options, rate)
    new_quants = {path: _with_scales(quant, scales[path]) for path, quant in quants.items()}
    new_vectors = {name: values[name].to(dtype) for name, dtype in vectors.items()}
    for path, quant in new_quants.items():
        put_weight(block, path, quant.reconstruct())
    for name, value in new_vectors.items():
        block.get_parameter(name).data.copy_(value.float())
    after = _error(block, batches, inputs, targets, run)
    if after < before:
        # A small step can round to nothing in bfloat16.
        moved = {n: v for n, v in new_vectors.items() if not torch.equal(v, start[n].to(v.dtype))}
        return BlockFit(new_quants, moved, before, after)
    for path, weight in weights.items():
        _weight_of(block, path).copy_(weight)
    for name, value in start.items():
        block.get_parameter(name).data.copy_(value)
    return BlockFit(dict(quants), {}, before, before)


def put_weight(block: nn.Module, path: str, weights: Tensor) -> None:
    """Put Ŵ [out, in] in place of a layer's weight, whichever way round it holds it."""
    held = _weight_of(block, path)
    held.copy_(weights if held.shape == weights.shape and not _turned(block, path) else weights.T)


def _turned(block: nn.Module, path: str) -> bool:
    return not isinstance(block.get_submodule(path), nn.Linear)  # else transformers' Conv1D


def _weight_of(block: nn.Module, path: str) -> Tensor:
    return block.get_parameter(f"{path}.weight").data


@torch.no_grad()
def _error(
    block: nn.Module, batches: Sequence[Batch], inputs: Stream, targets: Stream, run: RunBlock
) -> float:
    wrong = energy = 0.0
    for batch in batches:
        wanted = targets.read(batch).double()
        found = run(block, batch, inputs.read(batch)).double()
        wrong += float((found - wanted).square().sum())
        energy += float(wanted.square().sum())
    return wrong / energy if energy else 0.0


def _descend(
    block: nn.Module,
    quants: Mapping[str, PerLayerQuant],
    start: Mapping[str, Tensor],
    batches: Sequence[Batch],
    inputs: Stream,
    targets: Stream,
    run: RunBlock,
    options: FitOptions,
    rate: float,
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Adam on factors of the scales and steps of the vectors, each relative to its own size."""
    planes = {path: _Planes.of(quant, _turned(block, path)) for path, quant in quants.items()}
    sizes = {name: value.abs().mean().clamp_min(1e-3) for name, value in start.items()}
    factors = {path: [torch.zeros_like(s) for s in p.scales] for path, p in planes.items()}
    steps = {name: torch.zeros_like(value) for name, value in start.items()}
    moving = [f for of_path in factors.values() for f in of_path] + list(steps.values())
    for tensor in moving:
        tensor.requires_grad_(True)
    if not moving or not batches:
        return dict(start), {path: list(p.scales) for path, p in planes.items()}
    adam = torch.optim.Adam(moving, lr=rate)
    n_steps = options.passes * len(batches)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, n_steps, rate / 20)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.passes):
        for i in torch.randperm(len(batches), generator=generator).tolist():
            batch, wanted = batches[i], targets.read(batches[i])
            given = {f"{path}.weight": p.weights(factors[path]) for path, p in planes.items()}
            given |= {name: start[name] + sizes[name] * step for name, step in steps.items()}
            found = run(_Overridden(block, given), batch, inputs.read(batch))
            error = (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
            adam.zero_grad()
            error.backward()  # type: ignore[no-untyped-call]
            adam.step()
            cosine.step()
    with torch.no_grad():
        values = {name: start[name] + sizes[name] * step for name, step in steps.items()}
        scales = {
            path: [s * (1 + f) for s, f in zip(p.scales, factors[path], strict=True)]
            for path, p in planes.items()
        }
    return values, scales


class _Overridden(nn.Module):
    """A block that runs with other parameters."""

    def __init__(self, block: nn.Module, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "run", lambda *a, **k: functional_call(block, dict(given), a, k))

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.run(*args, **kwargs)  # type: ignore[operator]


@dataclass(frozen=True, slots=True, eq=False)
class _Planes:
    """A matrix as a differentiable function of its scales."""

    trits: list[Tensor]  # float32 [rows, cols]
    scales: list[Tensor]  # float32 [rows or 1, groups]
    offset: Tensor | None
    length: int
    turned: bool

    @classmethod
    def of(cls, quant: PerLayerQuant, turned: bool) -> _Planes:
        units = quant.units
        grid = (1, 1) if quant.per == "tensor" else (units.rows, units.per_row)

        def on_grid(values: object) -> Tensor:
            return torch.from_numpy(np.array(values, dtype=np.float32).reshape(grid))

        trits, scales = [quant.trits.float()], [on_grid(quant.scale)]
        if quant.second_trits is not None and quant.second_scale is not None:
            trits.append(quant.second_trits.float())
            scales.append(on_grid(quant.second_scale))
        length = units.length if quant.per == "group" else units.cols
        offset = None if quant.offset is None else on_grid(quant.offset)
        return cls(trits, scales, offset, length, turned)

    def weights(self, factors: Sequence[Tensor]) -> Tensor:
        total = sum(
            trits * self._spread(scale * (1 + factor), trits.shape[1])
            for trits, scale, factor in zip(self.trits, self.scales, factors, strict=True)
        )
        assert isinstance(total, Tensor)
        if self.offset is not None:
            total = total + self._spread(self.offset, total.shape[1])
        return total.T if self.turned else total

    def _spread(self, values: Tensor, cols: int) -> Tensor:
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.length, dim=1)[:, :cols]


def _with_scales(quant: PerLayerQuant, scales: Sequence[Tensor]) -> PerLayerQuant:
    """The same trits with new scales, rounded; a negative scale turns its trits around."""
    units = quant.units
    planes = [quant.trits, quant.second_trits]
    new_planes: list[Tensor | None] = [None, None]
    new_scales: list[Tensor | None] = [None, None]
    for i, values in enumerate(scales):
        flat = values.reshape(-1).double().numpy()
        rounded = round_scales(
            np.abs(flat), quant.scale_dtype or "float32", quant.name, np.arange(units.count)
        )
        signs = np.where(flat < 0, -1, 1).astype(np.int8)
        plane = planes[i]
        assert plane is not None
        spread = _signs(signs, quant)
        new_planes[i], new_scales[i] = plane * spread, torch.from_numpy(rounded)
    first = new_planes[0]
    assert first is not None and new_scales[0] is not None
    made = PerLayerQuant.from_trits(
        first,
        new_scales[0],
        quant.name,
        group_size=quant.group_size,
        per=quant.per,
        offset=quant.offset,
        second_trits=new_planes[1],
        second_scale=new_scales[1],
        rule=quant.rule,
        scale_dtype=quant.scale_dtype,
    )
    return replace(made, zeroed_units=quant.zeroed_units)


def _signs(signs: np.ndarray[tuple[int], np.dtype[np.int8]], quant: PerLayerQuant) -> Tensor:
    """One sign for each weight, or something that broadcasts to it."""
    units = quant.units
    if quant.per == "tensor":
        return torch.tensor(int(signs[0]), dtype=torch.int8)
    grid = torch.from_numpy(signs.reshape(units.rows, units.per_row))
    if units.per_row == 1:
        return grid
    return grid.repeat_interleave(units.length, dim=1)[:, : units.cols]
