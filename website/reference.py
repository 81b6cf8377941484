"""The reference: every public name with its docstring, read from the stubs; nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NAMES", "linked", "pages", "public_names"]

ROOT = Path(__file__).parents[1] / "src"
_TITLES = {
    "lens": "Lens and captures",
    "caches": "Caches",
    "edits": "Edits",
    "analysis": "Analyses",
    "report": "Reports",
    "ternary": "Ternary matrices",
    "checkpoint": "Ternary checkpoints",
    "planning": "Sensitivity and plans",
    "evaluation": "Perplexity",
    "corpus": "Stores",
    "text": "Text",
    "statistics": "Statistics",
    "models": "Models",
    "errors": "Errors",
    "other": "Other names",
}
_ENTRY = re.compile(r"^- `(\w+)`: (.*)$")


def _packages() -> list[str]:
    """trilens and the packages that it has as public names."""
    tree = ast.parse((ROOT / "trilens" / "__init__.pyi").read_text(encoding="utf-8"))
    return ["trilens"] + [
        f"trilens.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module is None
        for alias in node.names
    ]


def _defined(package: str) -> Iterator[tuple[str, str]]:
    """Each name of a package and the module that defines it."""
    path = ROOT / package.replace(".", "/")
    if not path.is_dir():  # errors: a file, with the list itself
        for node in ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    yield name, package
        return
    for node in ast.parse((path / "__init__.pyi").read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.ImportFrom)
        if node.module is None:
            continue
        for alias in node.names:
            module = f"{package}.{node.module}"
            if not (ROOT / module.replace(".", "/") / f"{alias.name}.py").exists():
                yield alias.name, module


def public_names() -> dict[str, str]:
    """Each public name, such as `trilens.compare`, and the place of its definition."""
    return {
        f"{package}.{name}": f"{module}.{name}"
        for package in _packages()
        for name, module in _defined(package)
    }


NAMES = public_names()


def pages() -> dict[str, str]:
    """The pages in Markdown; a name stands once, as of the first package that has it."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {page: [] for page in _TITLES}
    for name, defined in NAMES.items():
        if defined not in seen:
            seen.add(defined)
            page = defined.split(".")[1]
            found[page if page in _TITLES else "other"].append(name)
    return {
        page: f"# {_TITLES[page]}\n" + "".join(f"\n::: {name}\n" for name in sorted(names))
        for page, names in found.items()
    }


def linked(text: str) -> str:
    """docs/api.md with each name leading to where the reference has it."""
    first: dict[str, str] = {}
    for name, defined in NAMES.items():
        first.setdefault(defined, name)
    package, lines = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            package = line[3:]
        if entry := _ENTRY.match(line):
            name = first[NAMES[f"{package}.{entry[1]}"]]
            lines.append(f"- [`{entry[1]}`][{name}]: {entry[2]}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
