"""How hard the hostile tests try: a small seeded subset, or with TRILENS_HOSTILE=1 the whole of it."""

import os

FULL = os.environ.get("TRILENS_HOSTILE") == "1"


def scaled(full: int, subset: int) -> int:
    """``full`` under `make test-hostile`, otherwise ``subset``."""
    return full if FULL else subset
