"""How results show themselves in a notebook: loaded when they are asked."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trilens.errors import UsageError
from trilens.results import Shown

__all__ = ["register_views"]

_MODULE = "trilens.report.notebook.views"
_PLOTS = "trilens.report.plots.figures"


def register_views() -> None:
    """Let results ask the report how they look."""
    Shown._static = staticmethod(_static)
    Shown._interactive = staticmethod(_interactive)
    Shown._figure = staticmethod(_figure)
    Shown._tabulated = staticmethod(_rows)


def _static(result: object) -> str:
    found: str = import_module(_MODULE).static_html(result)
    return found


def _interactive(result: object, options: dict[str, Any]) -> None:
    import_module(_MODULE).show(result, **options)


def _rows(result: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = import_module(_MODULE).shown_rows(result)
    return found


def _figure(result: object, name: str | None, options: dict[str, Any]) -> Any:
    if find_spec("matplotlib") is None:
        raise UsageError(
            "matplotlib is not installed, which draws figures: pip install 'trilens[plot]'"
        )
    return import_module(_PLOTS).figure_of(result, name, **options)
