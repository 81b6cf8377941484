"""What is public is said, documented, and takes its options by keyword."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import trilens
from api_page import PACKAGES, PAGE, SITES_PAGE, names, page, sites_table

# Where a class of torch or transformers fixes the signature.
FOREIGN = {"TernaryLinear", "TrilensConfig"}


def public() -> Iterator[tuple[str, object]]:
    seen: set[int] = set()
    for package in PACKAGES:
        for name, value in names(package).items():
            if id(value) not in seen:
                seen.add(id(value))
                yield name, value


def callables() -> Iterator[tuple[str, object]]:
    for name, value in public():
        if not callable(value) or name in FOREIGN or typing.get_origin(value) is not None:
            continue
        if not inspect.isclass(value):
            yield name, value
            continue
        if issubclass(value, Exception) or getattr(value, "_is_protocol", False):
            continue
        if not dataclasses.is_dataclass(value):
            yield name, value
        for method in vars(value):
            if not method.startswith("_") and callable(getattr(value, method)):
                yield f"{name}.{method}", getattr(value, method)


CALLABLES = dict(callables())


def test_docs_list_what_is_public() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/api_page.py"
    assert not [line for line in page().splitlines() if line.endswith(": ")]


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "trilens.errors"])
def test_the_stub_says_what_the_package_has(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).with_suffix(".pyi").read_text())
    stub = {alias.asname for node in tree.body for alias in node.names}
    assert stub == set(module.__all__) <= set(dir(module))
    for node in tree.body:
        if node.module:  # the name's own file calls it public too
            assert node.names[0].name in importlib.import_module(f"{package}.{node.module}").__all__
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_called_as_what_it_gives(package: str) -> None:
    """Whoever imported the file would put it where the package's own name stands."""
    module = importlib.import_module(package)
    for name in module.__all__:
        file = (
            importlib.util.find_spec(f"{package}.{name}") if hasattr(module, "__path__") else None
        )
        assert file is None or inspect.ismodule(getattr(module, name)), f"{package}.{name}"


def test_every_error_is_public() -> None:
    assert all(
        issubclass(error, trilens.TrilensError | UserWarning)
        for error in names("trilens.errors").values()
    )
    tree = trilens.errors.__doc__ or ""
    assert all(name in tree for name in trilens.errors.__all__)


@pytest.mark.parametrize("name", CALLABLES)
def test_options_are_given_by_keyword(name: str) -> None:
    parameters = inspect.signature(CALLABLES[name]).parameters.values()
    by_position = [
        parameter
        for parameter in parameters
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in {"self", "cls"}
    ]
    assert len(by_position) <= 5, f"{name} takes {len(by_position)} arguments by position"
    for parameter in by_position:
        is_switch = isinstance(parameter.default, bool) or parameter.annotation in {bool, "bool"}
        assert not is_switch, f"{name}({parameter.name}=…) is an option"


@pytest.mark.parametrize("name", CALLABLES)
def test_every_public_callable_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(CALLABLES[name]), name


def test_the_page_of_sites_is_made_from_their_table() -> None:
    assert SITES_PAGE.read_text(encoding="utf-8").endswith("\n\n" + sites_table())
