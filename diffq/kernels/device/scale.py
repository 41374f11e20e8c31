"""LSQ: levels times a learned scale, and the gradients of Equations 2 and 3 of its paper."""

import triton
import triton.language as tl

from diffq.kernels.device.columns import (
    ADDRESS_COLUMNS,
    CHUNK,
    CHUNKS,
    COLUMNS,
    NUMEL,
    PLACE,
)
from diffq.kernels.device.exact import cast, clamp, rint
from diffq.kernels.device.grids import finite_levels

_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _positive(scale):
    """A learned scale without sign or zero."""
    magnitude = tl.abs(scale)
    return tl.where(magnitude < _TINY, _TINY, magnitude)


@triton.jit
def _load_chunk(
    addresses, table, chunks, scales, levels,
    WTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's part of a tensor.

    Returns:
        Places in the buffers, which of them there are, and weights, [BLOCK]; the scale, [1]; the
        lowest and the highest level.
    """
    pid = tl.program_id(0)
    tensor = tl.load(chunks + pid * 2).to(tl.int64)
    start = tl.multiple_of(tl.load(chunks + pid * 2 + 1), BLOCK)
    numel = tl.load(table + tensor * COLUMNS + NUMEL).to(tl.int32)
    place = tl.multiple_of(tl.load(table + tensor * COLUMNS + PLACE), 16)
    weight = tl.load(addresses + tensor * ADDRESS_COLUMNS).to(tl.pointer_type(WTYPE))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        numel = tl.multiple_of(numel, 16)
    i = start + tl.arange(0, BLOCK)
    inside = i < numel
    x = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    scale = _positive(tl.load(scales + tensor + tl.arange(0, 1)))
    return (
        place + i,
        inside,
        x,
        scale,
        tl.load(levels + tensor * 2),
        tl.load(levels + tensor * 2 + 1),
    )


@triton.jit
def _nearest(x, scale, lowest, highest, WTYPE: tl.constexpr):
    """The value of the nearest level, and x / scale."""
    ratio = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    level = clamp(ratio, lowest, highest)
    if WTYPE != tl.float32:
        least, most = finite_levels(scale, scale * 0.0, WTYPE)
        level = clamp(level, least, most)
    # Adding zero turns -0.0, which no level stands for, into 0.0.
    return (rint(level) + 0.0) * scale, ratio


@triton.jit(do_not_specialize_on_alignment=["scales"])
def scaled_kernel(
    addresses,
    table,
    chunks,
    scales,
    levels,
    values,
    WTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each chunk.

    Args:
        scales: learned scales of all tensors, float32 [tensors].
        levels: lowest and highest level of each, float32 [tensors, 2].
        values: gets the values of all tensors.
    """
    to, inside, x, scale, lowest, highest = _load_chunk(
        addresses, table, chunks, scales, levels, WTYPE, ALIGNED, BLOCK
    )
    value, _ = _nearest(x, scale, lowest, highest, WTYPE)
    tl.store(values + to, cast(value, WTYPE), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["scales"])
def scaled_backward_kernel(
    addresses,
    table,
    chunks,
    scales,
    levels,
    grads,
    totals,
    WTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each chunk.

    Args:
        grads: gradients of the values of all tensors, changed to those of the weights.
        totals: float32 [chunks], gets what the scale's gradient is a multiple of.
    """
    to, inside, x, scale, lowest, highest = _load_chunk(
        addresses, table, chunks, scales, levels, WTYPE, ALIGNED, BLOCK
    )
    value, ratio = _nearest(x, scale, lowest, highest, WTYPE)
    within = ((ratio >= lowest) & (ratio <= highest)).to(tl.float32)
    grad = tl.load(grads + to, mask=inside, other=0.0).to(tl.float32)
    # A product, so that a gradient which is not finite stays so.
    tl.store(grads + to, cast(grad * within, WTYPE), mask=inside)
    total = tl.where(inside, (value - x * within) * grad, 0.0)
    tl.store(totals + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize_on_alignment=["scales"])
def scaled_finish_kernel(table, scales, levels, scale_grads, totals, BLOCK: tl.constexpr):
    """One program for each tensor: the gradient of its scale, float32 [tensors]."""
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * COLUMNS
    first = tl.load(row + CHUNK)
    count = tl.load(row + CHUNKS).to(tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        sums += tl.load(totals + first + i, mask=i < count, other=0.0)
    raw = tl.load(scales + tensor)
    numel = tl.load(row + NUMEL).to(tl.float32)
    share = 1.0 / tl.sqrt(numel * tl.load(levels + tensor * 2 + 1))
    gradient = tl.sum(sums, 0) / _positive(raw) * share
    # The gradient of the magnitude, and none where it is less than the least.
    sign = tl.where(raw < 0, -1.0, 1.0)
    gradient = tl.where(tl.abs(raw) < _TINY, 0.0, sign * gradient)
    tl.store(scale_grads + tensor, gradient)
