"""`Report`: a page that can be saved, and shown in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from trilens.errors import UsageError
from trilens.io.atomic import write_bytes
from trilens.io.paths import as_path
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.report.html.render import render_page
from trilens.report.making import capture_page, page_of, versions
from trilens.report.page import Page

__all__ = ["Report", "make_report"]


@dataclass(frozen=True, slots=True)
class Report:
    """A result as one HTML file: it opens from disk, and asks nothing of any network.

    Attributes:
        page: what it shows.
    """

    page: Page

    @property
    def html(self) -> str:
        """The file as text.

        Memory
            About 0.6 MB, and what the weights of all heads take: up to 3 MB for 144 heads of 256
            tokens.
        """
        return render_page(self.page, versions())

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all; a file that is there is replaced.

        Returns:
            The path.

        Raises:
            WriteError: it can't be written.
        """
        file = as_path(path, "report")
        write_bytes(file, self.html.encode())
        return file

    def __repr__(self) -> str:
        titles = ", ".join(section.title for section in self.page.sections)
        return f"Report({self.page.title}: {titles})"


def make_report(
    result: object,
    *,
    lens: Lens | None = None,
    title: str = "",
    facts: Mapping[str, str] = MappingProxyType({}),
    command: str = "",
) -> Report:
    """The report of a result: `make_report(cap, lens=lens).save("report.html")`.

    Args:
        result: a `Capture`, or any result with a table: a comparison, a plan, a patching sweep …
        lens: of a capture, the model it came from: the report then shows what each layer would
            predict.
        title: its heading; made of the result where not given.
        facts: what the header says besides: name → value.
        command: what makes the report again.

    Raises:
        UsageError: nothing that a report is made of, a capture that holds nothing to show, or a
            lens with something that is no capture.
        IncomparableError: the lens is of another model than the capture.
    """
    if lens is not None and not isinstance(result, Capture):
        raise UsageError(
            f"lens is for the report of a Capture, not of {type(result).__name__}: leave it out"
        )
    page = capture_page(result, lens=lens) if isinstance(result, Capture) else page_of(result)
    return Report(
        replace(
            page,
            title=title or page.title,
            facts={**facts, **page.facts},
            command=command or page.command,
        )
    )
