"""The house stands on its floors: imports go down, no cycles, `__all__` is true."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trilens

SRC = Path(trilens.__file__).parent

# The longest prefix wins. Equal floors may import each other as long as no cycle arises.
FLOORS = {
    "errors": 0,
    "axes": 0,
    "numbers": 0,
    "progress": 0,
    "results": 0,
    "version": 0,
    "io": 0,
    "statistics": 1,
    "caches": 1,
    "ternary": 1,
    "text": 1,
    "models": 2,
    "taps": 3,
    "lens": 4,
    "evaluation": 5,
    "checkpoint": 6,
    "planning": 7,
    "analysis": 7,
    "report": 8,
    "demo": 9,
    "cli": 10,
    "__main__": 10,
    "registration": 10,
    "": 10,
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = path
    return found


MODULES = modules()


def floor(name: str) -> int:
    return FLOORS[name.partition(".")[0]]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Internal modules a file imports, and whether at the top of the file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trilens":
            base = (node.module or "").removeprefix("trilens").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                names.append(full if full in MODULES else base)
        elif isinstance(node, ast.Import):
            names = [
                alias.name.removeprefix("trilens").lstrip(".")
                for alias in node.names
                if alias.name.split(".")[0] == "trilens"
            ]
        found += [(name, id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_or_stay_on_the_floor(name: str) -> None:
    for imported, _ in imports(MODULES[name]):
        assert floor(imported) <= floor(name), f"{name} imports {imported} from a higher floor"


@pytest.mark.parametrize("name", MODULES)
def test_no_internal_import_inside_a_function(name: str) -> None:
    guarded = ast.parse(MODULES[name].read_text())
    for node in ast.walk(guarded):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
            assert not [n for n in inner if (n.module or "").startswith("trilens")], name


def test_no_cycles() -> None:
    graph = {name: {imported for imported, _ in imports(path)} for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError on a cycle
    assert set(order) >= set(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_all_is_explicit_and_true(name: str) -> None:
    if name == "ternary.packed.gpu.kernels" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed here: `make test-gpu` installs it")
    module = importlib.import_module(f"trilens.{name}".rstrip("."))
    tree = ast.parse(MODULES[name].read_text())
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    }
    listed = getattr(module, "__all__", None)
    assert listed is not None, f"{name} has no __all__"
    assert len(listed) == len(set(listed))
    for attribute in listed:
        assert hasattr(module, attribute), f"{name}.__all__ names {attribute}, which is not there"
    assert public <= set(listed), f"{name} hides {sorted(public - set(listed))} from __all__"


@pytest.mark.parametrize("name", MODULES)
def test_files_have_one_subject(name: str) -> None:
    lines = MODULES[name].read_text().count("\n")
    assert lines <= 450, f"{name} has {lines} lines: cut it where its subjects part"
