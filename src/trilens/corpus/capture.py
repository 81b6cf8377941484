"""A corpus captured into a store: cut, fingerprinted, sent to workers, finished."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from trilens.corpus.cutting import cut
from trilens.corpus.documents import ReadingReport, read_corpus
from trilens.corpus.fingerprints import model_fingerprint, tokenizer_fingerprint
from trilens.corpus.finishing import finish, is_done, merged_shards
from trilens.corpus.manifest import StoreManifest, read_manifest
from trilens.corpus.names import MANIFEST_NAME, is_own
from trilens.corpus.options import StoreOptions
from trilens.corpus.reducing import merge_shards
from trilens.corpus.shards import ShardDone, threads_of
from trilens.corpus.sites import stored_sites
from trilens.corpus.store import Store, open_store
from trilens.corpus.worker import shard_runner, worker_spec
from trilens.errors import ModelNotFoundError, UsageError
from trilens.io.atomic import locked_folder
from trilens.io.messages import listed
from trilens.io.paths import as_path
from trilens.io.temporary import is_leftover
from trilens.lens.lens import Lens
from trilens.models.positions import configured_positions
from trilens.models.tokens import vocab_size_of
from trilens.numbers import at_least
from trilens.progress import Progress, Step
from trilens.version import __version__
from trilens.workers.dispatch import InProcess, Workers, run_shards
from trilens.workers.pool import open_pool

__all__ = ["capture_corpus"]

_MERGE_EVERY = 8


def capture_corpus(
    model: Lens | str | os.PathLike[str],
    corpus: str | os.PathLike[str] | Iterable[Any],
    output: str | os.PathLike[str],
    *,
    options: StoreOptions | None = None,
    loading: Mapping[str, Any] | None = None,
    field: str = "text",
    label: str | None = None,
    strict: bool = False,
    tokenizer: Any = None,
    workers: SupportsIndex = 1,
    ray: str | None = None,
    gpus_per_worker: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Run a model over a corpus and keep the values of sites, or what reducers make of them.

    The corpus is cut into shards of token ids first. Each shard is captured by itself, written
    whole or not at all, and the same bytes whoever captures it. A run that was killed is finished
    by the same call; a store of another model, tokenizer, corpus or other options is refused.

    Args:
        model: a lens; or a checkpoint directory or hub id, which several workers need.
        corpus: as `read_corpus` takes it.
        output: folder of the store.
        options: what to store.
        loading: arguments of `Lens.from_pretrained`, where `model` is a path.
        field: key or column of the text.
        label: key of the document's class.
        strict: raise at the first entry of the corpus that cannot be read; else it is counted.
        tokenizer: instead of the model's own.
        workers: processes of this machine; 1 is this process.
        ray: address of a Ray cluster, "auto" or "local", whose nodes capture instead.
        gpus_per_worker: GPUs of each Ray worker; parts of one are allowed.
        overwrite: remove a store that is there.
        progress: called after each shard with tokens done and seconds left.

    Returns:
        The store, open.

    Raises:
        UsageError: the folder holds something else, or a store that another call began.
        TextError: no document, or a bad one with `strict`.
        SiteError, UnknownSiteError: a site that the model has not.
        ShardError: a shard that no worker could capture; names it and the cause.
        WriteError: the folder cannot be written to, or another run writes to it.

    Memory: the model once per worker, and each worker's shard.
    """
    wanted = options or StoreOptions()
    n_workers = at_least(1, workers, "workers")
    together = n_workers > 1 or ray is not None
    if together and isinstance(model, Lens):
        raise UsageError(
            "workers need the checkpoint's path, and model is a lens: give the path, or workers=1"
        )
    folder = as_path(output, "output")
    with locked_folder(folder), _own_threads(wanted):
        _check_folder(folder, overwrite=overwrite)
        given = dict(loading or {})
        lens = model if isinstance(model, Lens) else Lens.from_pretrained(model, **given)
        if tokenizer is not None:
            lens.tokenizer = tokenizer
        source = _Source(corpus, field, label, strict)
        manifest = _manifest(lens, source, folder, wanted)
        missing = [n for n in range(len(manifest.shards)) if not is_done(folder, manifest, n)]
        if missing:
            pool: Workers = InProcess(shard_runner(lens, folder, manifest))
            if together:
                assert not isinstance(model, Lens)
                spec = worker_spec(folder, str(model), given, wanted.threads)
                del lens
                pool.close()
                del pool
                gc.collect()  # the model goes before the workers' own come
                count = min(n_workers, len(missing))
                pool = open_pool(spec, count, ray=ray, gpus=gpus_per_worker)
            _run(pool, folder, manifest, missing, progress)
        if not manifest.complete or missing:
            finish(folder, manifest)
    return open_store(folder)


