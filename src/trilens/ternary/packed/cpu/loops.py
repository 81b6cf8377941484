"""The compiled loops over packed codes, by name, and which of them this processor can run.

Needs numba: `thread_pool` imports this module where numba is installed. numba keeps compiled loops
beside the file of each; it does not see that another file, such as `vectors`, has changed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding
from numba import cfunc
from numba.core import config

from trilens.ternary.packed.cpu.jobs import JOB
from trilens.ternary.packed.cpu.multiply import (
    multiply_any,
    multiply_pairs,
    multiply_singles,
    prepare_pairs,
)
from trilens.ternary.packed.cpu.unpack import unpack

__all__ = ["JOB", "LOOPS", "compile_loop", "methods_here"]

LOOPS = {
    "multiply_pairs": multiply_pairs,
    "multiply_singles": multiply_singles,
    "multiply_any": multiply_any,
    "prepare_pairs": prepare_pairs,
    "unpack": unpack,
}


def methods_here() -> tuple[str, ...]:
    """The ways to multiply that this processor has, the fastest first; none on x86 without F16C.

    There LLVM calls a library function for float16 that numba does not have, and the process ends.
    """
    if config.CPU_FEATURES is not None:  # set by the user, for numba
        features = set(config.CPU_FEATURES.split(","))
    elif config.CPU_NAME == "generic":
        features = set()
    else:
        features = {f"+{name}" for name, on in binding.get_host_cpu_features().items() if on}
    if binding.get_process_triple().startswith(("x86_64", "i")) and "+f16c" not in features:
        return ()
    found = []
    if "+avx512f" in features:
        found.append("pairs")
    if "+avx" in features:
        found.append("singles")
    return (*found, "any")


def compile_loop(name: str) -> Any:
    """A loop as a compiled function for C, to be called with the address of a job.

    Compiling takes seconds, once: the result is kept where numba keeps such things.
    """
    try:
        return cfunc("void(int64)", cache=True)(LOOPS[name])
    except RuntimeError:  # numba finds no directory that it may write to
        return cfunc("void(int64)")(LOOPS[name])
