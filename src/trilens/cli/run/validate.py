"""`trilens validate`: every byte of what trilens wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.saving import MANIFEST_NAME as COMPARISON_NAME
from trilens.analysis.comparison.saving import listed_names
from trilens.checkpoint.dense import validate_dense
from trilens.checkpoint.format.names import DENSE_NAME
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.gguf import validate_gguf
from trilens.checkpoint.hf_bitnet import BITNET_KIND, validate_bitnet
from trilens.checkpoint.validation import unlisted, validate
from trilens.cli.console import show_json, status
from trilens.cli.streams import say
from trilens.corpus.names import MANIFEST_NAME as STORE_NAME
from trilens.corpus.validation import validate_store
from trilens.errors import CorruptFileError, UsageError
from trilens.io.listing import extra_files
from trilens.io.messages import listed
from trilens.io.sealed import NO_HASH_NOTE, read_sealed
from trilens.lens.capture import Capture
from trilens.models.rwkv7.conversion import MANIFEST_NAME as CONVERSION_NAME
from trilens.models.rwkv7.conversion import validate_conversion
from trilens.report.text.ternary import GGUF_HEAD, REPORT_HEAD, gguf_sentence

__all__ = ["Checked", "check", "run"]


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found undamaged.

    Attributes:
        values: For JSON.
        sentences: For people.
    """

    values: dict[str, Any]
    sentences: tuple[str, ...]


def run(*, path: Path, format: str) -> None:
    """Check and report."""
    with status(f"checking {path}"):
        found = check(path)
    if format == "json":
        show_json(found.values)
        return
    for sentence in found.sentences:
        say(sentence)


def check(path: Path) -> Checked:
    """Check what trilens wrote: a ternary checkpoint, a GGUF file, a capture, a comparison, a
    store, a converted or dense checkpoint, or a plan.

    Raises:
        ModelNotFoundError: nothing of these is there.
        CorruptFileError: says which file is damaged, and how.
    """
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf":
        file = validate_gguf(path)
        return Checked(
            {**GGUF_HEAD, **file.to_dict()}, (f"{path}: undamaged. {gguf_sentence(file)}",)
        )
    if path.suffix == ".json" and path.is_file():
        return _plan(path)
    return _capture(path) if path.exists() else _ternary(path)


def _folder(path: Path) -> Checked:
    if (path / COMPARISON_NAME).is_file():
        return _comparison(path)
    if (path / STORE_NAME).is_file():
        return _store(path)
    if (path / CONVERSION_NAME).is_file():
        return _listed(path, validate_conversion(path), "conversion")
    if (path / DENSE_NAME).is_file():
        if read_sealed(path / DENSE_NAME)[0].get("kind") == BITNET_KIND:
            return _listed(path, validate_bitnet(path), "BitNet checkpoint")
        return _listed(path, validate_dense(path), "dense checkpoint")
    return _ternary(path)


def _store(path: Path) -> Checked:
    found = validate_store(path)
    first = (
        f"{path}: undamaged. {found.files} files of a store of {found.tokens} tokens in "
        f"{found.shards} shards have their sizes and hashes."
    )
    values = {"format": "trilens.store_check", "version": 1, **found.to_dict()}
    return Checked(values, (first, *_extra_sentence(found.extra_files)))


def _ternary(path: Path) -> Checked:
    report = validate(path)
    extra = unlisted(path)
    first = (
        f"{path}: undamaged. {len(report.coded)} matrices hold legal codes and finite scales; "
        "all files have the size and hash that the manifest lists."
    )
    values = {**REPORT_HEAD, **report.to_dict(), "extra_files": list(extra)}
    return Checked(values, (first, *_extra_sentence(extra), report.verdict))


def _plan(path: Path) -> Checked:
    try:
        plan, hash_checked = TernaryPlan.read(path)
    except UsageError as cause:
        raise CorruptFileError(
            f"{path} is no plan that trilens ternarize takes: {cause}"
        ) from cause
    entries = f"{len(plan.matrices)} matrices by entries of their own, else {plan.rule}"
    found = f"A plan: {entries if plan.matrices else f'rule {plan.rule}'}."
    note = () if hash_checked else (f"Note: {NO_HASH_NOTE}.",)
    values = _head("trilens.plan_check", hash_checked=hash_checked)
    return Checked(values, (f"{path}: undamaged. {found}", *note))


def _listed(path: Path, names: tuple[str, ...], what: str) -> Checked:
    extra = extra_files(path, names)
    first = f"{path}: undamaged. {len(names)} files of a {what} have their sizes and hashes."
    values = _head(f"trilens.{what.split(maxsplit=1)[0]}_check", hash_checked=True, extra=extra)
    return Checked(values, (first, *_extra_sentence(extra)))


def _comparison(path: Path) -> Checked:
    found = Comparison.load(path)
    extra = extra_files(path, listed_names(path))
    first = f"{path}: undamaged. {found!r}"
    values = _head("trilens.comparison_check", hash_checked=found.hash_checked, extra=extra)
    note = () if found.hash_checked else (f"Note: {NO_HASH_NOTE}.",)
    return Checked(values, (first, *note, *_extra_sentence(extra)))


def _capture(path: Path) -> Checked:
    found = Capture.load(path)
    values = _head("trilens.capture_check", hash_checked=found.hash_checked)
    note = () if found.hash_checked else (f"Note: {NO_HASH_NOTE}.",)
    return Checked(values, (f"{path}: undamaged. {found!r}", *note))


def _head(format: str, *, hash_checked: bool | None, extra: Iterable[str] = ()) -> dict[str, Any]:
    return {
        "format": format,
        "version": 1,
        "hash_checked": bool(hash_checked),
        "extra_files": list(extra),
    }


def _extra_sentence(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        return ()
    count = "1 file is" if len(names) == 1 else f"{len(names)} files are"
    return (f"{count} not of this output, and not checked: {listed(map(repr, names))}.",)
