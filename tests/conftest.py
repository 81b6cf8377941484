"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# CI runs the same examples each time; a developer's run looks further.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Tables are as wide as in a pipe, whatever terminal the tests run in (xdist says 80 × 24).
os.environ.pop("COLUMNS", None)
