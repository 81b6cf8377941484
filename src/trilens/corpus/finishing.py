"""From finished shards to a complete store: what is done, reducers merged, metrics, checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trilens.corpus.cutting import TOKENS_FORMAT, TOKENS_VERSION
from trilens.corpus.manifest import StoreManifest
from trilens.corpus.names import (
    DOCUMENTS_NAME,
    METRICS_NAME,
    REDUCED_NAME,
    reduced_name,
    shard_name,
    tokens_name,
)
from trilens.corpus.reducing import (
    REDUCED_FORMAT,
    REDUCED_VERSION,
    merge_shards,
    read_reduced,
)
from trilens.corpus.results import Reduced
from trilens.corpus.shards import SHARD_FORMAT, SHARD_VERSION, check_shard, shard_facts
from trilens.errors import LoadError
from trilens.io.atomic import atomic
from trilens.io.guarded import sha256_of
from trilens.io.tensors import read_head

__all__ = ["METRICS_SCHEMA", "claim_of", "finish", "is_done", "merged_shards", "stored_files"]

METRICS_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("layer", pa.int32()),
        ("module", pa.string()),
        ("head", pa.int32()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)
_KINDS = {
    "tokens": (TOKENS_FORMAT, TOKENS_VERSION),
    "shard": (SHARD_FORMAT, SHARD_VERSION),
    "reduced": (REDUCED_FORMAT, REDUCED_VERSION),
}


def is_done(folder: Path, manifest: StoreManifest, shard: int) -> bool:
    """Whether a shard is there undamaged, with its reducers; every byte of it is read."""
    try:
        check_shard(folder, manifest, shard)
    except LoadError:
        return False
    if not manifest.options.reduce or shard < _merged(folder):
        return True
    try:
        read_reduced(folder / reduced_name(shard))
    except LoadError:
        return False
    return True


def _merged(folder: Path) -> int:
    try:
        head, _ = read_head(folder / REDUCED_NAME, REDUCED_FORMAT, REDUCED_VERSION)
    except LoadError:
        return 0
    return int(head["shards"])


def merged_shards(folder: Path, manifest: StoreManifest) -> int:
    """How many shards could be merged: those from the first on, without a gap."""
    ready = _merged(folder)
    while ready < len(manifest.shards) and (folder / shard_name(ready)).is_file():
        ready += 1
    return ready


def stored_files(manifest: StoreManifest) -> list[str]:
    """Names of all files of a complete store but the manifest."""
    shards = range(len(manifest.shards))
    names = [tokens_name(n) for n in shards] + [shard_name(n) for n in shards]
    reduced = [REDUCED_NAME] if manifest.options.reduce else []
    return [DOCUMENTS_NAME, METRICS_NAME, *names, *reduced]


def claim_of(path: Path) -> dict[str, Any]:
    """Size and hash of a file: the hash that a safetensors file names of itself.

    Raises:
        CorruptFileError: it is missing, or its header is damaged.
    """
    kind = _KINDS.get(path.name.partition("-")[0].partition(".")[0])
    digest = sha256_of(path) if kind is None else read_head(path, *kind)[1]
    return {"size_bytes": path.stat().st_size, "sha256": digest}


def finish(folder: Path, manifest: StoreManifest) -> None:
    """Merge the reducers, write metrics and the final manifest.

    Raises:
        WriteError: a file cannot be written.
        CorruptFileError: a file was damaged meanwhile.
    """
    sums: dict[str, list[float]] = {}
    padded = 0
    for shard in range(len(manifest.shards)):
        facts, _ = shard_facts(folder, shard)
        padded += facts["padded"]
        for name, (error, total) in facts["errors"].items():
            found = sums.setdefault(name, [0.0, 0.0])
            found[0] += error
            found[1] += total
    errors = {name: error / total if total else 0.0 for name, (error, total) in sums.items()}
    rows = [
        {
            "layer": site.layer, "module": site.site, "head": None,
            "metric": "relative_error", "value": errors[site.tensor],
        }
        for site in manifest.sites
        if site.tensor in errors
    ]  # fmt: skip
    if manifest.options.reduce:
        merge_shards(folder, manifest.options, len(manifest.labels), len(manifest.shards))
        reducers, _ = read_reduced(folder / REDUCED_NAME)
        rows += Reduced(reducers, manifest.labels).rows()
    model = manifest.model.name or manifest.model.model_class
    table = pa.Table.from_pylist([{"model": model, **row} for row in rows], METRICS_SCHEMA)
    with atomic(folder / METRICS_NAME) as file:
        pq.write_table(table, file)
    files = {name: claim_of(folder / name) for name in sorted(stored_files(manifest))}
    manifest.completed(files, errors, padded).write(folder)
