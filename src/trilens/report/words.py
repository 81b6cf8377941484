"""How tokens and numbers are written, in every report."""

from __future__ import annotations

import math

from trilens.printable import escaped

__all__ = ["four_digits", "horizon", "percent", "signed", "token_text", "visible"]

_ESCAPES = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}
_TOKEN_WIDTH = 48


def visible(token: str, width: int = 14) -> str:
    """A token as one visible word: white space drawn, long tokens cut."""
    shown = "".join(_ESCAPES.get(char, char if char.isprintable() else "·") for char in token)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def token_text(token: str, width: int = _TOKEN_WIDTH) -> str:
    r"""A token for a page: longer than `visible`, unseen characters as ``\u202e``."""
    shown = "".join(_ESCAPES.get(char) or _seen(char) for char in token[: 2 * width])
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _seen(char: str) -> str:
    if char.isprintable():
        return escaped(char)
    code = ord(char)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def signed(weight: float) -> str:
    """A weight with its sign, three digits whatever its size."""
    return f"{weight:+.3g}".replace("-", "−")


def percent(share: float) -> str:
    """A share, as whole percents."""
    return f"{share:.0%}"


def horizon(tokens: float) -> str:
    """A memory horizon in tokens."""
    return "∞" if math.isinf(tokens) else f"{tokens:,.1f}" if tokens < 100 else f"{tokens:,.0f}"


def four_digits(value: float) -> str:
    """Four digits, in the form that reads best."""
    if value == 0 or not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "0" if value == 0 else "NaN")
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
