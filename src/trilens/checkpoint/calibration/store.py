"""What a calibration has finished, on disk after each block, so that a killed run goes on there.

One safetensors file for each block holds its packed matrices and new vectors; a JSON file beside
it, written last, marks the block as complete and holds what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trilens.errors import CorruptFileError, TrilensError, WriteError
from trilens.io.atomic import write_bytes
from trilens.io.guarded import sha256_of
from trilens.io.sealed import read_sealed, sealed
from trilens.io.temporary import sweep
from trilens.io.tensors import write_safetensors
from trilens.ternary.calibrated.rules import levels_of
from trilens.ternary.codecs.rows import unpack_rows
from trilens.ternary.packed.linear import Packed
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["BlockRecord", "EndToEndRecord", "MatrixRecord", "Store"]

_TENSORS_HASH = "tensors_sha256"
_STREAMS = "streams"


@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """How one matrix was coded.

    Attributes:
        name: The stored tensor's.
        expert: Its number among the matrices of one tensor.
        rule: The rule that made it.
        reason: Why another rule than the plan's was taken, or "".
        output_error: Σ‖Ŵx − y‖²/Σ‖y‖² on the calibration text; None where no input was seen.
        output_error_held_out: The same on the text set apart; None in records without it.
        damping: What was added to the Hessian's diagonal, of its mean.
        n_tokens: Inputs seen.
        dead_channels: Input channels that were always 0.
        changes: Trits changed by coordinate descent.
        was_ternary: It was ternary already.
        zeroed_units: As in `PerLayerQuant`.
    """

    name: str
    expert: int
    rule: str
    reason: str = ""
    output_error: float | None = None
    damping: float | None = None
    n_tokens: int = 0
    dead_channels: int = 0
    changes: int = 0
    was_ternary: bool = False
    zeroed_units: int = 0
    output_error_held_out: float | None = None


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What was measured of a finished block.

    Attributes:
        index: Its number.
        matrices: Its coded matrices.
        vectors: Stored tensors that have new values.
        error_before_fit: Relative error of its output over the text, before the fit of vectors
            and scales; None where nothing was fitted.
        error: The same at the end.
    """

    index: int
    matrices: tuple[MatrixRecord, ...]
    vectors: tuple[str, ...]
    error_before_fit: float | None
    error: float


@dataclass(frozen=True, slots=True)
class EndToEndRecord:
    """What was measured of the end-to-end fit.

    Attributes:
        matrices: Matrices with new scales: tensor name and expert.
        vectors: Stored tensors that have new values.
        kl_nats_before: Mean divergence of the next token on text held out of the fit, before.
        kl_nats: The same after.
        trit_changes: Trits that are others; 0 in records without it.
    """

    matrices: tuple[tuple[str, int], ...]
    vectors: tuple[str, ...]
    kl_nats_before: float
    kl_nats: float
    trit_changes: int = 0


