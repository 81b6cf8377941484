"""How hard the hostile tests try: a few seconds by default, minutes where TRILENS_HOSTILE=1."""

from __future__ import annotations

import os

__all__ = ["HOSTILE", "scaled"]

HOSTILE = os.environ.get("TRILENS_HOSTILE") == "1"


def scaled(few: int, many: int) -> int:
    """The number of inputs, kills or flips: `few` in a normal run, `many` in a hostile one."""
    return many if HOSTILE else few
