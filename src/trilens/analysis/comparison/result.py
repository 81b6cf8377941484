"""`Comparison`: everything that was found between two models, frozen, as one long-form table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from trilens.analysis.comparison.heads import RoleChange
from trilens.analysis.comparison.rows import METRICS, Row
from trilens.analysis.comparison.saving import FORMAT, VERSION, read_folder, write_folder
from trilens.errors import CorruptFileError, NotStoredError, UsageError
from trilens.io.messages import clip
from trilens.io.paths import as_path
from trilens.io.typed import checked, typed
from trilens.lens.parts import ModelInfo
from trilens.results import Tabular

__all__ = ["Comparison", "NamedArray"]


@dataclass(frozen=True, slots=True, eq=False)
class NamedArray:
    """A tensor whose axes have names, one per dimension."""

    axes: tuple[str, ...]
    tensor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Comparison(Tabular):
    """Two models on the same tokens: what differs in output and internals.

    Every number stands in a row (layer, module, head, metric, before, after, delta). Of a quantity
    that each model has, before and after are the two values; of a divergence between the two,
    `before` is what the model before gives against itself (0, or 1 for a cosine or a share that
    agrees), so that `delta` is exactly 0 everywhere where the models are equal. `rows.METRICS`
    states what each metric is.

    Attributes:
        before: which model it was.
        after: likewise.
        n_prompts: prompts that both read.
        n_tokens: their tokens.
        options: what was asked, as JSON values.
        rows: the table.
        role_changes: heads that gained or lost a role.
        arrays: what is too long for rows, with named axes: the KL of each token, the average
            openness of each unit, the convergence layer of each position.
        notes: what could not be compared, in words.
        block_length: tokens of the longest prompt, on which a perplexity depends; None in files
            that lack it.
        hash_checked: of a comparison that was loaded: its files fit their hashes; False for one
            from before there were hashes. None for one that was not loaded.
    """

    before: ModelInfo
    after: ModelInfo
    n_prompts: int
    n_tokens: int
    options: Mapping[str, Any]
    rows: tuple[Row, ...]
    role_changes: tuple[RoleChange, ...]
    arrays: Mapping[str, NamedArray]
    notes: tuple[str, ...]
    hash_checked: bool | None = None
    block_length: int | None = None

    def __repr__(self) -> str:
        return (
            f"Comparison({self.before.model_class} and {self.after.model_class}: "
            f"{self.n_prompts} prompts, {self.n_tokens} tokens, {len(self.rows)} rows, "
            f"{len(self.role_changes)} role changes)"
        )

    def table(self) -> list[dict[str, Any]]:
        """One dict per row: layer, module, head, metric, before, after, delta."""
        return [asdict(row) for row in self.rows]

    def select(
        self, metric: str, *, layer: int | None = None, module: str | None = None
    ) -> list[Row]:
        """The rows of a metric, of one layer or module where they are named.

        Raises:
            UsageError: there is no such metric.
        """
        if metric not in METRICS:
            raise UsageError(f"metric {metric!r} is none of {', '.join(METRICS)}")
        return [
            row
            for row in self.rows
            if row.metric == metric
            and (layer is None or row.layer == layer)
            and (module is None or row.module == module)
        ]

    def row(self, metric: str) -> Row:
        """The one row of a metric that is there once, such as `kl_nats_mean`.

        Raises:
            UsageError: there is no such metric, or it has several rows.
            NotStoredError: this comparison has no row of it.
        """
        found = self.select(metric)
        if not found:
            raise NotStoredError(f"metric {metric!r} was not measured: {METRICS[metric]}")
        if len(found) > 1:
            raise UsageError(f"metric {metric!r} has {len(found)} rows: ask select()")
        return found[0]

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame; layer and head are nullable integers.

        Raises:
            UsageError: pandas is not installed.
        """
        frame = Tabular.to_pandas(self).reindex(columns=[field.name for field in fields(Row)])
        return frame.astype({"layer": "Int64", "head": "Int64"})

    def save(self, path: str | Path) -> Path:
        """Write a folder: the table (Parquet), the arrays (safetensors), a manifest (JSON).

        The manifest is written last: a folder without one is incomplete. A comparison that is there
        already stays until the new one is complete.

        Returns:
            The folder.

        Raises:
            UsageError: the path is a file, or a folder that holds something else.
            WriteError: a file can't be written, or another run writes a comparison here.
        """
        folder = as_path(path, "folder")
        axes = {name: list(array.axes) for name, array in self.arrays.items()}
        manifest = {**self.to_dict(), "axes": axes}
        del manifest["table"]
        tensors = {name: array.tensor for name, array in self.arrays.items()}
        write_folder(folder, self.rows, tensors, manifest)
        return folder

    def to_dict(self) -> dict[str, Any]:
        """The comparison without its arrays, as JSON can hold it.

        JSON has no infinity: null stands for what is not finite, here and in every file of JSON.
        """
        return {
            "format": FORMAT,
            "version": VERSION,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "n_prompts": self.n_prompts,
            "n_tokens": self.n_tokens,
            "block_length": self.block_length,
            "options": dict(self.options),
            "role_changes": [asdict(each) for each in self.role_changes],
            "notes": list(self.notes),
            "table": [{name: _plain(value) for name, value in row.items()} for row in self.table()],
        }

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; nothing in the files is executed.

        Raises:
            ModelNotFoundError: no such folder, or one without a manifest.
            CorruptFileError: damaged, of another kind or of another version.
        """
        folder = as_path(path, "folder")
        manifest, rows, tensors, hash_checked = read_folder(folder)
        try:
            arrays = {
                name: _named(axes, tensors[name])
                for name, axes in checked(manifest["axes"], dict, "axes").items()
            }
            return cls(
                before=typed(ModelInfo, manifest["before"]),
                after=typed(ModelInfo, manifest["after"]),
                n_prompts=checked(manifest["n_prompts"], int, "n_prompts"),
                n_tokens=checked(manifest["n_tokens"], int, "n_tokens"),
                options=MappingProxyType(checked(manifest["options"], dict, "options")),
                rows=rows,
                role_changes=tuple(typed(RoleChange, each) for each in manifest["role_changes"]),
                arrays=MappingProxyType(arrays),
                notes=tuple(
                    checked(each, str, "a note")
                    for each in checked(manifest["notes"], list, "notes")
                ),
                hash_checked=hash_checked,
                block_length=manifest.get("block_length"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{folder} is not a whole comparison: {error}") from error


def _named(axes: Any, tensor: Tensor) -> NamedArray:
    names = tuple(checked(each, str, "an axis") for each in checked(axes, list, "axes"))
    if len(names) != tensor.ndim:
        raise TypeError(f"an array of {tensor.ndim} dimensions has the axes {clip(axes)}")
    return NamedArray(names, tensor)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
