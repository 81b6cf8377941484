"""What a worker of another process or machine opens to capture shards of a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trilens.corpus.fingerprints import model_fingerprint
from trilens.corpus.manifest import StoreManifest, read_manifest
from trilens.corpus.shards import capture_shard, threads_of
from trilens.errors import UsageError
from trilens.lens.lens import Lens
from trilens.workers.dispatch import RunShard, WorkerSpec

__all__ = ["open_worker", "shard_runner", "worker_spec"]


def worker_spec(folder: Path, model: str, loading: dict[str, Any], threads: int) -> WorkerSpec:
    """What workers of a store open.

    Args:
        folder: of the store, which every worker must reach.
        model: checkpoint directory or hub id.
        loading: further arguments of `Lens.from_pretrained`.
        threads: of torch.
    """
    arguments = {"folder": str(folder.resolve()), "model": model, "loading": loading}
    return WorkerSpec(__name__, arguments, threads)


def open_worker(arguments: dict[str, Any]) -> RunShard:
    """The model, held for the shards of one store.

    Raises:
        LoadError, AnatomyError: as `Lens.from_pretrained`.
        UsageError: the model is another than the store's.
    """
    folder, model = Path(arguments["folder"]), arguments["model"]
    manifest = read_manifest(folder)
    threads_of(manifest.options)
    lens = Lens.from_pretrained(model, **arguments["loading"])
    found = model_fingerprint(lens.model)
    if found != manifest.model_fingerprint:
        raise UsageError(
            f"worker found another model at {model} than the store's: fingerprint "
            f"{found[:12]}, not {manifest.model_fingerprint[:12]}; give all workers the same files"
        )
    return shard_runner(lens, folder, manifest)


def shard_runner(lens: Lens, folder: Path, manifest: StoreManifest) -> RunShard:
    """`capture_shard` of this store, reported in plain values."""

    def run(shard: int) -> dict[str, Any]:
        return asdict(capture_shard(lens, folder, manifest, shard))

    return run
