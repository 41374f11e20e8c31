"""Equation 6 of the DiffQ paper, and its gradients from noise that is drawn again."""

import triton
import triton.language as tl

from diffq.kernels.device import bits
from diffq.kernels.device.columns import (
    ADDRESS_COLUMNS,
    CHUNK,
    CHUNKS,
    COLUMNS,
    GROUP,
    NUMEL,
    PLACE,
    ROUNDING,
)
from diffq.kernels.device.draws import unit_noise
from diffq.kernels.device.exact import cast, clamp
from diffq.kernels.device.grids import nearest
from diffq.kernels.device.scan import load_ends, load_places, load_zero


@triton.jit
def _load_tensor(addresses, table, tensor, WTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's row of the table, weights, number of weights, and whether its zeros stay zero."""
    row = table + tensor * COLUMNS
    numel = tl.load(row + NUMEL).to(tl.int32)
    weight = tl.load(addresses + tensor * ADDRESS_COLUMNS).to(tl.pointer_type(WTYPE))
    zeros = tl.load(addresses + tensor * ADDRESS_COLUMNS + 1) != 0
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        numel = tl.multiple_of(numel, 16)
    return row, weight, numel, zeros


@triton.jit
def _draw(seed, chunk, KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The unit noise of a chunk's four tiles: one place of Philox's counter for each column."""
    if KIND == ROUNDING:
        none = tl.zeros([1, 1], tl.float32)
        a, b, c, d = none, none, none, none
    else:
        place = chunk * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
        a, b, c, d = unit_noise(tl.load(seed), place, KIND)
    return a, b, c, d


@triton.jit
def _tile(row0, numel, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of R rows of G weights, in C columns.

    Returns:
        The places of its weights and which of them there are, [R, C]; the groups of its rows and
        which of them there are, [R].
    """
    rows = row0 + tl.arange(0, R)
    i = rows[:, None] * G + tl.arange(0, C)[None, :]
    inside = i < numel
    if C != G:
        inside = inside & (tl.arange(0, C) < G)[None, :]
    if WHOLE:
        return i, inside, rows * 0, rows * G < numel
    return i, inside, rows, rows * G < numel


@triton.jit
def _noisy(x, noise, low, high, width, zeros, scale, KIND: tl.constexpr, WTYPE: tl.constexpr):
    """Equation 6 or 1: float32 values of weights [R, C] at bitwidths [R]."""
    if KIND == ROUNDING:
        value = nearest(x, low, high, bits.top(width), zeros, WTYPE)
    else:
        value = x + noise * _step(low, high, width, scale)[:, None]
        if WTYPE == tl.float16:
            value = clamp(value, -65504.0, 65504.0)
        value = tl.where(zeros & (x == 0.0), 0.0, value)
    return value


@triton.jit
def _step(low, high, width, scale):
    """What one unit of noise is."""
    return (high - low) * scale / (tl.exp2(width) - 1.0)


@triton.jit(
    do_not_specialize=["weight_pieces", "block"],
    do_not_specialize_on_alignment=["given"],
)
def sample_kernel(
    addresses,
    table,
    chunks,
    given,
    ends,
    places,
    seed,
    values,
    weight_pieces,
    least,
    interval,
    scale,
    rate,
    block,
    WTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    LEARNED: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for each chunk.

    Args:
        ends, places: what `scan_kernel` found.
        seed: int64 [1], the key of the noise.
        values: gets the values of all tensors.
        rate, block: with MASKED, each block of consecutive weights is quantized with this
            probability, and else left as it is.
    """
    pid = tl.program_id(0)
    tensor = tl.load(chunks + pid * 2).to(tl.int64)
    row0 = tl.multiple_of(tl.load(chunks + pid * 2 + 1), 4 * R)
    row, weight, numel, zeros = _load_tensor(addresses, table, tensor, WTYPE, ALIGNED)
    low, high = load_ends(row, ends, weight_pieces, PARTS)
    if KIND == ROUNDING:
        zeros = zeros & load_zero(row, places, weight_pieces, PARTS)
    place = tl.multiple_of(tl.load(row + PLACE), 16)
    groups_at = given + tl.load(row + GROUP)
    noise = _draw(seed, pid, KIND, R, C)
    for tile in tl.static_range(4):
        i, inside, group, there = _tile(row0 + tile * R, numel, R, C, G, WHOLE)
        width = bits.load(groups_at, group, there, least, interval, LEARNED, KIND == ROUNDING)
        x = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        value = _noisy(x, noise[tile], low, high, width, zeros, scale, KIND, WTYPE)
        if MASKED:
            drawn = tl.rand(tl.load(seed), place.to(tl.int32) + i // block)
            value = tl.where(drawn < rate, value, x)
        tl.store(values + place + i, cast(value, WTYPE), mask=inside)


@triton.jit(
    do_not_specialize=["weight_pieces"],
    do_not_specialize_on_alignment=["given"],
)
def backward_kernel(
    addresses,
    table,
    chunks,
    given,
    ends,
    places,
    seed,
    grads,
    logit_grads,
    totals,
    weight_pieces,
    least,
    interval,
    scale,
    WTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    LEARNED: tl.constexpr,
    WHOLE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for each chunk: the gradients of `PseudoNoise`, with noise drawn again.

    Args:
        grads: gradients of the values of all tensors.
        logit_grads: with LEARNED, gets the gradients of logits, float32 [groups], but for
            groups that are WHOLE tensors.
        totals: float32 [chunks], gets the sums of grad * (value - weight).
    """
    pid = tl.program_id(0)
    tensor = tl.load(chunks + pid * 2).to(tl.int64)
    row0 = tl.multiple_of(tl.load(chunks + pid * 2 + 1), 4 * R)
    row, weight, numel, zeros = _load_tensor(addresses, table, tensor, WTYPE, ALIGNED)
    low, high = load_ends(row, ends, weight_pieces, PARTS)
    if KIND == ROUNDING:
        zeros = zeros & load_zero(row, places, weight_pieces, PARTS)
    place = tl.multiple_of(tl.load(row + PLACE), 16)
    groups_at = tl.load(row + GROUP)
    noise = _draw(seed, pid, KIND, R, C)
    total = tl.zeros([R], tl.float32)
    for tile in tl.static_range(4):
        i, inside, group, there = _tile(row0 + tile * R, numel, R, C, G, WHOLE)
        read = tl.load(grads + place + i, mask=inside, other=0.0)
        at = given + groups_at
        width = bits.load(at, group, there, least, interval, LEARNED, KIND == ROUNDING)
        if (KIND == ROUNDING) | (WTYPE == tl.float16):
            x = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
            error = _noisy(x, noise[tile], low, high, width, zeros, scale, KIND, WTYPE) - x
        else:
            # The weight is read only if its zeros stay zero.
            read_to = tl.where(zeros, numel, 0)
            x = tl.load(weight + i, mask=inside & (i < read_to), other=1.0)
            error = noise[tile] * _step(low, high, width, scale)[:, None]
            error = tl.where(x == 0.0, 0.0, error)
        sums = tl.sum(error * read.to(tl.float32), 1)
        total += tl.where(there, sums, 0.0)
        if LEARNED and not WHOLE:
            logit = tl.load(at + group, mask=there, other=0.0)
            slope = bits.log_step_slope(logit, least, interval, KIND == ROUNDING)
            tl.store(logit_grads + groups_at + group, sums * slope, mask=there)
    tl.store(totals + pid, tl.sum(total, 0))


@triton.jit(
    do_not_specialize=["weight_pieces"],
    do_not_specialize_on_alignment=["given"],
)
def finish_kernel(
    table,
    given,
    ends,
    places,
    weight_grads,
    logit_grads,
    totals,
    weight_pieces,
    least,
    interval,
    KIND: tl.constexpr,
    LEARNED: tl.constexpr,
    WHOLE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each tensor: adds the gradient of its range to those of two weights.

    Args:
        weight_grads: gradients of the weights, changed at the places of minimum and maximum.
        logit_grads: with LEARNED and WHOLE, gets the gradient of the tensor's one logit.
    """
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.load(row + CHUNK)
    count = tl.load(row + CHUNKS).to(tl.int32)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        total += tl.load(totals + first + i, mask=i < count, other=0.0)
    sum_of_all = tl.sum(total, 0)
    low, high = load_ends(row, ends, weight_pieces, PARTS)
    if high > low:
        low_at, high_at = load_places(row, ends, places, weight_pieces, low, high, PARTS)
        gradient = sum_of_all / (high - low)
        to = weight_grads + tl.load(row + PLACE)
        _add_to(to + low_at, -gradient)
        _add_to(to + high_at, gradient)
    if LEARNED and WHOLE:
        group = tl.load(row + GROUP) + tl.arange(0, 1)
        logit = tl.load(given + group)
        slope = bits.log_step_slope(logit, least, interval, KIND == ROUNDING)
        tl.store(logit_grads + group, sum_of_all * slope)


@triton.jit
def _add_to(pointer, number):
    """Adds in float32, so that a gradient in a half type is rounded once."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    total = tl.load(pointer).to(tl.float32) + number
    tl.store(pointer, cast(total, dtype))
