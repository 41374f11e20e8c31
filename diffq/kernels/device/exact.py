"""Operations whose result is that of torch's operations, each rounded by itself.

A quantized weight is promised bit for bit, but a compiler may make one fused operation of a
product and a sum. So the operations are written in PTX, where `.rn` forbids that. libdevice
has functions for it too, but they become `.ftz`, which loses subnormal numbers.

NaN passes through all of them, as it does through torch's.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Triton decides by the same variable, when a function is decorated. The interpreter knows neither
# PTX nor libdevice, and rounds each operation by itself.
PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")

# 1.5 * 2**23: adding and taking it away rounds numbers below 2**22 to whole ones, half to even.
_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def add(a, b):
    """The sum of tensors of one shape."""
    if PTX:
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a + b


@triton.jit
def mul(a, b):
    """The product of tensors of one shape."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a * b


@triton.jit
def div(a, b):
    """The quotient a / b, in the shape of b."""
    return tl.div_rn(tl.broadcast_to(a, b.shape), b)


@triton.jit
def rint(x):
    """The nearest whole number, half to even, of magnitudes below 2**22."""
    if PTX:
        return libdevice.rint(x)
    whole = (x + _WHOLE) - _WHOLE
    return tl.where(whole == 0, x * 0.0, whole)  # with the sign of x


@triton.jit
def clamp(x, low, high):
    """At least `low`, then at most `high`. Triton's minimum and maximum would lose NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """A float32 in another dtype, rounded to the nearest, half to even."""
    if not PTX:
        if DTYPE == tl.bfloat16:
            # The interpreter cuts digits off.
            word = x.to(tl.int32, bitcast=True)
            rounded = (word + 0x7FFF + ((word >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def sigmoid(x):
    """The logistic function in the operations of torch's CUDA kernel."""
    if PTX:
        # tl.exp is approximate; its last digits could round a bitwidth the other way.
        power = libdevice.exp(-x)
    else:
        power = tl.exp(-x)
    one = tl.full(x.shape, 1.0, tl.float32)
    return tl.div_rn(one, add(power, one))
