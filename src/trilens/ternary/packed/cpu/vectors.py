"""Sixteen numbers at a time for numba: what its own compiler does not find by itself.

`Vector` is the numba type of one LLVM vector; the functions below load, compute with and store
vectors in compiled code. All memory is given by address. LLVM maps them to whatever the processor
has: one register of 512 bits, two of 256 or four of 128. Only the two `permute` functions need a
particular instruction set, which they name.

This module needs numba; only `packed_loops` imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "Vector",
    "VectorModel",
    "add",
    "fused",
    "load_floats",
    "load_words",
    "next_number",
    "permute_avx",
    "permute_avx512",
    "prefetch",
    "read",
    "read_byte",
    "read_float",
    "read_word",
    "rounded_bfloat16",
    "rounded_float16",
    "shift",
    "splat",
    "spread_trits",
    "store_bfloat16",
    "store_float16",
    "store_floats",
    "times",
    "transpose",
    "trits_at",
    "write_word",
    "zeros",
]

_LANES = 16
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_FLOATS = ir.VectorType(_F32, _LANES)
_WORDS = ir.VectorType(_I32, _LANES)
_HALVES = ir.VectorType(ir.HalfType(), _LANES)
_EIGHT_FLOATS, _EIGHT_WORDS = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)
_LOW, _HIGH, _BOTH = range(8), range(8, 16), range(16)


class Vector(types.Type):  # type: ignore[misc]
    """The numba type of sixteen float32 ("floats") or sixteen 32-bit numbers ("words")."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        self.llvm = llvm
        super().__init__(name=f"Sixteen {name}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is held as it is."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


_floats, _words, _int, _float = (
    Vector("floats", _FLOATS),
    Vector("words", _WORDS),
    types.int64,
    types.float32,
)


def _operation(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function for compiled code of one that emits LLVM instructions."""

    def wrap(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            found = emit(builder, *values)
            return context.get_dummy_value() if found is None else found

        def operation(_context: Any, *_arguments: Any) -> Any:
            return signature, generate

        operation.__name__ = emit.__name__
        operation.__doc__ = emit.__doc__
        # numba reads off the function which arguments there are
        names = ["context", *(f"a{i}" for i in range(len(signature.args)))]
        operation.__signature__ = Signature(  # type: ignore[attr-defined]
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        return intrinsic(operation)

    return wrap


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _pick(builder: Any, first: Any, second: Any, order: Any) -> Any:
    lanes = ir.Constant(ir.VectorType(_I32, len(order)), list(order))
    return builder.shuffle_vector(first, second, lanes)


def _filled(builder: Any, kind: ir.VectorType, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return _pick(builder, one, one, [0] * kind.count)


def _at(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = align
    return found


def _put(builder: Any, address: Any, value: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def _call(builder: Any, name: str, result: ir.Type, *values: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


@_operation(_int(_int, _int))
def read(builder: Any, address: Any, number: Any) -> Any:
    """The 64-bit number that stands `number` places after the address."""
    offset = builder.mul(number, _I64(8))
    return _at(builder, builder.add(address, offset), _I64, 8)


@_operation(_int(_int))
def next_number(builder: Any, address: Any) -> Any:
    """Counts up the 64-bit number at the address, as one of several threads; the old number."""
    place = builder.inttoptr(address, _I64.as_pointer())
    return builder.atomic_rmw("add", place, _I64(1), "monotonic")


@_operation(_int(_int))
def read_byte(builder: Any, address: Any) -> Any:
    """One byte as a number."""
    return builder.zext(_at(builder, address, _I8, 1), _I64)


@_operation(_int(_int))
def read_word(builder: Any, address: Any) -> Any:
    """32 bits, at any address, as a number without sign."""
    return builder.zext(_at(builder, address, _I32, 1), _I64)


@_operation(types.void(_int, _int))
def write_word(builder: Any, address: Any, value: Any) -> None:
    """Stores the lowest 32 bits of a number."""
    _put(builder, address, builder.trunc(value, _I32), 4)


@_operation(_float(_int))
def read_float(builder: Any, address: Any) -> Any:
    """One float32."""
    return _at(builder, address, _F32, 4)


@_operation(types.void(_int))
def prefetch(builder: Any, address: Any) -> None:
    """Asks for the memory at an address, which need not be anyone's; 64 bytes or so."""
    place = builder.inttoptr(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # to read, to be kept near, data
    builder.call(function, [place, _I32(0), _I32(2), _I32(1)])


@_operation(_floats(_int))
def load_floats(builder: Any, address: Any) -> Any:
    """Sixteen float32."""
    return _at(builder, address, _FLOATS, 4)


@_operation(_words(_int))
def load_words(builder: Any, address: Any) -> Any:
    """Sixteen 32-bit words."""
    return _at(builder, address, _WORDS, 4)


@_operation(types.void(_int, _floats))
def store_floats(builder: Any, address: Any, values: Any) -> None:
    """Stores sixteen float32."""
    _put(builder, address, values, 4)


@_operation(types.void(_int, _floats))
def store_bfloat16(builder: Any, address: Any, values: Any) -> None:
    """Stores the upper halves of sixteen float32 (round them first)."""
    bits = builder.lshr(builder.bitcast(values, _WORDS), _all(_WORDS, 16))
    _put(builder, address, builder.trunc(bits, ir.VectorType(_I16, _LANES)), 2)


@_operation(types.void(_int, _floats))
def store_float16(builder: Any, address: Any, values: Any) -> None:
    """Stores sixteen float32 as float16, rounded to nearest even."""
    _put(builder, address, builder.fptrunc(values, _HALVES), 2)


@_operation(_floats())
def zeros(builder: Any) -> Any:
    """Sixteen zeros."""
    del builder
    return _all(_FLOATS, 0.0)


@_operation(_floats(_float))
def splat(builder: Any, value: Any) -> Any:
    """Sixteen times the same float32."""
    return _filled(builder, _FLOATS, value)


@_operation(_floats(_floats, _floats))
def add(builder: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return builder.fadd(a, b)


@_operation(_floats(_floats, _floats))
def times(builder: Any, a: Any, b: Any) -> Any:
    """a · b."""
    return builder.fmul(a, b)


@_operation(_floats(_floats, _floats, _floats))
def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c; LLVM may round once or twice."""
    return _call(builder, "llvm.fmuladd.v16f32", _FLOATS, a, b, c)


@_operation(_words(_words, _int))
def shift(builder: Any, words: Any, bits: Any) -> Any:
    """All words shifted right."""
    return builder.lshr(words, _filled(builder, _WORDS, builder.trunc(bits, _I32)))


def _as_trits(builder: Any, words: Any) -> Any:
    trits = builder.sub(builder.and_(words, _all(_WORDS, 3)), _all(_WORDS, 1))
    return builder.sitofp(trits, _FLOATS)


@_operation(_floats(_words))
def trits_at(builder: Any, words: Any) -> Any:
    """The lowest two bits of each word, less one, as float32."""
    return _as_trits(builder, words)


@_operation(_floats(_int))
def spread_trits(builder: Any, word: Any) -> Any:
    """The sixteen codes of one word, less one, as float32; the lowest bits first."""
    shifts = ir.Constant(_WORDS, [2 * lane for lane in range(_LANES)])
    words = _filled(builder, _WORDS, builder.trunc(word, _I32))
    return _as_trits(builder, builder.lshr(words, shifts))


@_operation(_floats(_floats, _words))
def permute_avx512(builder: Any, table: Any, words: Any) -> Any:
    """Of a table of 16 float32 the ones that the lowest four bits of each word name. AVX-512."""
    return _call(builder, "llvm.x86.avx512.permvar.sf.512", _FLOATS, table, words)


@_operation(_floats(_floats, _words))
def permute_avx(builder: Any, table: Any, words: Any) -> Any:
    """Of a table of 4, repeated, the ones that the lowest two bits of each word name. AVX."""
    low, high = (
        _call(
            builder,
            "llvm.x86.avx.vpermilvar.ps.256",
            _EIGHT_FLOATS,
            _pick(builder, table, table, half),
            _pick(builder, words, words, half),
        )
        for half in (_LOW, _HIGH)
    )
    return _pick(builder, low, high, _BOTH)


@_operation(_floats(_floats))
def rounded_bfloat16(builder: Any, values: Any) -> Any:
    """Finite values rounded to bfloat16, ties to even."""
    bits = builder.bitcast(values, _WORDS)
    odd = builder.and_(builder.lshr(bits, _all(_WORDS, 16)), _all(_WORDS, 1))
    bits = builder.add(bits, builder.add(odd, _all(_WORDS, 0x7FFF)))
    return builder.bitcast(builder.and_(bits, _all(_WORDS, 0xFFFF0000)), _FLOATS)


@_operation(_floats(_floats))
def rounded_float16(builder: Any, values: Any) -> Any:
    """Values rounded to float16, ties to even; too large ones become Inf."""
    return builder.fpext(builder.fptrunc(values, _HALVES), _FLOATS)


@_operation(types.void(_int, _int, _int))
def transpose(builder: Any, source: Any, stride: Any, out: Any) -> None:
    """64 bytes from each of sixteen rows, turned into sixteen vectors of their words.

    Args:
        builder: (not the caller's)
        source: address of the first row.
        stride: bytes from row to row.
        out: address of the first vector: word 0 of each row; the next ones are 256 bytes apart.
    """
    rows = [
        _at(builder, builder.add(source, builder.mul(stride, _I64(row))), _WORDS, 1)
        for row in range(_LANES)
    ]
    for distance in (8, 4, 2, 1):
        # swap what lies off the diagonal: lanes against rows whose numbers differ in one bit
        upper = [_LANES + j - distance if j & distance else j for j in range(_LANES)]
        lower = [_LANES + j if j & distance else j + distance for j in range(_LANES)]
        for row in range(_LANES):
            if not row & distance:
                a, b = rows[row], rows[row + distance]
                rows[row] = _pick(builder, a, b, upper)
                rows[row + distance] = _pick(builder, a, b, lower)
    for number, vector in enumerate(rows):
        _put(builder, builder.add(out, _I64(256 * number)), vector, 4)
