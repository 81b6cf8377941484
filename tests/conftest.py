"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# CI runs the same examples each time; a developer's run looks further.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
