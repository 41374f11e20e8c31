"""Values on a grid: the operations of `diffq.numerics.grid`, in the same order."""

import triton
import triton.language as tl

from diffq.kernels.device.exact import add, cast, clamp, div, mul, rint

# As `finite_levels` of diffq.numerics.grid has them.
_LIMIT_FLOAT16 = tl.constexpr(65504.0 * (1 + 2**-10 / 4) * (1 - 2**-20))
_LARGEST_BFLOAT16 = tl.constexpr((2 - 2**-7) * 2.0**127)
_LIMIT_BFLOAT16 = tl.constexpr((2 - 2**-7) * 2.0**127 * (1 + 2**-7 / 4) * (1 - 2**-20))


@triton.jit
def finite_levels(step, added, WTYPE: tl.constexpr):
    """Lowest and highest n for which n * step + added is finite in a half type."""
    if WTYPE == tl.float16:
        limit = _LIMIT_FLOAT16
    else:
        limit = _LIMIT_BFLOAT16
    divisor = tl.where(step > 0, step, 1.0)
    # A vector, because a constant times a constant is not of float32.
    limits = tl.full(step.shape, limit, tl.float32)
    lowest = tl.ceil(div(-limits - added, divisor))
    highest = tl.floor(div(limits - added, divisor))
    lowest = tl.where(_is_finite(lowest - 1.0, step, added, WTYPE), lowest - 1.0, lowest)
    highest = tl.where(_is_finite(highest + 1.0, step, added, WTYPE), highest + 1.0, highest)
    return lowest, highest


@triton.jit
def _is_finite(level, step, added, WTYPE: tl.constexpr):
    value = cast(add(mul(level, step), added), WTYPE).to(tl.float32)
    return tl.abs(value) < float("inf")


@triton.jit
def nearest(x, low, high, top, zeros, WTYPE: tl.constexpr):
    """Equation 1: the value of the level nearest to each weight.

    Args:
        x: float32 weights, [groups, weights].
        low: minimum, a scalar.
        high: maximum, a scalar.
        top: the highest level, float32 [groups].
        zeros: whether zero must be a level, a scalar.
        WTYPE: the dtype of the weights.

    Returns:
        float32 like `x`, in the numbers of the weights' dtype.
    """
    step = div(high - low, top)
    divisor = tl.where(step > 0, step, 1.0)
    none = tl.zeros(top.shape, tl.float32)
    zero, added, lowest, most = none, none + low, none, top
    if zeros & (low <= 0.0) & (high >= 0.0):
        zero = rint(div(-low, divisor))
        zero = tl.where(zero > top, top, zero)
        added = none
    if zeros:
        if WTYPE != tl.float32:
            least, largest = finite_levels(step, added, WTYPE)
            lowest = tl.where(least + zero > 0.0, least + zero, 0.0)
            most = tl.where(largest + zero < top, largest + zero, top)
    offset = tl.broadcast_to(added[:, None], x.shape)
    level = rint(tl.div_rn(x - offset, tl.broadcast_to(divisor[:, None], x.shape)))
    level = clamp(level + zero[:, None], lowest[:, None], most[:, None])
    steps = tl.broadcast_to(step[:, None], x.shape)
    value = add(mul(level - zero[:, None], steps), offset)
    return cast(value, WTYPE).to(tl.float32)
