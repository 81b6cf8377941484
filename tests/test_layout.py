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

# By package or module; the longest prefix wins. Equal floors may import each other as long as no
# cycle arises.
FLOORS = {
    "errors": 0,
    "arrow": 0,
    "axes": 0,
    "numbers": 0,
    "printable": 0,
    "progress": 0,
    "results": 0,
    "version": 0,
    "io": 1,
    "text": 2,
    "statistics": 2,
    "edits": 3,
    "caches.indices": 2,
    "caches.storage": 2,
    "caches.gate_functions": 2,
    "caches.patterns": 3,
    "caches": 4,
    "ternary.weights_view": 2,
    "ternary.rotation": 2,
    "ternary.codecs": 2,
    "ternary.granularity": 3,
    "ternary.rules": 4,
    "ternary.quantize": 5,
    "ternary.histogram": 6,
    "ternary.calibrated": 6,
    "ternary.packed": 6,
    "ternary": 7,
    "models.rwkv7": 8,
    "models": 9,
    "models.gates": 10,
    "models.sites": 11,
    "taps": 11,
    "lens": 12,
    "evaluation": 13,
    "workers": 3,
    "checkpoint.format": 14,
    "checkpoint.bitnet": 14,
    "checkpoint.float8": 14,
    "checkpoint.scaled": 14,
    "checkpoint.source": 15,
    "checkpoint.rotation": 15,
    "checkpoint.output_folder": 15,
    "checkpoint.evaluate": 15,
    "checkpoint.coding": 16,
    "checkpoint.arriving": 17,
    "checkpoint.validation": 17,
    "checkpoint.job": 17,
    "checkpoint.auxiliary_files": 18,
    "checkpoint.packed_loading": 18,
    "checkpoint.packed_experts": 18,
    "checkpoint.integration": 18,
    "checkpoint.calibration": 18,
    "checkpoint.gguf": 18,
    "checkpoint": 19,
    "planning": 20,
    "analysis": 20,
    "corpus": 20,
    "report": 21,
    "demo": 22,
    "cli.console": 22,
    "cli.interrupts": 21,
    "cli.streams": 21,
    "cli.lazy": 22,
    "cli.errors": 22,
    "cli.groups": 22,
    "cli.options": 22,
    "cli.store_options": 22,
    "cli.pages": 22,
    "explorer": 22,
    "cli.run": 23,
    "cli.commands": 23,
    "cli": 24,
    "__main__": 24,
    "registration": 20,
    "": 24,
}

# Arrows that are drawn at run time and go up, with the reason.
UPWARD: dict[tuple[str, str], str] = {}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = path
    return found


MODULES = modules()


def floor(name: str) -> int:
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return FLOORS[next((prefix for prefix in prefixes if prefix in FLOORS), parts[0])]


def resolved(name: str) -> str:
    """The module of a dotted name, which may go on with a name in it; without "trilens"."""
    inner = name.removeprefix("trilens").lstrip(".")
    while inner and inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner


def imports(path: Path) -> list[tuple[str, bool]]:
    """Internal modules a file imports or loads by name, and whether at the top of the file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [
                value.value
                for value in (*node.args, *(keyword.value for keyword in node.keywords))
                if isinstance(value, ast.Constant) and names_a_module(value.value)
            ]
        found += [
            (resolved(name), id(node) in top) for name in names if name.split(".")[0] == "trilens"
        ]
    return found


def names_a_module(value: object) -> bool:
    return isinstance(value, str) and value.startswith("trilens.") and bool(resolved(value))


def test_every_floor_names_something() -> None:
    rooms = {".".join(name.split(".")[:n]) for name in MODULES for n in range(1, 4)}
    assert set(FLOORS) <= rooms | {""}
    drawn = {(name, i) for name, path in MODULES.items() for i, _ in imports(path)}
    assert set(UPWARD) <= drawn


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_or_stay_on_the_floor(name: str) -> None:
    for imported, _ in imports(MODULES[name]):
        if (name, imported) not in UPWARD:
            assert floor(imported) <= floor(name), f"{name} imports {imported} from a higher floor"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("from trilens import errors", [("errors", True)]),
        ("from trilens import __version__", [("", True)]),
        ("import trilens.io.json", [("io.json", True)]),
        ("from trilens.io.json import json_text", [("io.json", True)]),
        ("from trilens.caches import patterns", [("caches.patterns", True)]),
        ("import os\nos.path.join('trilens.io')", [("io", False)]),
        ("import_module('trilens.cli.main')", [("cli.main", False)]),
        ("lazy(name='trilens.caches.storage:Cache')", [("caches", False)]),
        ("print('trilens.json', 'trilens')", []),
    ],
)
def test_what_counts_as_an_import(
    source: str, wanted: list[tuple[str, bool]], tmp_path: Path
) -> None:
    path = tmp_path / "x.py"
    path.write_text(source)
    assert imports(path) == wanted


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
    assert lines <= 400, f"{name} has {lines} lines: cut it where its subjects part"
