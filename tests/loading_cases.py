"""Loading that is refused."""

from __future__ import annotations

import os
from typing import Any

import pytest

from trilens.models.loading import load

__all__ = ["refused"]


def refused(error: type[Exception], path: str | os.PathLike[str], **options: Any) -> str:
    """The one line that says why a checkpoint is not loaded."""
    with pytest.raises(error) as caught:
        load(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 700
    return message
