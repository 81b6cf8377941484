"""`compare_series`: several checkpoints of a run, each against the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.run import CompareOptions, as_lens, compare
from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError
from trilens.io.atomic import write_bytes
from trilens.io.json import json_bytes, read_json
from trilens.io.messages import other_version
from trilens.lens.lens import Lens
from trilens.models.encoded import each_prompt
from trilens.models.tokens import PromptLike
from trilens.progress import Progress, Step
from trilens.results import Tabular

__all__ = ["ComparisonSeries", "compare_series"]

_FORMAT = "trilens.comparison_series"
_VERSION = 1
_MANIFEST = "series.json"
_ONCE = ("perplexity", "nll_nats", "kl_nats_mean", "same_top1")
_MEANS = ("cosine", "relative_error", "js_nats", "state_cosine", "state_relative_error")


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonSeries(Tabular):
    """Checkpoints in order, each compared with the first on the same tokens.

    Attributes:
        comparisons: one for each checkpoint after the first; `before` is always the first.
    """

    comparisons: tuple[Comparison, ...]

    def __repr__(self) -> str:
        first = self.comparisons[0]
        return (
            f"ComparisonSeries({first.before.model_class}: {len(self.comparisons)} checkpoints "
            f"against the first, {first.n_prompts} prompts, {first.n_tokens} tokens)"
        )

    def table(self) -> list[dict[str, Any]]:
        """One row for each checkpoint after the first.

        `step` counts from 1; perplexity, nll_nats, kl_nats_mean and same_top1 are the value after;
        cosine, relative_error, js_nats, state_cosine and state_relative_error are means over
        layers (and heads); None where a model has no such thing.
        """
        rows = []
        for step, found in enumerate(self.comparisons, start=1):
            row: dict[str, Any] = {"step": step, "model": found.after.name}
            for metric in _ONCE:
                rest = found.select(metric)
                row[metric] = rest[0].after if rest else None
            for metric in _MEANS:
                values = [each.after for each in found.select(metric)]
                row[metric] = float(np.mean(values)) if values else None
            lost = sum(change.lost for change in found.role_changes)
            row |= {"roles_lost": lost, "roles_gained": len(found.role_changes) - lost}
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The series without arrays, as JSON can hold it: each comparison's own `to_dict`."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "comparisons": [found.to_dict() for found in self.comparisons],
        }

    def save(self, path: str | Path) -> Path:
        """Write a folder with one folder for each comparison: ``1``, ``2`` …

        The manifest is written last: a folder without one is not whole.

        Returns:
            The folder.

        Raises:
            UsageError: the path is a file.
            WriteError: a file can't be written.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file: name a folder")
        names = [str(step) for step in range(1, len(self.comparisons) + 1)]
        for name, found in zip(names, self.comparisons, strict=True):
            found.save(folder / name)
        manifest = {"format": _FORMAT, "version": _VERSION, "folders": names}
        write_bytes(folder / _MANIFEST, json_bytes(manifest))
        return folder

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; nothing in the files is executed.

        Raises:
            ModelNotFoundError: no such folder, or one without a manifest.
            CorruptFileError: damaged, of another kind or of another version.
        """
        file = Path(path) / _MANIFEST
        if not file.is_file():
            raise ModelNotFoundError(f"{path} is no saved series: it has no {_MANIFEST}")
        manifest = read_json(file, CorruptFileError)
        names = manifest.get("folders")
        if manifest.get("format") != _FORMAT:
            raise CorruptFileError(f"{file} is no {_FORMAT}")
        if manifest.get("version") != _VERSION:
            found = manifest.get("version")
            raise CorruptFileError(other_version(f"{file} is {_FORMAT}", found, _VERSION))
        if not isinstance(names, list) or names != [str(i + 1) for i in range(len(names))]:
            raise CorruptFileError(f"{file} does not name the folders 1, 2 …")
        if not names:
            raise CorruptFileError(f"{file} names no comparison")
        return cls(tuple(Comparison.load(Path(path) / name) for name in names))


def compare_series(
    models: Sequence[Lens | str | Path],
    prompts: Iterable[PromptLike],
    *,
    options: CompareOptions | None = None,
    progress: Progress | None = None,
) -> ComparisonSeries:
    """Compare each checkpoint of a run with the first, on the same tokens.

    Args:
        models: at least two lenses, directories or hub ids, in the order of the run. A directory
            or hub id is loaded when its turn comes, and let go after it.
        prompts: as `compare`.
        options: as `compare`.
        progress: called after every batch; the total is that of all steps.

    Returns:
        A frozen series: one `Comparison` per checkpoint after the first.

    Raises:
        UsageError: fewer than two models, or one path for several.
        IncomparableError, EmptyPromptError, NonFiniteError, PromptError, LoadError, AnatomyError:
            as `compare`.

    Memory
        The first model and one more at a time; of the results as `Comparison`.
    """
    if isinstance(models, str | Path) or not isinstance(models, Sequence):
        raise UsageError(f"models is one {type(models).__name__}: give a list of two or more")
    if len(models) < 2:
        raise UsageError(f"models has {len(models)} entries: a series needs two or more")
    if isinstance(prompts, Iterable) and not isinstance(prompts, str):
        prompts = tuple(each_prompt(prompts))
    first = as_lens(models[0])
    n = len(models) - 1
    found = []
    for i, model in enumerate(models[1:]):
        report = None if progress is None else _shifted(progress, i, n)
        found.append(compare(first, model, prompts, options=options, progress=report))
    return ComparisonSeries(tuple(found))


def _shifted(progress: Progress, index: int, n: int) -> Progress:
    """The progress of one step as a part of all of them."""

    def report(step: Step) -> None:
        what = f"checkpoint {index + 1} of {n}: {step.what}"
        total = n * step.total
        progress(replace(step, done=index * step.total + step.done, total=total, what=what))

    return report
