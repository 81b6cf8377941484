"""Colours of pictures without a script: those of the page in its light scheme.

Blue and orange part for every kind of colour vision; ramps are even in lightness.
"""

from __future__ import annotations

__all__ = ["BLUES", "INK", "ORANGES", "SERIES", "SOFT"]

BLUES = ("#ffffff", "#cfe3f5", "#8fbfe3", "#4a90c8", "#1c5fa5", "#08306b")
"""From nothing to the largest."""

ORANGES = ("#ffffff", "#fde0c8", "#fbb77f", "#ee8234", "#c4530a", "#7f2704")
"""From nothing to the lowest."""

SERIES = ("#0b5cad", "#c2410c", "#00795b", "#a3468a", "#9a6700", "#3a8fc4")
"""Of lines that stand together; every second one is dashed, too."""

INK = "#1c2128"
SOFT = "#59636e"
