"""What numba makes of the names in `numba_kernels` that are no Python; imported where it is.

LLVM takes half of AVX-512's width on Intel's processors, whose first ones slowed down with all of
it. Loops that wait for memory take a sixth less time at full width: fewer instructions a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from trilens.ternary.rules.numba_kernels import ask_for, number, total, widest_vectors

__all__: list[str] = []

_AHEAD = 1024  # numbers: a page of float32
_LINE = 64  # bytes of the cache


def _number(stored: Any) -> Callable[[Any], Any]:
    def of_bits(stored: Any) -> Any:
        return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)

    def as_it_is(stored: Any) -> Any:
        return stored

    return of_bits if stored == types.uint16 else as_it_is


def _with_attribute(typing_context: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature, arguments
        attributes = builder.function.attributes
        attributes.add("noinline")  # inlined, it would get the attributes of its caller
        set.add(attributes, '"prefer-vector-width"="512"')  # `add` knows no attributes with values
        return context.get_dummy_value()

    return types.void(), generate


_set_widest: Any = intrinsic(_with_attribute)


def _widest_vectors() -> Callable[[], None]:
    def widest() -> None:
        _set_widest()

    return widest


def _with_prefetch(typing_context: Any, x: Any, index: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = cgutils.get_item_pointer(
            context, builder, signature.args[0], array, [arguments[1]], wraparound=False
        )
        word, address = ir.IntType(32), ir.IntType(8).as_pointer()
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", (address,), ir.FunctionType(ir.VoidType(), [address, word, word, word])
        )
        to_read, into_all_caches, data = word(0), word(3), word(1)
        builder.call(prefetch, [builder.bitcast(at, address), to_read, into_all_caches, data])
        return context.get_dummy_value()

    return types.void(x, index), generate


_prefetch: Any = intrinsic(_with_prefetch)


def _ask_for(x: Any, begin: Any, end: Any) -> Callable[[Any, Any, Any], None]:
    del begin, end
    line = _LINE // (x.dtype.bitwidth // 8)

    def ask(x: Any, begin: Any, end: Any) -> None:
        # Past the end there is nothing to bring, and no harm in asking.
        for at in range(begin + _AHEAD, end + _AHEAD, line):
            _prefetch(x, at)

    return ask


def _total(lanes: Any) -> Callable[[Any], Any]:
    del lanes
    return total


# Called, not put above the functions: numba has no types.
overload(number)(_number)
overload(widest_vectors)(_widest_vectors)
overload(ask_for)(_ask_for)
overload(total)(_total)