@dataclass(frozen=True, slots=True)
class _Source:
    corpus: Any
    field: str
    label: str | None
    strict: bool

    def read(self, report: ReadingReport) -> Iterator[Any]:
        return read_corpus(
            self.corpus, field=self.field, label=self.label, strict=self.strict, report=report
        )


@contextmanager
def _own_threads(options: StoreOptions) -> Iterator[None]:
    before = torch.get_num_threads()
    threads_of(options)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    files = [path for path in folder.iterdir() if not is_leftover(path.name)]
    other = [path.name for path in files if not is_own(path)]
    if other:
        raise UsageError(
            f"output {folder} holds files that are not of a store, such as {listed(other, 3)}: "
            "name another folder"
        )
    if overwrite or not (folder / MANIFEST_NAME).is_file():
        # The manifest first: without it nothing else counts.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for path in files:
            path.unlink(missing_ok=True)


def _manifest(lens: Lens, source: _Source, folder: Path, options: StoreOptions) -> StoreManifest:
    """The manifest of the store as it is, or of a new one whose tokens are written."""
    try:
        found = read_manifest(folder)
    except ModelNotFoundError:
        return _new(lens, source, folder, options)
    report = ReadingReport()
    for number, _ in enumerate(source.read(report), start=1):
        # A corpus that was cut short is read no further than it was.
        if options.max_tokens is not None and number == found.counts.read:
            break
    mine = replace(
        found,
        code=__version__,
        model_fingerprint=model_fingerprint(lens.model),
        tokenizer_fingerprint=tokenizer_fingerprint(lens.tokenizer),
        corpus_fingerprint=report.digest.hexdigest(),
        options=options,
    )
    here, there = mine.identity(), found.identity()
    differing = [name for name in here if here[name] != there[name]]
    if differing:
        raise UsageError(
            f"output {folder} is a store of another {listed(differing)}: name another folder, or "
            "overwrite it"
        )
    return found


def _new(lens: Lens, source: _Source, folder: Path, options: StoreOptions) -> StoreManifest:
    info, sites = stored_sites(lens, options)
    most = configured_positions(lens.model)
    report = ReadingReport()
    found = cut(
        source.read(report),
        folder,
        tokenizer=lens.tokenizer,
        vocab_size=vocab_size_of(lens.model),
        context=min(options.context, most or options.context),
        options=options,
        report=report,
        strict=source.strict,
    )
    if "class_means" in options.reduce and not found.labels:
        raise UsageError("class means need labels, and no document has one: name their key")
    manifest = StoreManifest(
        code=__version__,
        model=info,
        model_fingerprint=model_fingerprint(lens.model),
        tokenizer_fingerprint=tokenizer_fingerprint(lens.tokenizer),
        corpus_fingerprint=report.digest.hexdigest(),
        options=options,
        counts=found.counts,
        sites=sites,
        labels=found.labels,
        shards=found.shards,
    )
    manifest.write(folder)
    return manifest


def _run(
    pool: Workers,
    folder: Path,
    manifest: StoreManifest,
    missing: list[int],
    progress: Progress | None,
) -> None:
    total = sum(manifest.shards)
    left = sum(manifest.shards[shard] for shard in missing)
    before, started, done = total - left, time.perf_counter(), 0
    if progress is not None:
        progress(Step(before, total, f"{len(missing)} of {len(manifest.shards)} shards to do"))
    for number, each in enumerate(run_shards(pool, missing, done="captured"), start=1):
        shard = ShardDone(**each.report)
        done += shard.tokens
        if manifest.options.reduce and number % _MERGE_EVERY == 0:
            _merge(folder, manifest)
        if progress is not None:
            speed = done / max(1e-9, time.perf_counter() - started)
            what = f"shard {shard.shard}, {speed:,.0f} tokens/s"
            progress(Step(before + done, total, what, (left - done) / speed))


def _merge(folder: Path, manifest: StoreManifest) -> None:
    ready = merged_shards(folder, manifest)
    merge_shards(folder, manifest.options, len(manifest.labels), ready)
