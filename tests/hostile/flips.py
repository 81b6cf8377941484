"""One wrong bit in what trilens wrote: every one must be noticed."""

from __future__ import annotations

import random
from pathlib import Path

from hostile.outputs import check
from trilens.errors import TrilensError

__all__ = ["unnoticed_flips"]


def unnoticed_flips(place: Path, n: int, seed: int = 0) -> list[str]:
    """Flip one bit at a time, and list those after which the output still passes.

    Args:
        place: a file or folder that `check` knows, undamaged.
        n: how many bits; half of them anywhere, half evenly over the files, so that small ones are
            reached too.
        seed: of the choice.
    """
    check(place)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    sizes = [file.stat().st_size for file in files]
    rng = random.Random(seed)
    passed = []
    for turn in range(n):
        (file,) = rng.choices(files, sizes) if turn % 2 else rng.choices(files)
        bit = rng.randrange(8 * file.stat().st_size)
        _flip(file, bit)
        try:
            check(place)
        except TrilensError:
            pass
        else:
            passed.append(f"bit {bit % 8} of byte {bit // 8} of {file.name}")
        finally:
            _flip(file, bit)
    check(place)
    return passed


def _flip(file: Path, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))
