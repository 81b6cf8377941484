"""Files that carry a hash of themselves: JSON, and the head of a binary file.

One wrong bit anywhere is noticed, in the hash and in its name too: that there is a hash is said a
second time elsewhere in the file. Files from before there were hashes have neither.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from trilens.errors import CorruptFileError
from trilens.io.guarded import read_bytes
from trilens.io.json import json_bytes, parse_object

__all__ = ["NO_HASH", "NO_HASH_NOTE", "check_seal", "read_sealed", "sealed", "signed", "unsealed"]

NO_HASH = "0" * 64
"""Stands where a hash will be, and while it is computed."""

NO_HASH_NOTE = "it was written before files carried hashes: damage to its numbers would not show"

_KEY = "sha256"
_SIGN = "hashed"  # says a second time that there is a hash


def sealed(body: dict[str, Any]) -> bytes:
    """JSON with a last key that holds the hash of the JSON without it."""
    return json_bytes({**body, _KEY: hashlib.sha256(json_bytes(body)).hexdigest()})


def read_sealed(path: Path, *, required: bool = True) -> tuple[dict[str, Any], bool]:
    """Read what `sealed` gave, and whether it carried a hash.

    Args:
        path: the file.
        required: refuse a file without a hash.

    Raises:
        CorruptFileError: it cannot be read, or does not fit its own hash.
    """
    data = read_bytes(path)
    found = parse_object(data, str(path), unique_keys=True)
    if _KEY not in found and not required:
        return found, False
    digest = found.pop(_KEY, None)
    if hashlib.sha256(json_bytes(found)).hexdigest() != digest or sealed(found) != data:
        raise CorruptFileError(f"{path} is damaged: its content does not fit its own hash")
    return found, True


def signed(body: dict[str, Any]) -> bytes:
    """As `sealed`, for files that people read and may lay out anew: see `check_seal`."""
    return sealed({**body, _SIGN: True})


def check_seal(found: dict[str, Any], what: str) -> bool:
    """Compare values with the hash among them, whatever they were laid out like.

    Args:
        found: what was read of a file that `signed` or `sealed` gave.
        what: the file, for messages.

    Returns:
        Whether there is a hash.

    Raises:
        CorruptFileError: the values do not fit it.
    """
    if _KEY not in found and _SIGN not in found:
        return False
    body = {key: value for key, value in found.items() if key != _KEY}
    if hashlib.sha256(json_bytes(body)).hexdigest() != found.get(_KEY):
        raise CorruptFileError(
            f"{what} is damaged: its content does not fit its own hash; where it was changed by "
            f"hand, take its keys {_SIGN!r} and {_KEY!r} out"
        )
    return True


def unsealed(head: bytes, key: bytes, digest: str) -> bytes | None:
    """The head of a file as it was before its hash was put in.

    Args:
        head: its first bytes.
        key: what stands directly before the hash.
        digest: the hash that it names.

    Returns:
        None where it is not there, or twice.
    """
    place = key + digest.encode()
    return head.replace(place, key + NO_HASH.encode()) if head.count(place) == 1 else None
