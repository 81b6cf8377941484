"""What a run was made from, and what it has finished: the journal and the manifest.

The journal lies in the output from the first moment and lists the shards that are whole; a run that
was killed is taken up where it stopped. The manifest replaces it at the end and lists every file
with its hash; it carries a hash of itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from trilens.checkpoint.format.names import (
    FORMAT_VERSION,
    JOURNAL_NAME,
    MANIFEST_NAME,
)
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError
from trilens.io.atomic import write_bytes
from trilens.io.guarded import open_regular, sha256_of
from trilens.io.messages import clip, listed, other_version
from trilens.io.sealed import read_sealed, sealed
from trilens.ternary.rules.kernels import parallel_map

__all__ = ["Journal", "Order", "fingerprint", "manifest_bytes", "read_manifest"]

_KIND = "trilens-ternary-checkpoint"
_SHOWN = 80  # characters of two values that differ: a hash is longer


def fingerprint(files: list[Path]) -> dict[str, Any]:
    """Size, hash of the header and hash of the content of every file that goes into the output."""
    ordered = sorted(files, key=lambda file: file.name)
    # Hashing releases the interpreter's lock: shards side by side.
    return dict(zip([file.name for file in ordered], parallel_map(_of_file, ordered), strict=True))


def _of_file(file: Path) -> dict[str, Any]:
    with open_regular(file) as stream:
        try:
            found: dict[str, Any] = {
                "size_bytes": os.fstat(stream.fileno()).st_size,
                "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            }
            if file.name.endswith(".safetensors"):
                stream.seek(0)
                length = min(int.from_bytes(stream.read(8), "little"), found["size_bytes"])
                found["header_sha256"] = hashlib.sha256(stream.read(length)).hexdigest()
        except OSError as cause:
            raise CorruptFileError(f"{file} cannot be read: {cause.strerror or cause}") from cause
    return found


@dataclass(frozen=True, slots=True)
class Order:
    """What a run was asked: the same order gives the same bytes.

    Attributes:
        source: The fingerprint of the source's files.
        plan: The plan.
        code_version: The version of trilens.
        calibration: What decides the result of a calibration, texts by their hash; or None.
        sample: Hash of the text to measure on, or None.
        tokenizer: Hash of the files of a tokenizer that was given, or None.
    """

    source: dict[str, Any]
    plan: TernaryPlan
    code_version: str
    sample: str | None = None
    calibration: dict[str, Any] | None = None
    tokenizer: str | None = None

    @classmethod
    def of(
        cls,
        files: list[Path],
        plan: TernaryPlan,
        sample: str | None = None,
        calibration: dict[str, Any] | None = None,
        tokenizer: str | None = None,
    ) -> Self:
        """The order for a source and a plan, by this version of trilens.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        try:
            code_version = version("trilens")
        except PackageNotFoundError:
            code_version = "not installed"
        return cls(fingerprint(files), plan, code_version, sample, calibration, tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "code_version": self.code_version,
            "source": self.source,
            "plan": self.plan.to_dict(),
            **({"calibration": self.calibration} if self.calibration is not None else {}),
            **({"sample": self.sample} if self.sample else {}),
            **({"tokenizer": self.tokenizer} if self.tokenizer else {}),
        }

    def check_same(self, found: dict[str, Any], where: Path) -> None:
        """Refuse to go on with another order's output.

        Raises:
            UsageError: says what differs.
        """
        mine = self.to_dict()
        names = {
            "source": "source files",
            "plan": "plan",
            "calibration": "calibration text",
            "sample": "evaluation text",
        }
        for key in ("calibration", "tokenizer", *mine):
            value = mine.get(key)
            if found.get(key) != value:
                raise UsageError(
                    f"{where.parent} was begun with another {names.get(key, key)}"
                    f"{_difference(found.get(key), value)}: take an empty directory, or the same "
                    "source, plan and version"
                )

    def check_copied(self, digests: Mapping[str, str], files: Sequence[Path]) -> None:
        """Refuse copies of other content than was hashed at the start.

        Args:
            digests: hash of each file of the output.
            files: those of the source that were copied as they are.

        Raises:
            CorruptFileError: names the file.
        """
        for file in files:
            if digests[file.name] != self.source[file.name]["sha256"]:
                raise CorruptFileError(f"{file} changed while it was read: run again")


