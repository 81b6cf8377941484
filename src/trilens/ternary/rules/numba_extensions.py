"""What numba makes of the two names in `numba_kernels` that are no Python; imported where it is.

LLVM takes half of AVX-512's width on Intel's processors, whose first ones slowed down with all of
it. Loops that wait for memory take a sixth less time at full width: fewer instructions a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic, overload

from trilens.ternary.rules.numba_kernels import number, widest_vectors

__all__: list[str] = []


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


# Called, not put above the functions: numba has no types.
overload(number)(_number)
overload(widest_vectors)(_widest_vectors)
