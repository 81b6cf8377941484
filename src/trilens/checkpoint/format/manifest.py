"""What a run was made from, and what it has finished: the journal and the manifest.

The journal lies in the output from the first moment and lists the shards that are whole; a run that
was killed is taken up where it stopped. The manifest replaces it at the end and lists every file
with its hash; it carries a hash of itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
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
from trilens.io.guarded import sha256_of
from trilens.io.json import json_bytes, read_json
from trilens.io.messages import clip, listed
from trilens.ternary.rules.kernels import parallel_map

__all__ = ["Journal", "Order", "fingerprint", "manifest_bytes", "read_manifest"]

_KIND = "trilens-ternary-checkpoint"


def fingerprint(files: list[Path]) -> dict[str, Any]:
    """Size, hash of the header and hash of the content of every file that goes into the output."""
    ordered = sorted(files, key=lambda file: file.name)
    # Hashing releases the interpreter's lock: shards side by side.
    return dict(zip([file.name for file in ordered], parallel_map(_of_file, ordered), strict=True))


def _of_file(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)}
    if file.name.endswith(".safetensors"):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            found["header_sha256"] = hashlib.sha256(stream.read(length)).hexdigest()
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
    """

    source: dict[str, Any]
    plan: TernaryPlan
    code_version: str
    sample: str | None = None
    calibration: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        files: list[Path],
        plan: TernaryPlan,
        sample: str | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> Self:
        """The order for a source and a plan, by this version of trilens.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        try:
            code_version = version("trilens")
        except PackageNotFoundError:
            code_version = "not installed"
        return cls(fingerprint(files), plan, code_version, sample, calibration)

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
        }

    def check_same(self, found: dict[str, Any], where: Path) -> None:
        """Refuse to go on with another order's output.

        Raises:
            UsageError: says what differs.
        """
        mine = self.to_dict()
        names = {"source": "source files", "plan": "plan", "calibration": "calibration text"}
        for key in ("calibration", *mine):
            value = mine.get(key)
            if found.get(key) != value:
                raise UsageError(
                    f"{where.parent} was begun with another {names.get(key, key)}"
                    f"{_difference(found.get(key), value)}: take an empty directory, or the same "
                    "source, plan and version"
                )


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f" ({clip(old)}, now {clip(new)})"
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
            found = read_json(self._path, CorruptFileError)
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
            reports = [TensorReport(**{**t, "shape": tuple(t["shape"])}) for t in entry["tensors"]]
        except (KeyError, TypeError):  # somebody wrote in it: the shard is made again
            return None
        return (entry["sha256"], reports) if sha256_of(shard) == entry.get("sha256") else None

    def add(self, shard: str, digest: str, reports: list[TensorReport]) -> None:
        """Note that a shard is whole."""
        self._shards[shard] = {
            "sha256": digest,
            "tensors": [asdict(report) for report in reports],
        }
        self._write()

    def remove(self) -> None:
        """The manifest is there: nothing is left to resume."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        write_bytes(self._path, json_bytes({**self._order.to_dict(), "shards": self._shards}))


def manifest_bytes(order: Order, report: TernaryReport, files: dict[str, Any]) -> bytes:
    """The manifest's content.

    Args:
        order: what was asked.
        report: the outcome of each tensor.
        files: size and hash of every other file of the output.
    """
    body = {**order.to_dict(), "files": files, "report": report.to_dict()}
    return json_bytes({**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()})


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
            else ("it was not written by trilens ternarize, or saved anew since")
        )
        raise ModelNotFoundError(f"{folder} has no {MANIFEST_NAME}: {why}")
    found = read_json(path, CorruptFileError)
    if found.get("kind") != _KIND:
        raise CorruptFileError(f"{path} is not the manifest of a ternary checkpoint")
    if found.get("format_version") != FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} has format version {found.get('format_version')!r}: this trilens reads "
            f"version {FORMAT_VERSION}"
        )
    digest = found.pop("sha256", None)
    body = json_bytes(found)
    whole = json_bytes({**found, "sha256": digest})
    if hashlib.sha256(body).hexdigest() != digest or path.read_bytes() != whole:
        raise CorruptFileError(f"{path} is damaged: its content does not fit its own hash")
    return found
