"""Vectors of 16 lanes for Numba kernels: one AVX-512 register of float32, or two of AVX, or four.

Owns the vector type, its loads, stores and arithmetic; knows no scan. LLVM does not vectorise a
loop over 16 channels reliably (it cannot prove that the arrays are apart, and tests it at run time
in every step of the scan); values of this type are registers from the start. float32 or float64;
an int16 array is read and written as bfloat16, which NumPy does not have, and is float32 between.

Numba's cache of a kernel does not see a change in this file: touch the kernels' files after one.
"""

import operator
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, overload, register_model

from mtair.scan.kernel_cache import ensure_kernel_cache

__all__ = [
    "LANES",
    "exp2",
    "float_mode",
    "flush_denormals",
    "gelu",
    "load",
    "prefetch",
    "sigmoid",
    "softplus",
    "splat",
    "spread",
    "store",
    "total",
]

ensure_kernel_cache()  # every file with kernels begins with these vectors

LANES = 16
intrinsic: Any = _intrinsic  # its own types describe the code generator, not what kernels call
# Not of fastmath: reassociation, contraction to fused multiply-adds, approximate division. LLVM
# optimises a parallel loop's body once more for the copy that Numba caches, and would choose anew:
# the process that compiled would give other bits than those that find its cache.
_FAST = ("nnan", "ninf", "nsz")
_INT = ir.IntType(32)
_INTS = ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


class Vector(types.Type):
    """LANES numbers of one type in a register."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Vector({element}, {LANES})")


def _element(element: Any) -> Any:
    return ir.DoubleType() if element == types.float64 else ir.FloatType()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_element(kind.element), LANES))


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * LANES)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, to: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [ir.Constant(_INT, value)] * LANES)


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """The vector at array[index : index + LANES], a contiguous one-dimensional array."""
    del typingctx, index
    bfloat16 = array.dtype == types.int16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _HALVES if bfloat16 else context.get_value_type(signature.return_type)
        pointer = _pointer(context, builder, signature.args[0], *args, vector)
        value = builder.load(pointer, align=array.dtype.bitwidth // 8)
        if not bfloat16:
            return value
        bits = builder.shl(builder.zext(value, _INTS), _ints(16))
        return builder.bitcast(bits, ir.VectorType(ir.FloatType(), LANES))

    return Vector(types.float32 if bfloat16 else array.dtype)(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write the vector to array[index : index + LANES]; as bfloat16 the nearest, ties to even."""
    del typingctx, index
    bfloat16 = array.dtype == types.int16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        value = args[2]
        if bfloat16:
            bits = builder.bitcast(value, _INTS)
            odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
            bits = builder.add(builder.add(bits, _ints(0x7FFF)), odd)
            value = builder.trunc(builder.lshr(bits, _ints(16)), _HALVES)
        pointer = _pointer(context, builder, signature.args[0], *args[:2], value.type)
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)

    return types.void(array, types.intp, vector), codegen


@intrinsic
def splat(typingctx: Any, scalar: Any) -> Any:
    """The number in every lane."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], context.get_value_type(signature.return_type))

    return Vector(scalar)(scalar), codegen


@intrinsic
def total(typingctx: Any, vector: Any) -> Any:
    """The sum of the lanes, in halves: always the same order."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            low, high = (
                builder.shuffle_vector(
                    value, value, ir.Constant(ir.VectorType(_INT, width), range_)
                )
                for range_ in (list(range(width)), list(range(width, 2 * width)))
            )
            value = builder.fadd(low, high, flags=_FAST)
        return builder.extract_element(value, ir.Constant(_INT, 0))

    return vector.element(vector), codegen


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


@intrinsic
def spread(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] in every lane; unlike the array's own subscript it takes no negative index."""
    del typingctx, index

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        number = builder.load(builder.gep(data, [args[1]]))
        return _splat(builder, number, context.get_value_type(signature.return_type))

    return Vector(array.dtype)(array, types.intp), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index]; any index will do."""
    del typingctx, index

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        pointer = _pointer(context, builder, signature.args[0], *args, ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, keep, data = (ir.Constant(_INT, x) for x in (0, 3, 1))
        builder.call(call, [pointer, read, keep, data])

    return types.void(array, types.intp), codegen


_X86 = platform.machine() in ("x86_64", "AMD64")
_FLUSH = 0x8040  # MXCSR: denormal results and operands are 0 (Intel SDM, volume 1, 10.2.3)


def _control_register(builder: Any, instruction: str, slot: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
    name = f"llvm.x86.sse.{instruction}"
    call = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.call(call, [builder.bitcast(slot, ir.IntType(8).as_pointer())])


@intrinsic
def flush_denormals(typingctx: Any) -> Any:
    """Take denormal floats for 0 in this thread until `float_mode` is given what this returns.

    A state that fades out is one for thousands of steps, each several times slower. x86 only.
    """
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature, args
        if not _X86:
            return ir.Constant(_INT, 0)
        slot = cgutils.alloca_once(builder, _INT)
        _control_register(builder, "stmxcsr", slot)
        before = builder.load(slot)
        builder.store(builder.or_(before, ir.Constant(_INT, _FLUSH)), slot)
        _control_register(builder, "ldmxcsr", slot)
        return before

    return types.int32(), codegen


@intrinsic
def float_mode(typingctx: Any, before: Any) -> Any:
    """Undo `flush_denormals`."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        del context, signature
        if _X86:
            slot = cgutils.alloca_once(builder, _INT)
            builder.store(args[0], slot)
            _control_register(builder, "ldmxcsr", slot)

    return types.void(before), codegen


