"""How the library is built: the compiler is told the hash of its sources. Only setuptools asks."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext

__all__ = ["BuildNative"]

_HERE = Path(__file__).parent


class BuildNative(build_ext):  # type: ignore[misc]  # setuptools has no types
    """`build_ext` with the macro TRILENS_SOURCES."""

    def build_extension(self, ext: Any) -> None:
        """Build one library."""
        # By its path: what builds the package has it not installed.
        named = runpy.run_path(str(_HERE / "native_sources.py"))
        ext.define_macros.append(("TRILENS_SOURCES", named["hash_of_sources"](_HERE)))
        super().build_extension(ext)
