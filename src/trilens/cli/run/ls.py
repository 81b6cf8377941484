"""`trilens ls`: what a store holds."""

from __future__ import annotations

from pathlib import Path

from trilens.cli.console import show_result
from trilens.corpus.store import open_store
from trilens.report.text.store import print_store

__all__ = ["run"]


def run(*, path: Path, format: str) -> None:
    """Open and list."""
    show_result(open_store(path), print_store, format=format)
