"""Compiled loops that several threads run at once, on as many as torch may use.

`packed_loops` is imported, and each loop compiled, when it is first asked for.
"""

from __future__ import annotations

import ctypes
import importlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch

from trilens.errors import UsageError
from trilens.ternary.rules.kernels import numba_is_here, parallel_map

__all__ = ["Job", "Loop", "find_loop", "make_job", "methods", "run_job"]


Job: TypeAlias = "array[int]"
"""Numbers and addresses of 64 bits; the first says how much of it is done."""


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """A compiled loop, to be called with the address of a job (by `run_job`).

    Attributes:
        call: calls it from Python, without the interpreter lock.
        address: where its code is.
        compiled: what owns the code.
    """

    call: Callable[[int], None]
    address: int
    compiled: Any


@cache
def methods() -> tuple[str, ...]:
    """The ways to multiply that are there, the fastest first; none without numba."""
    loops = _loops()
    return () if loops is None else tuple(loops.methods_here())


@cache
def find_loop(name: str) -> Loop:
    """A loop of `packed_loops`, compiled.

    Raises:
        UsageError: no numba: there are no `methods` then.
    """
    loops = _loops()
    if loops is None:
        raise UsageError(f"loop {name!r} needs numba, which cannot be used: pip install numba")
    compiled = loops.compile_loop(name)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    return Loop(call, compiled.address, compiled)


def make_job(fields: Mapping[str, int]) -> Job:
    """A job from the fields of `packed_loops.JOB`; those left out are 0."""
    return array("q", [fields.get(name, 0) for name in _loops().JOB])


def run_job(loop: Loop, job: Job, n_threads: int = 1) -> None:
    """Runs a loop until its job is done.

    Args:
        loop: from `find_loop`.
        job: from `make_job`. What it points to must live.
        n_threads: threads that are worth it; torch's limit holds.
    """
    job[0] = 0  # nothing of it is done
    address = job.buffer_info()[0]
    n_threads = 1 if n_threads < 2 else min(n_threads, torch.get_num_threads())
    if n_threads < 2:
        loop.call(address)
        return
    pool = _openmp()
    if pool is not None:
        pool(loop.address, address, n_threads, 0)
    else:
        parallel_map(loop.call, [address] * n_threads)


@cache
def _loops() -> Any:
    if not numba_is_here():
        return None
    try:
        return importlib.import_module("trilens.ternary.packed.cpu.loops")
    except ImportError:  # numba is there, but not for this NumPy or Python
        return None


@cache
def _openmp() -> Callable[..., None] | None:
    """The way into the threads that torch keeps ready, where it uses GNU's or LLVM's OpenMP.

    Threads of our own would take as long to start as a whole multiplication.
    """
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found
