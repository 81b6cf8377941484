"""Where a command writes a page: an output whose name ends in .html, or --report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trilens.cli.groups import Loading
from trilens.cli.waiting import status
from trilens.errors import UsageError

__all__ = ["check_page", "is_page", "model_facts", "write_page"]

_SUFFIXES = (".html", ".htm")


def is_page(file: Path | None) -> bool:
    """Whether an output is a page, by its name."""
    return file is not None and file.suffix.lower() in _SUFFIXES


def check_page(file: Path | None, format: str) -> None:
    """Refuse JSON in a page.

    Raises:
        UsageError: --format json and an output that ends in .html.
    """
    if is_page(file) and format == "json":
        raise UsageError(f"--format json contradicts output {file}, which is a page: leave one out")


def model_facts(model: str, loading: Loading | None = None) -> dict[str, str]:
    """What the header of a page says of the model."""
    facts = {"model": model}
    if loading is not None and loading.revision is not None:
        facts["revision"] = loading.revision
    if loading is not None and loading.dtype != "auto":
        facts["dtype"] = loading.dtype
    return facts


def write_page(
    file: Path, page_or_result: Any, facts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write the page of a result, with the command that makes it again."""
    # Imported here: what draws pages is not needed by a command that draws none.
    report = import_module("trilens.report.html.report")
    command = import_module("trilens.report.html.render").shown_command(_command())
    with status(f"writing {file}"):
        if isinstance(page_or_result, import_module("trilens.report.page").Page):
            page = replace(page_or_result, facts={**facts, **page_or_result.facts}, command=command)
            report.Report(page).save(file)
        else:
            report.make_report(page_or_result, facts=facts, command=command).save(file)


def _command() -> list[str]:
    """The command as it was typed, without the folder that the program is in."""
    return ["trilens", *sys.argv[1:]]
