"""How results show themselves in a notebook: loaded when they are asked."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trilens.results import Shown

__all__ = ["register_views"]

_MODULE = "trilens.report.notebook.views"


def register_views() -> None:
    """Let results ask the report how they look."""
    Shown._static = staticmethod(_static)
    Shown._interactive = staticmethod(_interactive)


def _static(result: object) -> str:
    found: str = import_module(_MODULE).static_html(result)
    return found


def _interactive(result: object, options: dict[str, Any]) -> None:
    import_module(_MODULE).show(result, **options)
