"""Bitwidths of groups, and how steps follow a logit (Equation 11)."""

import math

import triton
import triton.language as tl

from diffq.kernels.device.exact import add, mul, rint, sigmoid

_LN2 = tl.constexpr(math.log(2))


@triton.jit
def of_logit(logit, least, interval, WHOLE_BITS: tl.constexpr):
    """Equation 11: least + sigmoid(logit) * interval."""
    share = sigmoid(logit)
    bits = add(
        mul(share, tl.full(share.shape, 0.0, tl.float32) + interval),
        tl.full(share.shape, 0.0, tl.float32) + least,
    )
    if WHOLE_BITS:
        return rint(bits)
    return bits


@triton.jit
def load(given, at, mask, least, interval, LEARNED: tl.constexpr, WHOLE_BITS: tl.constexpr):
    """Bitwidths at places of a flat tensor of logits or, if they are fixed, of bitwidths."""
    read = tl.load(given + at, mask=mask, other=1.0)
    if LEARNED:
        return of_logit(read, least, interval, WHOLE_BITS)
    return read


@triton.jit
def top(bits):
    """The highest level, 2**bits - 1, of whole bitwidths; NaN for NaN."""
    levels = ((1 << bits.to(tl.int32)) - 1).to(tl.float32)
    return tl.where(bits == bits, levels, bits)


@triton.jit
def log_step_slope(logit, least, interval, WHOLE_BITS: tl.constexpr):
    """The slope of log(step) by the logit."""
    share = sigmoid(logit)
    slope = share * (1.0 - share) * interval
    bits = of_logit(logit, least, interval, WHOLE_BITS)
    return -_LN2 / (1.0 - tl.exp2(-bits)) * slope
