"""The hot loops: compiled by numba where it is installed and the work pays for it, else NumPy.

Both give the same bits (`numpy_kernels` fixes the order of every sum): which one ran never
shows.
"""

from __future__ import annotations

import importlib
import importlib.util
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from trilens.errors import UsageError
from trilens.ternary.rules import numba_kernels, numpy_kernels
from trilens.ternary.weights_view import FloatArray

__all__ = ["Backend", "Kernels", "kernels_for", "numba_is_here", "parallel_map"]

Backend: TypeAlias = Literal["auto", "numpy", "compiled"]

_WORTH_COMPILING = 1 << 20  # weights: below, NumPy is done before the compiled code is loaded

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Kernels(Protocol):
    """One implementation of the hot loops; `numpy_kernels` documents each."""

    def abs_sums(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Σ|w| of each unit."""

    def codes(self, x: NDArray[Any], cuts: FloatArray, out: NDArray[np.int8]) -> None:
        """The cell of each weight, counted from the middle one."""

    def cells(
        self, x: FloatArray, cuts: FloatArray
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Count and sum of the weights in each cell."""

    def histogram(
        self, x: FloatArray, base: int, shift: int, n_bins: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Count and sum of the magnitudes in each bin of float32 bit patterns."""

    def best_prefix(self, ascending: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The k that maximises (Σ of the k largest)²/k, and that Σ, per unit."""

    def best_quad(self, ordered: FloatArray) -> NDArray[np.float64]:
        """The d of the levels {−1, 0, 1, 2}·d with the least squared error, per unit."""

    def sorted_cells(
        self,
        ascending: FloatArray,
        prefix: NDArray[np.float64],
        cuts: NDArray[np.float64],
        n_low: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What `cells` gives, from sorted units."""

    def squared_sums(self, x: FloatArray, values: NDArray[np.float32]) -> tuple[float, float]:
        """Σ(x − value)² and Σx²."""

    def coded_sums(
        self, x: NDArray[Any], trits: NDArray[np.int8], factors: NDArray[np.float32], length: int
    ) -> tuple[float, float]:
        """Σ(x − factor · trit)² and Σx²."""

    def fold(self, words: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Levels, a byte each, to two-bit codes."""

    def unfolds(self, packed: NDArray[np.uint8], words: NDArray[np.uint32], levels: int) -> bool:
        """Whether two-bit codes are those of the levels."""

    def two_bit(self, x: NDArray[Any], cut: Any, out: NDArray[np.uint8]) -> None:
        """Two-bit codes of a flat block, four to a byte."""


class _NumPy:
    abs_sums = staticmethod(numpy_kernels.abs_sums)
    codes = staticmethod(numpy_kernels.codes)
    cells = staticmethod(numpy_kernels.cells)
    histogram = staticmethod(numpy_kernels.histogram)
    best_prefix = staticmethod(numpy_kernels.best_prefix)
    best_quad = staticmethod(numpy_kernels.best_quad)
    sorted_cells = staticmethod(numpy_kernels.sorted_cells)
    squared_sums = staticmethod(numpy_kernels.squared_sums)
    coded_sums = staticmethod(numpy_kernels.coded_sums)
    fold = staticmethod(numpy_kernels.fold)
    unfolds = staticmethod(numpy_kernels.unfolds)
    two_bit = staticmethod(numpy_kernels.two_bit)


class _Compiled:
    """Allocates what the compiled loops fill."""

    def __init__(self, numba: ModuleType) -> None:
        importlib.import_module("trilens.ternary.rules.numba_extensions")
        self._abs_sums = _compile(numba, numba_kernels.abs_sums)
        self._codes = _compile(numba, numba_kernels.codes)
        self._cells = _compile(numba, numba_kernels.cells)
        self._histogram = _compile(numba, numba_kernels.histogram)
        self._best_prefix = _compile(numba, numba_kernels.best_prefix)
        self._best_quad = _compile(numba, numba_kernels.best_quad)
        self._sorted_cells = _compile(numba, numba_kernels.sorted_cells)
        self._squared_sums = _compile(numba, numba_kernels.squared_sums)
        self._coded_sums = _compile(numba, numba_kernels.coded_sums)
        self._fold = _compile(numba, numba_kernels.fold)
        self._unfolds = _compile(numba, numba_kernels.unfolds)
        self._two_bit = _compile(numba, numba_kernels.two_bit)

    def abs_sums(self, x: NDArray[Any]) -> NDArray[np.float64]:
        out = np.empty(x.shape[0])
        self._abs_sums(_read_only(x), out)
        return out

    def codes(self, x: NDArray[Any], cuts: FloatArray, out: NDArray[np.int8]) -> None:
        self._codes(_read_only(x), _read_only(cuts), out)

    def cells(
        self, x: FloatArray, cuts: FloatArray
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        shape = (x.shape[0], cuts.shape[1] + 1)
        counts, sums = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        self._cells(_read_only(x), _read_only(cuts), counts, sums)
        return counts, sums

    def histogram(
        self, x: FloatArray, base: int, shift: int, n_bins: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        counts, sums = np.zeros(n_bins, dtype=np.int64), np.zeros(n_bins)
        with np.errstate(over="ignore", under="ignore"):
            bits = x.astype(np.float32, copy=False).view(np.int32)
        self._histogram(_read_only(bits), _read_only(x), base, shift, counts, sums)
        return counts, sums

    def best_prefix(self, ascending: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        best, total = np.empty(len(ascending), dtype=np.int64), np.empty(len(ascending))
        self._best_prefix(_read_only(ascending), best, total)
        return best, total

    def best_quad(self, ordered: FloatArray) -> NDArray[np.float64]:
        out = np.empty(len(ordered))
        self._best_quad(_read_only(ordered), out)
        return out

    def sorted_cells(
        self,
        ascending: FloatArray,
        prefix: NDArray[np.float64],
        cuts: NDArray[np.float64],
        n_low: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        shape = (cuts.shape[0], cuts.shape[1] + 1)
        counts, sums = np.empty(shape, dtype=np.int64), np.empty(shape)
        self._sorted_cells(_read_only(ascending), prefix, _read_only(cuts), n_low, counts, sums)
        return counts, sums

    def squared_sums(self, x: FloatArray, values: NDArray[np.float32]) -> tuple[float, float]:
        out = np.empty(2)
        self._squared_sums(_read_only(x), values, out)
        return float(out[0]), float(out[1])

    def coded_sums(
        self, x: NDArray[Any], trits: NDArray[np.int8], factors: NDArray[np.float32], length: int
    ) -> tuple[float, float]:
        out = np.empty(2)
        self._coded_sums(_read_only(x), _read_only(trits), _read_only(factors), length, out)
        return float(out[0]), float(out[1])

    def fold(self, words: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        self._fold(_read_only(words), out)

    def unfolds(self, packed: NDArray[np.uint8], words: NDArray[np.uint32], levels: int) -> bool:
        out = np.zeros(1, dtype=np.bool_)
        self._unfolds(_read_only(packed), _read_only(words), levels, out)
        return bool(out[0])

    def two_bit(self, x: NDArray[Any], cut: Any, out: NDArray[np.uint8]) -> None:
        self._two_bit(_read_only(x), cut, out)


def numba_is_here() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def kernels_for(n_weights: int, backend: Backend = "auto") -> Kernels:
    """The implementation to use for so many weights.

    Args:
        n_weights: Small tensors do not wait for the compiler.
        backend: "auto", or one of them for comparison.

    Raises:
        UsageError: "compiled" without numba, or an unknown backend.
    """
    if backend not in {"auto", "numpy", "compiled"}:
        raise UsageError(f"backend {backend!r} is unknown: pass 'auto', 'numpy' or 'compiled'")
    if backend == "numpy" or (backend == "auto" and n_weights < _WORTH_COMPILING):
        return _NumPy()
    compiled = _compiled() if numba_is_here() else None
    if compiled is None and backend == "compiled":
        raise UsageError("backend 'compiled' needs numba, which cannot be used: pip install numba")
    return compiled or _NumPy()


def parallel_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, parallel: bool = True
) -> list[_Result]:
    """`function` of every item, in order, on as many threads as torch may use.

    The caller's thread works too, begins at once, and waits only for items that another thread is
    at: one that the system has not let begin by then, beside other work, is not waited for. The
    others are for this call only: numba's own would abort the process when two callers meet, or
    after a fork.

    Raises: what `function` raised for the first item that failed.
    """
    waiting = list(items)
    n_threads = min(torch.get_num_threads(), len(waiting)) if parallel else 1
    if n_threads < 2:
        return [function(item) for item in waiting]
    results: list[_Result | None] = [None] * len(waiting)
    failures: dict[int, BaseException] = {}
    numbers = deque(range(len(waiting)))
    begun: list[Lock] = []

    def work() -> None:
        while not failures:
            try:
                number = numbers.popleft()
            except IndexError:
                return
            try:
                results[number] = function(waiting[number])
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                failures[number] = error

    def other() -> None:
        at_work = Lock()
        with at_work:
            begun.append(at_work)
            work()

    # Not `Thread.start`, which waits until the thread runs.
    with suppress(RuntimeError):  # the system has no more threads
        for _ in range(n_threads - 1):
            start_new_thread(other, ())
    try:
        work()
    finally:
        numbers.clear()  # after a failure; who begins now finds nothing
        for at_work in list(begun):
            with at_work:
                pass
    if failures:
        raise failures[min(failures)]
    return cast("list[_Result]", results)


@cache
def _compiled() -> _Compiled | None:
    try:
        return _Compiled(importlib.import_module("numba"))
    except ImportError:  # there, but not for this NumPy or Python
        return None


def _compile(numba: ModuleType, loop: Callable[..., None]) -> Any:
    try:
        return numba.njit(loop, nogil=True, cache=True)
    except RuntimeError:  # numba finds no directory that it may write its cache to
        return numba.njit(loop, nogil=True)


def _read_only(x: NDArray[Any]) -> NDArray[Any]:
    """The same memory flagged read-only: numba compiles once more for the other flag."""
    view = x.view()
    view.flags.writeable = False
    return view
