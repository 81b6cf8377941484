"""The demo models as lenses, in float64: parity tests need digits."""

from __future__ import annotations

from functools import cache

import trilens

__all__ = ["demo_lens"]


@cache
def demo_lens(name: str = "transformer", dtype: str = "float64") -> trilens.Lens:
    return trilens.Lens.from_pretrained(trilens.demo_path(name), dtype=dtype)
