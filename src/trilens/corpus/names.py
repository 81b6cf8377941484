"""Names of a store's files."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    "DOCUMENTS_NAME",
    "MANIFEST_NAME",
    "METRICS_NAME",
    "REDUCED_NAME",
    "is_own",
    "reduced_name",
    "shard_name",
    "tokens_name",
]

MANIFEST_NAME = "store.json"
DOCUMENTS_NAME = "documents.parquet"
METRICS_NAME = "metrics.parquet"
REDUCED_NAME = "reduced.safetensors"

_NUMBERED = re.compile(r"(shard|tokens|reduced)-\d{5,}\.safetensors")


def shard_name(number: int) -> str:
    """Of the values of a shard."""
    return f"shard-{number:05}.safetensors"


def tokens_name(number: int) -> str:
    """Of the token ids of a shard."""
    return f"tokens-{number:05}.safetensors"


def reduced_name(number: int) -> str:
    """Of the reducers of one shard, until they are merged."""
    return f"reduced-{number:05}.safetensors"


def is_own(path: Path) -> bool:
    """Whether a file in a store's folder is one that a run wrote."""
    fixed = {MANIFEST_NAME, DOCUMENTS_NAME, METRICS_NAME, REDUCED_NAME}
    return path.is_file() and (path.name in fixed or _NUMBERED.fullmatch(path.name) is not None)