class Store:
    """A directory of finished blocks.

    Args:
        folder: made where it is missing.

    Raises:
        CorruptFileError: a finished block's files do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(exist_ok=True)
            sweep(folder)
        except OSError as cause:
            raise WriteError(f"{folder} cannot be made: {cause.strerror or cause}") from cause
        self.records: list[BlockRecord] = []
        self._streams: dict[str, str] = {}  # of the last block
        while self._json(len(self.records)).is_file():
            self.records.append(self._read(len(self.records)))
        self.whole = self._read_whole()

    def add(
        self,
        record: BlockRecord,
        quants: Mapping[tuple[str, int], PerLayerQuant],
        vectors: Mapping[str, Tensor],
        streams: Mapping[str, str],
    ) -> None:
        """Keep a finished block.

        Args:
            record: what was measured.
            quants: its matrices, by tensor name and expert.
            vectors: new values, by tensor name, in the dtype in which they are stored.
            streams: hash of each file that the next block reads, by its name.
        """
        values = {**asdict(record), _STREAMS: dict(streams)}
        self._keep(self._tensors(record.index), self._json(record.index), values, quants, vectors)
        self.records.append(record)

    def finish(
        self,
        kl_nats: tuple[float, float],
        quants: Mapping[tuple[str, int], PerLayerQuant],
        vectors: Mapping[str, Tensor],
        *,
        trit_changes: int = 0,
    ) -> None:
        """Keep what the fit of all blocks together found: it goes before what the blocks say."""
        record = EndToEndRecord(
            tuple(sorted(quants)), tuple(sorted(vectors)), *kl_nats, trit_changes
        )
        self._keep(self._whole("safetensors"), self._whole("json"), asdict(record), quants, vectors)
        self.whole = record

    def _keep(
        self,
        tensors: Path,
        text: Path,
        values: dict[str, Any],
        quants: Mapping[tuple[str, int], PerLayerQuant],
        vectors: Mapping[str, Tensor],
    ) -> None:
        digest = write_safetensors(tensors, _tensors_of(quants, vectors), {})
        write_bytes(text, sealed({**values, _TENSORS_HASH: digest}))

    def _values(self, tensors: Path, text: Path) -> dict[str, Any]:
        """A record's values; its tensors are as they were written."""
        values, hashed = read_sealed(text, required=False)  # older ones have no hash
        digest = values.pop(_TENSORS_HASH, None)
        if (digest is not None) != hashed or (hashed and sha256_of(tensors) != digest):
            raise CorruptFileError(f"{tensors} is damaged: begin in a new directory")
        return values

    def check_streams(self) -> None:
        """Refuse to go on with streams that are not as they were written.

        Raises:
            CorruptFileError: names the file.
        """
        for name, digest in self._streams.items():
            path = self.folder / Path(name).name
            if sha256_of(path) != digest:
                raise CorruptFileError(f"{path} is damaged: begin in a new directory")

    def vector(self, name: str) -> Tensor | None:
        """The new value of a stored tensor, or None where it keeps its own."""
        if self.whole is not None and name in self.whole.vectors:
            return _vector(self._whole("safetensors"), name)
        for record in self.records:
            if name in record.vectors:
                return _vector(self._tensors(record.index), name)
        return None

    def quant(
        self, name: str, expert: int, cols: int, plan: Any
    ) -> tuple[PerLayerQuant, MatrixRecord] | None:
        """A coded matrix as it was, and what was measured of it.

        Args:
            name: the stored tensor's.
            expert: its number among the matrices of one tensor.
            cols: its columns.
            plan: what it was coded by.

        Returns:
            None where there is no such matrix.

        Raises:
            CorruptFileError: its block's file does not hold it.
        """
        for record in self.records:
            for matrix in record.matrices:
                if (matrix.name, matrix.expert) == (name, expert):
                    fitted = self.whole is not None and (name, expert) in self.whole.matrices
                    path = self._whole("safetensors") if fitted else self._tensors(record.index)
                    return self._quant(path, matrix, cols, plan), matrix
        return None

    def whole_matrix(
        self, name: str, cols: int, plan: Any
    ) -> tuple[PerLayerQuant, MatrixRecord] | None:
        """The matrix of a stored tensor of rank 2, also where several layers hold its rows.

        Args, raises: as `quant`.
        """
        found = {m.expert for record in self.records for m in record.matrices if m.name == name}
        parts = [self.quant(name, i, cols, plan) for i in range(len(found))]
        each = [part for part in parts if part is not None]
        if len(each) < 2:
            return each[0] if each else None
        first = each[0][1]
        reason = next((record.reason for _, record in each if record.reason), "")
        return _joined(name, [quant for quant, _ in each]), replace(
            first, reason=reason, output_error=None, output_error_held_out=None
        )

    def _quant(self, path: Path, matrix: MatrixRecord, cols: int, plan: Any) -> PerLayerQuant:
        end = f"/{matrix.expert}/{matrix.name}"
        try:
            with safe_open(path, "pt") as file:
                names = [key for key in file.keys() if key.endswith(end)]  # noqa: SIM118
                parts = {key.removesuffix(end): file.get_tensor(key) for key in names}
            second = parts.get("second_codes")
            made = PerLayerQuant.from_trits(
                unpack_rows(parts["codes"], cols).contiguous(),
                parts["scale"],
                matrix.name,
                group_size=plan.group_size,
                per=plan.per,
                offset=parts.get("offset"),
                second_trits=None if second is None else unpack_rows(second, cols).contiguous(),
                second_scale=parts.get("second_scale"),
                rule=matrix.rule,
                scale_dtype=plan.scale_dtype,
                levels=levels_of(matrix.rule),
            )
        except (OSError, KeyError, ValueError, TrilensError) as cause:
            raise CorruptFileError(f"{path} does not hold {matrix.name}: {cause}") from cause
        return replace(made, was_ternary=matrix.was_ternary, zeroed_units=matrix.zeroed_units)

    def _read(self, index: int) -> BlockRecord:
        values = self._values(self._tensors(index), self._json(index))
        streams = values.pop(_STREAMS, {})
        self._streams = streams if isinstance(streams, dict) else {}
        try:
            matrices = tuple(MatrixRecord(**matrix) for matrix in values["matrices"])
            rest = {**values, "matrices": matrices, "vectors": tuple(values["vectors"])}
            record = BlockRecord(**rest)
        except (KeyError, TypeError) as cause:
            raise CorruptFileError(f"{self._json(index)} is no record of a block") from cause
        if not self._tensors(index).is_file():
            raise CorruptFileError(f"{self._tensors(index)} is missing: begin in a new directory")
        return record

    def _read_whole(self) -> EndToEndRecord | None:
        path = self._whole("json")
        if not path.is_file():
            return None
        values = self._values(self._whole("safetensors"), path)
        try:
            matrices = tuple((str(name), int(expert)) for name, expert in values["matrices"])
            rest = {**values, "matrices": matrices, "vectors": tuple(values["vectors"])}
            return EndToEndRecord(**rest)
        except (KeyError, TypeError, ValueError) as cause:
            raise CorruptFileError(f"{path} is no record of a fit") from cause

    def _whole(self, ending: str) -> Path:
        return self.folder / f"whole.{ending}"

    def _json(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _tensors(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def _joined(name: str, parts: Sequence[PerLayerQuant]) -> PerLayerQuant:
    """One matrix of the rows of several that were coded alike, with scales in each row."""
    trits, scales, offsets, second_trits, second_scales = (
        [getattr(part, field) for part in parts]
        for field in ("trits", "scale", "offset", "second_trits", "second_scale")
    )
    first = parts[0]

    def flat(values: list[Any]) -> Tensor | None:
        if any(value is None for value in values):
            return None
        return torch.cat([torch.as_tensor(value).reshape(-1) for value in values])

    scale = flat(scales)
    assert scale is not None
    made = PerLayerQuant.from_trits(
        torch.cat(trits),
        scale,
        name,
        group_size=first.group_size,
        per=first.per,
        offset=flat(offsets),
        second_trits=None if first.second_trits is None else torch.cat(second_trits),
        second_scale=flat(second_scales),
        rule=first.rule,
        scale_dtype=first.scale_dtype,
        levels=first.levels,
    )
    return replace(
        made,
        was_ternary=all(part.was_ternary for part in parts),
        zeroed_units=sum(part.zeroed_units for part in parts),
    )


def _tensors_of(
    quants: Mapping[tuple[str, int], PerLayerQuant], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    tensors = {f"vector/{name}": value.contiguous() for name, value in vectors.items()}
    for (name, expert), quant in quants.items():
        for part, tensor in Packed.of(quant).parts.items():
            tensors[f"{part}/{expert}/{name}"] = tensor.contiguous()
    return tensors


def _vector(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        found: Tensor = file.get_tensor(f"vector/{name}")
        return found
