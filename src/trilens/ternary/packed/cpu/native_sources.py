"""The hash of the library's C files, which it carries: built of others, it is not called."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["hash_of_sources"]


def hash_of_sources(folder: Path) -> str:
    """A hash over the names and bytes of the C files of a folder; "" where it has none."""
    files = sorted([*folder.glob("*.c"), *folder.glob("*.h")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.name.encode()).digest())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16] if files else ""
