"""Tuned lens by least squares: per layer an affine map to where the last layer's stream lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.analysis.lenses.logit_lens import same_model
from trilens.analysis.lenses.moments import Moments, fitted, squared_errors
from trilens.caches.activation import FullActivationCache
from trilens.caches.storage import spell_layers
from trilens.errors import (
    AbsentLayerError,
    CorruptFileError,
    IncomparableError,
    NonFiniteError,
    NotStoredError,
    TextError,
    UsageError,
    ValueRangeError,
)
from trilens.io.paths import as_path
from trilens.io.tensors import read_tensors, write_tensors
from trilens.io.typed import typed
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.lens.parts import ModelInfo
from trilens.numbers import at_least
from trilens.results import Tabular

__all__ = ["TunedLens", "tuned_lens"]

_FORMAT = "trilens.tuned_lens"
_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TunedLens(Tabular):
    """One affine map per layer: residual → residual · (I + change) + bias.

    Errors are shares of the last layer's variance that a map leaves unexplained: 0 is exact, 1 no
    better than the mean.

    Attributes:
        layers: those that have a map; the last layer needs none.
        changes: float32 [layers, d_model, d_model], on the CPU.
        biases: float32 [layers, d_model].
        held_out_errors: per layer, on tokens that no map was fitted to, in [0, Inf).
        fitted_errors: per layer, on those it was fitted to.
        untranslated_errors: per layer, of the residual stream as it is, on the held-out tokens.
        n_tokens: that the maps were fitted to.
        n_held_out: that they were measured on.
        ridge: see `tuned_lens`.
        model: which model it is for.
    """

    layers: tuple[int, ...]
    changes: Tensor
    biases: Tensor
    held_out_errors: tuple[float, ...]
    fitted_errors: tuple[float, ...]
    untranslated_errors: tuple[float, ...]
    n_tokens: int
    n_held_out: int
    ridge: float
    model: ModelInfo

    def __repr__(self) -> str:
        return (
            f"TunedLens({len(self.layers)} layers of {self.model.model_class}, {self.n_tokens} "
            f"tokens, held-out errors up to {max(self.held_out_errors):.2g})"
        )

    def check(self, lens: Lens) -> None:
        """Refuse another model.

        Raises:
            IncomparableError: the model's class, its layers or its width differ.
        """
        same_model(self.model, lens, "tuned lens")

    def translate(self, layer: int, residual: Tensor) -> Tensor:
        """A residual stream as the last layer would have it, in its own dtype and place.

        Shapes: [..., d_model] → [..., d_model]

        Raises:
            AbsentLayerError: a layer without a map.
        """
        if layer == self.model.n_layers - 1:
            return residual
        if layer not in self.layers:
            raise AbsentLayerError(
                f"layer {layer} has no map in this tuned lens: it has "
                f"{spell_layers(self.layers)}; fit it to captures that hold the layer"
            )
        i = self.layers.index(layer)
        wide = torch.promote_types(residual.dtype, torch.float32)
        values = residual.to(wide)
        change = self.changes[i].to(values.device, wide)
        moved = values + values @ change + self.biases[i].to(values.device, wide)
        return moved.to(residual.dtype)

    def table(self) -> list[dict[str, Any]]:
        """One row for each layer."""
        return [
            {
                "layer": layer,
                "held_out_error": self.held_out_errors[i],
                "fitted_error": self.fitted_errors[i],
                "untranslated_error": self.untranslated_errors[i],
            }
            for i, layer in enumerate(self.layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps, as plain values."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "n_tokens": self.n_tokens,
            "n_held_out": self.n_held_out,
            "ridge": self.ridge,
            "model": self.model.to_dict(),
            "rows": self.table(),
        }

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all, with a hash of its bytes.

        Raises:
            UsageError: the folder does not exist, or the path is a folder.
            WriteError: the file can't be written.
        """
        tensors = {"changes": self.changes, "biases": self.biases}
        return write_tensors(as_path(path), tensors, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ModelNotFoundError: no such file.
            CorruptFileError: no tuned lens, of another version, or damaged.
        """
        tensors, manifest = read_tensors(as_path(path), _FORMAT, _VERSION)
        try:
            rows = manifest["rows"]
            found = cls(
                layers=tuple(int(row["layer"]) for row in rows),
                changes=tensors["changes"],
                biases=tensors["biases"],
                held_out_errors=_errors(rows, "held_out_error"),
                fitted_errors=_errors(rows, "fitted_error"),
                untranslated_errors=_errors(rows, "untranslated_error"),
                n_tokens=int(manifest["n_tokens"]),
                n_held_out=int(manifest["n_held_out"]),
                ridge=float(manifest["ridge"]),
                model=typed(ModelInfo, manifest["model"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"{path} is not a whole tuned lens: {type(error).__name__}: {error}; fit it again"
            ) from error
        n, d = len(found.layers), found.model.d_model
        for name, shape in (("changes", (n, d, d)), ("biases", (n, d))):
            held = tensors[name]
            if (tuple(held.shape), held.dtype) != (shape, torch.float32):
                raise CorruptFileError(
                    f"{path} is not a whole tuned lens: {name} is {list(held.shape)} of "
                    f"{held.dtype}, not {list(shape)} of float32; fit it again"
                )
        return found


def tuned_lens(
    captures: Iterable[Capture],
    *,
    ridge: float = 1e-4,
    held_out_every: int = 5,
    skip: int = 0,
) -> TunedLens:
    """Fit a tuned lens to the residual streams of captures, each read once.

    Per layer it solves least squares for what the later blocks add, y − x, from centred x: with
    covariances C, change = (Cxx + ridge · mean(diag Cxx) · I)⁻¹ Cx(y−x), in float64. The ridge
    pulls towards the logit lens, a change of 0. Squared distances become small, not the KL itself.

    Args:
        captures: with residual="all", such as `lens.capture_many(prompts, residual="all",
            logits=None)`.
        ridge: λ, relative to the mean variance of the layer's stream: 0 or more.
        held_out_every: every n-th capture is kept out of the fit, and measured; 2 or more.
        skip: tokens at each prompt's start that are left out: 1 where a first token takes
            everyone's attention and has a stream of another size.

    Raises:
        NotStoredError: a capture without the residual of all tokens, or without the last layer.
        IncomparableError: captures of different models, or of different layers.
        TextError: fewer tokens to fit to than a map has rows (d_model + 1), or less than 2 held
            out.
        NonFiniteError: a residual stream with NaN or Inf, or a system that has no solution.
        ValueRangeError: an option outside its range.

    Memory
        Float64 moments: 32 · d_model² bytes per layer (0.5 GB at 4,096); maps: 4 · d_model².

    Source: affine translators of Belrose et al., arXiv 2303.08112, there trained on the KL
        divergence.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueRangeError(f"ridge {ridge} is out of range: a finite number, 0 or more")
    every = at_least(2, held_out_every, "held_out_every")
    first = at_least(0, skip, "skip")
    if isinstance(captures, Capture):
        raise UsageError("captures is one Capture: give a list, of which some are held out")
    info: ModelInfo | None = None
    held: tuple[int, ...] = ()
    moments: list[tuple[Moments, Moments]] = []
    for number, cap in enumerate(captures):
        streams = _streams(cap, number)
        if info is None:
            info, held = cap.model, cap.residual.layers
            moments = [(Moments(info.d_model), Moments(info.d_model)) for _ in held[:-1]]
        elif (cap.model, cap.residual.layers) != (info, held):
            raise IncomparableError(
                f"capture {number} is of another model than those before, or of other layers: give "
                "captures of one model"
            )
        out = number % every == every - 1
        last = streams[-1][first:]
        for i, stream in enumerate(streams[:-1]):
            if len(last) and not moments[i][out].add(stream[first:], last):
                raise NonFiniteError(
                    f"capture {number} has NaN or Inf in the residual stream of layer {held[i]} or "
                    f"{held[-1]}: load the model in another dtype"
                )
    return _solved(info, held, moments, ridge)


def _errors(rows: list[dict[str, Any]], name: str) -> tuple[float, ...]:
    # JSON has no infinity: null stands for it.
    return tuple(math.inf if row[name] is None else float(row[name]) for row in rows)


def _streams(cap: Capture, number: int) -> list[Tensor]:
    residual = cap.residual
    if not isinstance(residual, FullActivationCache):
        raise NotStoredError(
            f"capture {number} holds the last token alone: capture with residual='all'"
        )
    last = cap.model.n_layers - 1
    if last not in residual.layers or len(residual.layers) < 2:
        raise NotStoredError(
            f"capture {number} holds {spell_layers(residual.layers)}: the last layer, {last}, and "
            "another one are needed"
        )
    return [residual.readout(layer) for layer in residual.layers]


def _solved(
    info: ModelInfo | None,
    held: tuple[int, ...],
    moments: list[tuple[Moments, Moments]],
    ridge: float,
) -> TunedLens:
    n_fit, n_out = (moments[0][0].n, moments[0][1].n) if moments else (0, 0)
    needed = (info.d_model if info is not None else 0) + 1
    if info is None or n_fit < needed or n_out < 2:
        raise TextError(
            f"captures hold {n_fit} tokens to fit to and {n_out} held out: at least {needed} "
            "(d_model + 1) and 2 are needed; give more prompts, or longer ones"
        )
    changes, biases, errors = [], [], []
    for layer, (fit, out) in zip(held[:-1], moments, strict=True):
        change, bias = fitted(fit, ridge)
        if not bool(change.isfinite().all()):
            raise NonFiniteError(
                f"layer {layer} has no unique map: its stream does not vary in every direction; "
                "give a ridge above 0"
            )
        changes.append(change.float().cpu())
        biases.append(bias.float().cpu())
        still = torch.zeros_like(change), torch.zeros_like(bias)
        maps = ((out, change, bias), (fit, change, bias), (out, *still))
        errors.append([squared_errors(*each) for each in maps])
    held_out, on_fit, untranslated = zip(*errors, strict=True)
    return TunedLens(
        layers=held[:-1],
        changes=torch.stack(changes),
        biases=torch.stack(biases),
        held_out_errors=held_out,
        fitted_errors=on_fit,
        untranslated_errors=untranslated,
        n_tokens=n_fit,
        n_held_out=n_out,
        ridge=float(ridge),
        model=info,
    )
