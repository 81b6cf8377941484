"""Tutorials: the scripts of examples/, cell by cell, with what each cell prints.

A script begins with a docstring, its cells with `# %% Title`. What it prints is kept in
examples/printed/, a file a script, cells apart as in the script; tests run the scripts and compare.
`python -m website.tutorials` writes it anew.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EXAMPLES", "Cell", "Script", "read_script", "run_script", "shown_of", "tutorial"]

EXAMPLES = Path(__file__).parents[1] / "examples"
_CELL = re.compile(r"^# %% (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Cell:
    """One step of a script; `line` is where its code begins."""

    title: str
    code: str
    line: int


@dataclass(frozen=True, slots=True)
class Script:
    """A script of examples/: what it shows, and its cells."""

    name: str
    subject: str
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """The name, as a heading."""
        return self.name.replace("_", " ").capitalize()


def read_script(name: str) -> Script:
    """A script of examples/ by its name without `.py`."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    subject = ast.get_docstring(ast.parse(text))
    assert subject, f"examples/{name}.py has no docstring"
    found = list(_CELL.finditer(text))
    ends = [each.start() for each in found[1:]] + [len(text)]
    cells = tuple(
        Cell(each[1], text[each.end() + 1 : end].strip("\n"), text[: each.end()].count("\n") + 2)
        for each, end in zip(found, ends, strict=True)
    )
    return Script(name, subject, cells)


def run_script(script: Script) -> tuple[dict[str, object], list[str]]:
    """Run the cells in one namespace: the namespace, and what each cell printed."""
    names: dict[str, object] = {"__name__": "__main__"}
    printed = []
    for cell in script.cells:
        out = io.StringIO()
        code = "\n" * (cell.line - 1) + cell.code
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(EXAMPLES / f"{script.name}.py"), "exec"), names)
        printed.append(out.getvalue())
    return names, printed


def shown_of(script: Script) -> list[str]:
    """What each cell is said to print."""
    text = (EXAMPLES / "printed" / f"{script.name}.txt").read_text(encoding="utf-8")
    parts = _CELL.split(text)[1:]
    assert parts[::2] == [cell.title for cell in script.cells], (
        f"examples/printed/{script.name}.txt"
    )
    return [part.strip("\n") for part in parts[1::2]]


def tutorial(script: Script) -> str:
    """The page of a script, in Markdown."""
    parts = [
        f"# {script.title}\n\n{script.subject}\n\nThe script is `examples/{script.name}.py`.\n"
    ]
    for cell, shown in zip(script.cells, shown_of(script), strict=True):
        parts.append(f"\n## {cell.title}\n\n```python\n{cell.code}\n```\n")
        if shown:
            parts.append(f"\n```text\n{shown}\n```\n")
    return "".join(parts)


def main() -> None:
    """Run every script and write down what it prints."""
    for path in sorted(EXAMPLES.glob("*.py")):
        script = read_script(path.stem)
        _, printed = run_script(script)
        text = "".join(
            f"# %% {cell.title}\n{shown}" for cell, shown in zip(script.cells, printed, strict=True)
        )
        (EXAMPLES / "printed" / f"{script.name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
