"""Settings for all tests."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A shell that starts tests in the background has them ignore Ctrl-C, and whatever they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# CI runs the same examples each time; a developer's run looks further.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Tables are as wide as in a pipe, whatever terminal the tests run in (xdist says 80 × 24).
os.environ.pop("COLUMNS", None)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The model families' own warnings are not ours to answer for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
