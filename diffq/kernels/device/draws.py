"""Unit noise from Philox, four numbers a call."""

import triton
import triton.language as tl

from diffq.kernels.device.columns import UNIFORM
from diffq.kernels.device.exact import PTX

_TURN = tl.constexpr(6.283185307179586)
# -2 * log(2): the special function unit has logarithms to base 2.
_FACTOR = tl.constexpr(-1.3862943611198906)


@triton.jit
def unit_noise(seed, counter, KIND: tl.constexpr):
    """Four blocks of N(0, 1) or U(-1, 1), in the shape of `counter`."""
    a, b, c, d = tl.rand4x(seed, counter)
    if KIND == UNIFORM:
        return 2.0 * a - 1.0, 2.0 * b - 1.0, 2.0 * c - 1.0, 2.0 * d - 1.0
    a, b = _normal(a, b)
    c, d = _normal(c, d)
    return a, b, c, d


@triton.jit
def _normal(u, v):
    """Box and Muller: two normal numbers from two uniform ones; they end at 5.7 deviations."""
    u = tl.maximum(u, 1.0e-7)
    angle = v * _TURN
    if PTX:
        # Approximate to some 20 bits, which noise needs no more of, at an eighth of the time.
        logarithm = _approximate("lg2.approx.f32 $0, $1;", u)
        radius = _approximate("sqrt.approx.f32 $0, $1;", logarithm * _FACTOR)
        cosine = _approximate("cos.approx.f32 $0, $1;", angle)
        sine = _approximate("sin.approx.f32 $0, $1;", angle)
        return radius * cosine, radius * sine
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _approximate(instruction: tl.constexpr, x):
    return tl.inline_asm_elementwise(
        instruction, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