def _difference(old: Any, new: Any) -> str:
    """What differs, in words that a person can use: never a hash or what holds them."""
    if old is None or new is None:
        return " (none before, one now)" if old is None else " (one before, none now)"
    if not isinstance(old, dict) or not isinstance(new, dict):
        words = f" ({clip(old)}, now {clip(new)})"
        return words if len(words) <= _SHOWN else ""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return f" ({listed(keys)})"


class Journal:
    """The shards that are whole, on disk after each.

    Raises:
        UsageError: the journal is of another order.
        CorruptFileError: it cannot be read.
    """

    def __init__(self, folder: Path, order: Order) -> None:
        self._path = folder / JOURNAL_NAME
        self._order = order
        self._shards: dict[str, Any] = {}
        if self._path.exists():
            found, _ = read_sealed(self._path, required=False)  # older ones have no hash
            order.check_same(found, self._path)
            shards = found.get("shards")
            self._shards = shards if isinstance(shards, dict) else {}
        else:
            self._write()

    @property
    def is_empty(self) -> bool:
        """No shard is whole yet."""
        return not self._shards

    def finished(self, shard: Path) -> tuple[str, list[TensorReport]] | None:
        """Hash and reports of a shard that is whole and still as it was written, else None."""
        entry = self._shards.get(shard.name)
        if not isinstance(entry, dict) or not shard.is_file():
            return None
        try:
            reports = [TensorReport.from_dict(tensor) for tensor in entry["tensors"]]
        except (KeyError, TypeError, AttributeError):
            return None  # somebody wrote in it: the shard is made again
        return (entry["sha256"], reports) if sha256_of(shard) == entry.get("sha256") else None

    def add(self, shard: str, digest: str, reports: list[TensorReport]) -> None:
        """Note that a shard is whole."""
        self._shards[shard] = {
            "sha256": digest,
            "tensors": [report.to_dict() for report in reports],
        }
        self._write()

    def remove(self) -> None:
        """The manifest is there: nothing is left to resume."""
        self._path.unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove the shards that are whole, and the journal."""
        for name in self._shards:
            if Path(name).name == name:
                (self._path.parent / name).unlink(missing_ok=True)
        self.remove()

    def _write(self) -> None:
        write_bytes(self._path, sealed({**self._order.to_dict(), "shards": self._shards}))


def manifest_bytes(order: Order, report: TernaryReport, files: dict[str, Any]) -> bytes:
    """The manifest's content.

    Args:
        order: what was asked.
        report: the outcome of each tensor.
        files: size and hash of every other file of the output.
    """
    return sealed({**order.to_dict(), "files": files, "report": report.to_dict()})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest and check it against its own hash.

    Raises:
        ModelNotFoundError: there is none.
        CorruptFileError: it is damaged, or of another format version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        unfinished = (folder / JOURNAL_NAME).is_file()
        why = (
            "its run was not finished: run the same command again"
            if unfinished
            else (
                "it was not written by trilens ternarize, was saved anew since, or holds dense "
                "weights of before there were hashes"
            )
        )
        raise ModelNotFoundError(f"{folder} has no {MANIFEST_NAME}: {why}")
    found, _ = read_sealed(path)
    if found.get("kind") != _KIND:
        raise CorruptFileError(f"{path} is not the manifest of a ternary checkpoint")
    if found.get("format_version") != FORMAT_VERSION:
        raise CorruptFileError(
            other_version(f"{path} has format", found.get("format_version"), FORMAT_VERSION)
        )
    return found
