"""How hard the hostile tests try: a small seeded subset, or all of it with TRILENS_HOSTILE=1."""

import os

FULL = os.environ.get("TRILENS_HOSTILE") == "1"


def scaled(full: int, subset: int) -> int:
    """``full`` under `make test-hostile`, otherwise ``subset``."""
    return full if FULL else subset
