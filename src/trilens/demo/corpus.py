"""The text the demo models learn from: the running Python's own standard library sources.

Nothing of that text is stored in the repository. ``heldout.json`` names the modules kept out of
training (and out of the tokenizer's training) with the sha256 of each, so that a held-out loss
can be told comparable or not on another Python.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

from trilens.errors import UsageError

__all__ = [
    "Document",
    "HeldOutCheck",
    "HeldOutRecord",
    "check_heldout",
    "checked_heldout_documents",
    "heldout_documents",
    "load_heldout_record",
    "read_document",
    "stdlib_root",
    "training_documents",
]

_RECORD_FILE = Path(__file__).resolve().parent / "heldout.json"

# Tests repeat the modules they test, site-packages is not the standard library, and the last
# two are generated tables (character maps, the help topics as one huge dict of strings) that
# would take a fifth of the training for nothing a reader would call code.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)
# Generated at build time and full of the build machine's paths.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One source file.

    Attributes:
        name: path relative to the standard library's folder, with forward slashes.
        text: the decoded source, with Unix newlines.
        sha256: hex digest of the file's bytes as they are on disk.
        size_bytes: length of ``text`` in UTF-8, the count behind bytes per token.
    """

    name: str
    text: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class HeldOutRecord:
    """The committed list of held-out modules.

    Attributes:
        python_version: the Python whose files the digests describe.
        sha256: digest by module path, in the committed (sorted) order.
    """

    python_version: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class HeldOutCheck:
    """How this machine's held-out files compare with the recorded ones.

    Attributes:
        same: module paths whose bytes are those recorded.
        different: module paths that exist here with other bytes.
        missing: module paths that do not exist here.
    """

    same: tuple[str, ...]
    different: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        """Whether a held-out loss measured here can be compared with the recorded one."""
        return not self.different and not self.missing

    def message(self, record: HeldOutRecord) -> str:
        """Say in words which files differ; empty when every file is the recorded one."""
        if self.comparable:
            return ""
        parts = [
            f"the held-out files are not those recorded for Python {record.python_version}, "
            "so held-out losses measured here are NOT comparable with the recorded ones."
        ]
        if self.different:
            parts.append("different: " + ", ".join(self.different) + ".")
        if self.missing:
            parts.append("missing: " + ", ".join(self.missing) + ".")
        return " ".join(parts)


def stdlib_root() -> Path:
    """Return the folder of the running Python's standard library.

    Raises:
        UsageError: this Python has no standard library as source files (a zipped or frozen one).
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "textwrap.py").is_file():
        raise UsageError(
            "this Python keeps its standard library elsewhere than as .py files in "
            'sysconfig.get_path("stdlib"); run with an ordinary CPython'
        )
    return root


def load_heldout_record(path: Path = _RECORD_FILE) -> HeldOutRecord:
    """Read the committed list of held-out modules and their digests."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return HeldOutRecord(python_version=data["python_version"], sha256=dict(data["sha256"]))


def read_document(root: Path, name: str) -> Document:
    """Read one source file, honouring its encoding cookie."""
    raw = (root / name).read_bytes()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    text = raw.decode(encoding).replace("\r\n", "\n")
    digest = hashlib.sha256(raw).hexdigest()
    return Document(name=name, text=text, sha256=digest, size_bytes=len(text.encode("utf-8")))


def check_heldout(root: Path, record: HeldOutRecord) -> HeldOutCheck:
    """Compare this machine's held-out files with the recorded digests."""
    same: list[str] = []
    different: list[str] = []
    missing: list[str] = []
    for name, digest in record.sha256.items():
        if not (root / name).is_file():
            missing.append(name)
        elif hashlib.sha256((root / name).read_bytes()).hexdigest() == digest:
            same.append(name)
        else:
            different.append(name)
    return HeldOutCheck(tuple(same), tuple(different), tuple(missing))


def heldout_documents(root: Path, record: HeldOutRecord) -> list[Document]:
    """Read the held-out files that exist here, in the recorded order."""
    return [read_document(root, name) for name in record.sha256 if (root / name).is_file()]


def training_documents(root: Path, record: HeldOutRecord) -> list[Document]:
    """Read every training file, sorted by relative path; held-out files are never among them."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in names if name not in record.sha256 and not _is_skipped(name)]
    documents = [read_document(root, name) for name in kept]
    return [document for document in documents if document.text.strip()]


def _is_skipped(name: str) -> bool:
    parts = name.split("/")
    return any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in parts)


def checked_heldout_documents() -> list[Document]:
    """Read the held-out files, warning on stderr when they are not the recorded ones.

    Raises:
        UsageError: none of the held-out files exists on this machine.
    """
    root, record = stdlib_root(), load_heldout_record()
    check = check_heldout(root, record)
    if not check.comparable:
        print(f"warning: {check.message(record)}", file=sys.stderr)
    documents = heldout_documents(root, record)
    if not documents:
        raise UsageError("this Python has none of the held-out modules; see heldout.json")
    return documents
