"""How figures look, and how they leave: text as text, whatever it says."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from trilens.printable import escaped
from trilens.report.colours import BLUES, INK, ORANGES, SERIES, SOFT
from trilens.report.tables import Column

__all__ = ["PaperFigure", "heading", "new_figure", "plain", "ramp", "styled"]

_RC = {
    "axes.edgecolor": SOFT,
    "axes.formatter.useoffset": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
    # Text stays text: it can be searched, and set in a paper's own font.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "trilens",
}
_LONG = 26


@contextmanager
def styled() -> Iterator[None]:
    """Our settings for the length of the block; a character that no font has is an empty box."""
    with mpl.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


class PaperFigure(Figure):
    """A figure of matplotlib that is saved in the style in which it was drawn."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save as matplotlib does; the kind of file by its suffix, such as .svg or .pdf."""
        with styled():
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        out = BytesIO()
        self.savefig(out, format="png", dpi=110)
        return out.getvalue()


def new_figure(width: float, height: float, **options: Any) -> tuple[PaperFigure, Axes]:
    """A figure of so many inches with one pair of axes."""
    figure = PaperFigure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(**options)


def plain(text: object, longest: int = _LONG) -> str:
    """Text that is no formula, on one line; of a long one its ends."""
    shown = escaped(str(text))
    if len(shown) > longest:
        shown = f"{shown[:8]}…{shown[9 - longest :]}"
    return shown.replace("$", r"\$")


def heading(column: Column) -> str:
    """What an axis is called."""
    words = f"{column.title} ({column.unit})" if column.unit else column.title
    return plain(words, 80)


def ramp(*, diverging: bool) -> Colormap:
    """White to blue, or orange to white to blue; what has no value is grey."""
    colours = [*ORANGES[:0:-1], *BLUES] if diverging else [*BLUES]
    found = LinearSegmentedColormap.from_list("trilens", colours)
    return found.with_extremes(bad="#d8d8d8")
