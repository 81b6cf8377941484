"""Small trained models that are included in the package.

The checkpoints are ordinary Hugging Face directories, made to be compressed and measured offline
in seconds. They were trained from scratch on the Python standard library's own sources by
``python -m training.train``; ``python -m training.evaluate`` recomputes a held-out loss.

Importing this package imports nothing heavy (no torch).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trilens.errors import UsageError

__all__ = ["DEMO_MODELS", "demo_path", "training_record"]

DEMO_MODELS: tuple[str, ...] = ("transformer", "mamba", "rwkv7")
"""Names of the checkpoints shipped inside the package."""


def demo_path(name: str = "transformer") -> Path:
    """Return the directory of a shipped checkpoint, ready for ``from_pretrained``.

    Args:
        name: one of :data:`DEMO_MODELS`.

    Raises:
        UsageError: the name is not a shipped model, or its files are missing from this install.
    """
    if name not in DEMO_MODELS:
        known = ", ".join(repr(known_name) for known_name in DEMO_MODELS)
        raise UsageError(f"unknown demo model {name!r}; the shipped ones are: {known}")
    path = Path(__file__).resolve().parent / name
    if not (path / "config.json").is_file():
        raise UsageError(
            f"the demo model {name!r} is missing from this installation (no {name}/config.json "
            "beside trilens.demo); reinstall the package, or train it again with "
            "python -m training.train"
        )
    return path


def training_record(name: str = "transformer") -> dict[str, Any]:
    """Return how a shipped checkpoint was trained and what it measured: its ``training.json``.

    Raises:
        UsageError: as `demo_path`.
    """
    text = (demo_path(name) / "training.json").read_text(encoding="utf-8")
    record: dict[str, Any] = json.loads(text)
    return record
