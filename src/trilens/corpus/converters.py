"""A store's values in the formats of other tools that train sparse autoencoders."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa

from trilens.axes import SITES
from trilens.corpus.store import Store
from trilens.corpus.values import StoredValues
from trilens.errors import UsageError
from trilens.io.atomic import atomic, atomic_folder, write_bytes
from trilens.io.json import json_bytes
from trilens.io.paths import as_path
from trilens.numbers import at_least

__all__ = ["to_dictionary_learning", "to_saelens"]

_ROWS = 64
_PIECE_TOKENS = 1 << 14
_ARROW_NAME = "data-00000-of-00001.arrow"


def to_saelens(
    store: Store,
    site: str,
    layer: SupportsIndex | None,
    path: str | os.PathLike[str],
    *,
    context_size: SupportsIndex = 128,
) -> Path:
    """Write a folder of `datasets` such as SAELens' CachedActivationsRunner writes.

    Rows are runs of `context_size` tokens of the store, through its documents; tokens behind the
    last whole run are left out. The column of values has TransformerLens' name of the site; token
    ids are in "token_ids". Values with several axes are flattened in row-major order.

    Args:
        store: open.
        site: of it.
        layer: of the site.
        path: of the folder, which is not there.
        context_size: tokens of a row.

    Raises:
        NotStoredError: a site that the store does not hold.
        UsageError: fewer tokens than one row.
        WriteError: the folder is there, or cannot be written.

    Returns:
        The folder.
    """
    size = at_least(1, context_size, "context_size")
    values, place = store[site, layer], as_path(path, "output")
    n_rows = len(values) // size
    if not n_rows:
        raise UsageError(f"context_size {size} is more than the store's {len(values)} tokens")
    name, width = _hook_name(values), int(np.prod(values.shape[1:]))
    floats = "float16" if str(values.dtype) == "torch.float16" else "float32"
    features = {
        name: {"shape": [size, width], "dtype": floats, "_type": "Array2D"},
        "token_ids": {
            "feature": {"dtype": "int32", "_type": "Value"},
            "length": size,
            "_type": "Sequence",
        },
    }
    schema = _schema(name, size, width, floats, features)
    with atomic_folder(place) as folder:
        with atomic(folder / _ARROW_NAME) as file, pa.ipc.new_stream(file, schema) as stream:
            for row in range(0, n_rows, _ROWS):
                n = min(_ROWS, n_rows - row)
                begin, end = row * size, (row + n) * size
                ids = store.token_ids_of(begin, end).numpy()
                flat = values.to_numpy(begin, end).reshape(-1)
                inner = pa.ListArray.from_arrays(
                    pa.array(np.arange(n * size + 1, dtype=np.int32) * width), pa.array(flat)
                )
                outer = pa.ListArray.from_arrays(
                    pa.array(np.arange(n + 1, dtype=np.int32) * size), inner
                )
                tokens = pa.FixedSizeListArray.from_arrays(pa.array(ids), size)
                stream.write_batch(pa.RecordBatch.from_arrays([outer, tokens], schema=schema))
        write_bytes(folder / "dataset_info.json", json_bytes({"features": features}))
        write_bytes(folder / "state.json", json_bytes(_state(store, name, size)))
    return place


def _hook_name(values: StoredValues) -> str:
    aliases = SITES[values.site].aliases
    name = aliases[0] if aliases else values.site
    return name if values.layer is None else f"blocks.{values.layer}.{name}"


def _schema(name: str, size: int, width: int, floats: str, features: dict[str, Any]) -> pa.Schema:
    kind = pa.list_(pa.list_(pa.float16() if floats == "float16" else pa.float32()))
    # How `datasets` marks an array of two axes, so that it reads one without being imported here.
    array = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([[size, width], floats]),
    }
    fields = [
        pa.field(name, kind, metadata=array),
        pa.field("token_ids", pa.list_(pa.int32(), size)),
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _state(store: Store, name: str, size: int) -> dict[str, Any]:
    words = f"{store.manifest.fingerprint} {name} {size}".encode()
    return {
        "_data_files": [{"filename": _ARROW_NAME}],
        "_fingerprint": hashlib.sha256(words).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


def to_dictionary_learning(
    store: Store,
    site: str,
    layer: SupportsIndex | None,
    path: str | os.PathLike[str],
    *,
    shard_tokens: SupportsIndex = 1_000_000,
) -> Path:
    """Write a folder that dictionary_learning's ActivationCache reads: float32, one row a token.

    Args:
        store: open.
        site: of it.
        layer: of the site.
        path: of the folder, which is not there.
        shard_tokens: of a mapped file.

    Raises:
        NotStoredError: a site that the store does not hold.
        WriteError: the folder is there, or cannot be written.

    Returns:
        The folder.
    """
    size = at_least(1, shard_tokens, "shard_tokens")
    values, place = store[site, layer], as_path(path, "output")
    width = int(np.prod(values.shape[1:]))
    starts = range(0, len(values), size)
    with atomic_folder(place) as folder:
        for number, start in enumerate(starts):
            end = min(start + size, len(values))
            with atomic(folder / f"shard_{number}.memmap") as file:
                for at in range(start, end, _PIECE_TOKENS):
                    piece = values.to_numpy(at, min(at + _PIECE_TOKENS, end))
                    file.write(np.ascontiguousarray(piece, dtype=np.float32).data)
            meta = {"shape": [end - start, width]}
            write_bytes(folder / f"shard_{number}.meta", json_bytes(meta))
        config = {
            "batch_size": None,
            "context_len": store.manifest.counts.longest,
            "shard_size": size,
            "d_model": width,
            "shuffle_shards": False,
            "io": "out",
            "total_size": len(values),
            "shard_count": len(starts),
            "store_tokens": False,
        }
        write_bytes(folder / "config.json", json_bytes(config))
    return place