def _binary(name: str) -> Any:
    """The intrinsic of one IR instruction: vector with vector, or with a number of its type."""

    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        del typingctx

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del context
            x, y = args
            if not isinstance(signature.args[1], Vector):
                y = _splat(builder, y, x.type)
            return getattr(builder, name)(x, y, flags=_FAST)

        return a(a, b), codegen

    return operation


def _bind(operation: Callable[..., Any], function: Any) -> None:
    # Without annotations: Numba wants the signature of the lambda to be the very same.
    @overload(operation)
    def implementation(a, b):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if isinstance(a, Vector) and b in (a, a.element):
            return lambda a, b: function(a, b)
        return None


_bind(operator.add, _binary("fadd"))
_bind(operator.sub, _binary("fsub"))
_bind(operator.mul, _binary("fmul"))
_bind(operator.truediv, _binary("fdiv"))


def _polynomial(function: Any, degree: int, low: float) -> list[float]:
    """Chebyshev fit from `low` to low + 1, highest power first."""
    fit = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, low + 1])
    return [float(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef[::-1]]


# 2**f = 1 + f·p(f): exact at 0, or an error of one sign would add up over a long memory.
_LN2 = np.log(2)
_EXP2 = [
    *_polynomial(lambda f: np.where(f == 0, _LN2, np.expm1(f * _LN2) / (f + (f == 0))), 4, -0.5),
    1.0,
]
_LOG1P = _polynomial(lambda e: np.log1p(e) / np.maximum(e, 1e-300), 8, 0.0)


def _horner(builder: Any, coefficients: list[float], x: Any) -> Any:
    value = _constant(x.type, coefficients[0])
    for c in coefficients[1:]:
        product = builder.fmul(value, x, flags=_FAST)
        value = builder.fadd(product, _constant(x.type, c), flags=_FAST)
    return value


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b, flags=_FAST), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b, flags=_FAST), a, b)


def _exp2_code(builder: Any, x: Any) -> Any:
    if isinstance(x.type.element, ir.DoubleType):
        kind = ir.FunctionType(x.type, [x.type])
        name = f"llvm.exp2.v{LANES}f64"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x])
    # Below 2**-126 floats are denormal and a scan of them is ten times slower: stop there.
    x = _larger(builder, x, _constant(x.type, -126.0))
    x = _smaller(builder, x, _constant(x.type, 126.0))
    # Adding 1.5·2**23 leaves the nearest whole number in the low bits; no flags: it must be done.
    shifter = _constant(x.type, 1.5 * 2**23)
    shifted = builder.fadd(x, shifter)
    fraction = builder.fsub(x, builder.fsub(shifted, shifter))
    mantissa = builder.bitcast(_horner(builder, _EXP2, fraction), _INTS)
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _ints(23))
    return builder.bitcast(builder.add(mantissa, exponent), x.type)


@intrinsic
def exp2(typingctx: Any, x: Any) -> Any:
    """2**x of each lane; in float32 never below 2**-126 nor above 2**126."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return _exp2_code(builder, args[0])

    return x(x), codegen


@intrinsic
def softplus(typingctx: Any, x: Any) -> Any:
    """log(1 + e**x) of each lane."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        x = args[0]
        size = _larger(builder, x, builder.fneg(x))
        e = _exp2_code(builder, builder.fmul(size, _constant(x.type, -np.log2(np.e)), flags=_FAST))
        if isinstance(x.type.element, ir.DoubleType):
            kind = ir.FunctionType(x.type, [x.type])
            name = f"llvm.log.v{LANES}f64"
            log = cgutils.get_or_insert_function(builder.module, kind, name)
            tail = builder.call(log, [builder.fadd(e, _constant(x.type, 1.0))])
        else:
            tail = builder.fmul(_horner(builder, _LOG1P, e), e, flags=_FAST)
        return builder.fadd(_larger(builder, x, _constant(x.type, 0.0)), tail, flags=_FAST)

    return x(x), codegen


@intrinsic
def sigmoid(typingctx: Any, x: Any) -> Any:
    """1 / (1 + e**-x) of each lane."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        x = args[0]
        e = _exp2_code(builder, builder.fmul(x, _constant(x.type, -np.log2(np.e)), flags=_FAST))
        one = _constant(x.type, 1.0)
        return builder.fdiv(one, builder.fadd(one, e, flags=_FAST), flags=_FAST)

    return x(x), codegen


# Abramowitz and Stegun, 7.1.26: 1 - erf(z) = t·p(t)·e**-z² with t = 1/(1 + 0.3275911 z), z >= 0,
# to 1.5e-7.
_ERFC = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592]


@intrinsic
def gelu(typingctx: Any, x: Any) -> Any:
    """x·Φ(x) of each lane, float32: to 1e-7 of |x|."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        x = args[0]

        def number(value: float) -> Any:
            return _constant(x.type, value)

        size = _larger(builder, x, builder.fneg(x))
        one, scale = number(1.0), number(0.3275911 * np.sqrt(0.5))
        t = builder.fadd(one, builder.fmul(size, scale, flags=_FAST), flags=_FAST)
        t = builder.fdiv(one, t, flags=_FAST)
        square = builder.fmul(x, x, flags=_FAST)
        e = _exp2_code(builder, builder.fmul(square, number(-0.5 * np.log2(np.e)), flags=_FAST))
        tail = builder.fmul(size, number(0.5), flags=_FAST)
        for factor in (_horner(builder, _ERFC, t), t, e):
            tail = builder.fmul(tail, factor, flags=_FAST)
        return builder.fsub(_larger(builder, x, number(0.0)), tail, flags=_FAST)

    return x(x), codegen
