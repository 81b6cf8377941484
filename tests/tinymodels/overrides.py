"""One table of overrides, gathered from the family files."""

from __future__ import annotations

from typing import Any

from tinymodels import (
    overrides_dense,
    overrides_encdec,
    overrides_hybrid,
    overrides_moe,
    overrides_multimodal,
)

OVERRIDES: dict[str, dict[str, Any]] = {
    **overrides_dense.OVERRIDES,
    **overrides_moe.OVERRIDES,
    **overrides_hybrid.OVERRIDES,
    **overrides_encdec.OVERRIDES,
    **overrides_multimodal.OVERRIDES,
}
AMEND = overrides_multimodal.AMEND
