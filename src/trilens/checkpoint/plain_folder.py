"""A ternary checkpoint written anew in a layout that transformers loads without trilens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from trilens.checkpoint.auxiliary_files import origin_of, weight_index
from trilens.checkpoint.coding import Entry
from trilens.checkpoint.coding import planned as plan_of
from trilens.checkpoint.format.model_card import Origin
from trilens.checkpoint.format.names import CARD_NAME, CONFIG_NAME, DENSE_NAME, SOURCE_CARD_NAME
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.format.shards import ShardWriter
from trilens.checkpoint.format.skeleton import Choice
from trilens.checkpoint.job import Job
from trilens.errors import UsageError
from trilens.io.atomic import atomic_folder, write_bytes
from trilens.io.guarded import read_bytes
from trilens.io.json import json_bytes
from trilens.io.listed_folder import write_list
from trilens.io.safetensors_header import TensorHeader
from trilens.progress import Progress, Step

__all__ = ["PlainLayout", "write_folder"]

_Todo = list[tuple[Choice, TensorHeader, list[Entry]]]


class PlainLayout(Protocol):
    """What a coded matrix becomes, and what is said of it."""

    @property
    def kind(self) -> str:
        """What the manifest calls the folder."""

    @property
    def needs(self) -> str:
        """What the source is asked for, in an error: "to make dense"."""

    def entries(self, choice: Choice, header: TensorHeader) -> list[Entry]:
        """The tensors that a matrix becomes."""

    def write(self, report: TensorReport, choice: Choice, writer: ShardWriter) -> TensorReport:
        """Write a matrix, and say what was measured."""

    def settings(self) -> dict[str, Any]:
        """What config.json gets beside the source's own settings."""

    def card(self, report: TernaryReport, origin: Origin) -> str:
        """The text of README.md."""


def write_folder(
    job: Job,
    out: Path,
    layout: PlainLayout,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> TernaryReport:
    """Write a checkpoint whose coded matrices have another layout.

    Args:
        job: a ternary checkpoint.
        out: a new directory, written whole or not at all.
        layout: what its matrices become.
        dry_run: report what would be written.
        progress: called with each tensor.

    Raises:
        UsageError: the source is not ternary, or the directory is not empty.
        WriteError: it cannot be written.
    """
    if job.packed is None:
        raise UsageError(
            f"{job.source.name} has no packed weights {layout.needs}: ternarize it into a "
            "directory first, and give that directory"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no empty directory: give a new one")
    todo = [(c, h, _entries(layout, c, h)) for c, h in job.pairs]
    reports: list[TensorReport] = []
    if dry_run:
        reports = [_planned(job, c, h, entries) for c, h, entries in todo]
        return TernaryReport(job.plan, tuple(reports), dry_run=True, note=job.note)
    with atomic_folder(out) as folder:
        for file in job.source.files:
            mine = [each for each in todo if each[1].file == file]
            names = [entry for *_, entries in mine for entry in entries]
            with ShardWriter(folder / file.name, names) as writer:
                for choice, header, entries in mine:
                    planned = _planned(job, choice, header, entries)
                    reports.append(_write(job, layout, planned, choice, header, writer))
                    if progress is not None:
                        progress(Step(len(reports), len(todo), choice.name))
                writer.commit()
        found = TernaryReport(job.plan, tuple(reports), note=job.note)
        for name, data in _small_files(job, layout, found, todo).items():
            write_bytes(folder / name, data)
        job.source.check_unchanged()
        write_list(folder, DENSE_NAME, layout.kind)
    return found


def _write(
    job: Job,
    layout: PlainLayout,
    planned: TensorReport,
    choice: Choice,
    header: TensorHeader,
    writer: ShardWriter,
) -> TensorReport:
    report = replace(planned, decoded_exactly=True)
    if choice.storage != "kept":
        return layout.write(report, choice, writer)
    data = job.source.opened(header.file).bytes(header.begin, header.end)
    writer.put(writer.slots[choice.name].begin, data)
    return report


def _entries(layout: PlainLayout, choice: Choice, header: TensorHeader) -> list[Entry]:
    if choice.storage == "kept":
        return [(choice.name, header.dtype, header.shape, header.size_bytes)]
    return layout.entries(choice, header)


def _planned(job: Job, choice: Choice, header: TensorHeader, entries: list[Entry]) -> TensorReport:
    size_bytes = sum(entry[3] for entry in entries)
    return replace(plan_of(choice, header, job.plan), size_bytes=size_bytes)


def _small_files(
    job: Job, layout: PlainLayout, report: TernaryReport, todo: _Todo
) -> dict[str, bytes]:
    found = job.source.copied
    for path in job.source.cards:
        found[SOURCE_CARD_NAME] = read_bytes(path)
    config = dict(job.source.settings)
    explicit = config.pop("quantization_config").get("weights")
    del config["transformers_weights"]
    if explicit:
        config["transformers_weights"] = explicit
    pairs = [(header.file, entry) for _, header, entries in todo for entry in entries]
    index = weight_index(job.source.files, explicit, pairs)
    if index is not None:
        found[index[0]] = json_bytes(index[1])
    found[CONFIG_NAME] = json_bytes({**config, **layout.settings()})
    found[CARD_NAME] = layout.card(report, origin_of(job)).encode()
    return found
