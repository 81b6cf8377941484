"""What is shown without a model: a saved capture, a comparison, a store, a report."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.saving import MANIFEST_NAME as COMPARISON
from trilens.corpus.names import MANIFEST_NAME as STORE
from trilens.corpus.store import open_store
from trilens.errors import CorruptFileError
from trilens.io.guarded import read_bytes
from trilens.io.hub import file_refusal
from trilens.io.messages import other_version
from trilens.lens.capture import Capture
from trilens.report.html.data import DATA_VERSION
from trilens.report.html.render import Rendered, rendered
from trilens.report.making import capture_page, page_of, versions
from trilens.report.page import Page

__all__ = ["Saved", "is_saved", "open_saved"]

_PAGES = (".html", ".htm")
_WEIGHTS = (".pth", ".pt", ".bin", ".ckpt")
_MOST_BYTES = 200_000_000
_GENERATOR = b'<meta name="generator" content="trilens">'
_DATA = re.compile(rb'<script type="application/octet-stream" id="trilens-data">([^<]*)</script>')
_MOST_DATA = 500_000_000

# A file that somebody sent may hold anything: it gets an origin of its own, and reaches nothing.
_SANDBOX = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Saved:
    """A page that is there already.

    Attributes:
        html: of it.
        policy: under which it is sent.
    """

    html: str
    policy: str


def is_saved(path: Path) -> bool:
    """Whether a path holds what is shown without a model."""
    if path.is_dir():
        return (path / STORE).is_file() or (path / COMPARISON).is_file()
    return path.is_file() and path.suffix.lower() != ".gguf"


def open_saved(path: Path) -> Saved:
    """Read it once.

    Raises:
        LoadError: damaged, none of these, or of a newer version.
        UsageError: a capture of which nothing can be shown.
    """
    if path.is_file() and path.suffix.lower() in _PAGES:
        return Saved(_report(path), _SANDBOX)
    if path.suffix.lower() in _WEIGHTS:
        raise file_refusal(path)
    page = replace(_page(path), title=path.resolve().name)
    found: Rendered = rendered(page, versions())
    return Saved(found.html, f"{found.policy}; frame-ancestors 'none'")


def _page(path: Path) -> Page:
    if path.is_file():
        return capture_page(Capture.load(path))
    if (path / STORE).is_file():
        return page_of(open_store(path))
    return page_of(Comparison.load(path))


def _report(path: Path) -> str:
    """A report as text; what is none, or of a newer version, is refused."""
    data = read_bytes(path, max_bytes=_MOST_BYTES)
    found = _DATA.search(data)
    if _GENERATOR not in data or found is None:
        raise CorruptFileError(f"{path} is no report of trilens: open it in a browser as it is")
    try:
        inflating = zlib.decompressobj()
        text = inflating.decompress(base64.b64decode(found[1], validate=True), _MOST_DATA)
        version = json.loads(text)["version"]
        html = data.decode("utf-8")
    except (ValueError, KeyError, TypeError, zlib.error, RecursionError) as error:
        raise CorruptFileError(
            f"{path} is not a whole report ({type(error).__name__}): make it again"
        ) from error
    if not isinstance(version, int) or not 1 <= version <= DATA_VERSION:
        raise CorruptFileError(
            other_version(f"{path} is a report of", version, DATA_VERSION, oldest=1)
        )
    return html
