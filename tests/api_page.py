"""docs/api.md: what is public, one line each, from the docstrings. `python tests/api_page.py`."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from trilens.axes import SITES

__all__ = ["PACKAGES", "PAGE", "SITES_PAGE", "names", "page", "sites_table"]

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
SITES_PAGE = PAGE.with_name("sites.md")
PACKAGES = (
    "trilens",
    "trilens.analysis",
    "trilens.caches",
    "trilens.checkpoint",
    "trilens.corpus",
    "trilens.edits",
    "trilens.errors",
    "trilens.planning",
    "trilens.ternary",
)
_HEAD = """# What is public

The names in `__all__` of these packages, and the methods of their classes that do not begin with an
underscore. Everything else may change. This page is made from the docstrings by
`python tests/api_page.py`.
"""
_DATA = {
    "__version__": "The version, as a string.",
    "CODECS": "The exact encodings of trits, by name.",
    "RULES": "The rules that need no data, by name.",
    "GateKind": "What a gate is: `sigmoid`, `activation`, `decay`, `step`, `linear` or `router`.",
    "Progress": "What `progress=` takes: a function of one `Step`.",
}


def names(package: str) -> dict[str, object]:
    """The public names of a package that are not packages themselves."""
    module = importlib.import_module(package)
    found = {name: getattr(module, name) for name in sorted(module.__all__, key=str.lower)}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def _summary(name: str, value: object) -> str:
    if name in _DATA:
        return _DATA[name]
    text = inspect.getdoc(value) or ""
    return " ".join(text.split("\n\n")[0].split())


def page() -> str:
    """The whole page."""
    first: dict[int, str] = {}
    parts = [_HEAD]
    for package in PACKAGES:
        parts.append(f"\n## {package}\n\n")
        for name, value in names(package).items():
            where = first.setdefault(id(value), package)
            line = _summary(name, value) if where == package else f"See `{where}`."
            parts.append(f"- `{name}`: {line}\n")
    return "".join(parts)


def sites_table() -> str:
    """The table of sites, as docs/sites.md ends with it."""
    rows = ["| site | axes | where | what proves it | other names |", "|---|---|---|---|---|"]
    for name, spec in SITES.items():
        aliases = ", ".join(f"`{alias}`" for alias in spec.aliases) or "–"
        axes = spec.axes if spec.per_layer else f"{spec.axes}, once"
        rows.append(f"| `{name}` | {axes} | {spec.where} | {spec.proof} | {aliases} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = SITES_PAGE.read_text(encoding="utf-8")
    SITES_PAGE.write_text(text.partition("| site |")[0] + sites_table(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
