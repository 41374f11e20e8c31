"""Records for tests: strategies that draw them, small models, and equality to the bit."""

import math

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffq.format.dtypes import FLOAT_DTYPES, ITEM_SIZES
from diffq.format.kinds.product import CODEBOOK_DTYPES, ProductRecord
from diffq.format.records import (
    FIRST_STEP,
    LAST_STEP,
    GridRecord,
    RawRecord,
    ScaledRecord,
    SteppedRecord,
    group_count,
)

SHAPES = st.one_of(
    st.just(()),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7),
    st.integers(1, 300).map(lambda size: (size,)),
)
#: NumPy's name of dtypes that it does not have, or calls otherwise.
NUMPY_DTYPES = {"bfloat16": "float32", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
NAMES = st.text(
    st.characters(min_codepoint=32, codec="utf-8", exclude_characters="\x7f"), min_size=1
)


def random_levels(bits, group_size, numel, seed):
    """Levels below 2**bits of their group."""
    limits = 1 << np.repeat(bits.astype(np.int64), group_size)[:numel]
    return np.random.default_rng(seed).integers(0, limits).astype(np.uint16)


@st.composite
def raw_records(draw):
    """Raw tensors of every dtype."""
    dtype = draw(st.sampled_from(sorted(ITEM_SIZES)))
    stored = draw(st.sampled_from(["float16", dtype])) if dtype in FLOAT_DTYPES else dtype
    shape = draw(SHAPES)
    size = math.prod(shape) * ITEM_SIZES[stored]
    seed = draw(st.integers(0, 2**32 - 1))
    most = 2 if dtype == "bool" else draw(st.sampled_from([1, 3, 256]))
    data = np.random.default_rng(seed).integers(0, most, size, np.uint8)
    return RawRecord(shape, dtype, stored, data)


@st.composite
def level_fields(draw):
    """What grid and scaled records share: from 0-dim and empty tensors upward, all group sizes."""
    shape = draw(SHAPES)
    numel = math.prod(shape)
    group_size = draw(st.integers(1, max(numel, 1)))
    groups = group_count(numel, group_size)
    min_bits = draw(st.integers(1, 15))
    max_bits = draw(st.integers(min_bits, 15))
    seed = draw(st.integers(0, 2**32 - 1))
    bits = np.random.default_rng(seed).integers(min_bits, max_bits + 1, groups).astype(np.uint8)
    levels = random_levels(bits, group_size, numel, seed)
    return shape, draw(st.sampled_from(FLOAT_DTYPES)), group_size, min_bits, bits, levels


@st.composite
def grid_records(draw):
    """Grids, with a range for all or for each group, some constant, some with a zero point."""
    fields = draw(level_fields())
    groups = fields[4].size
    ranges = draw(st.sampled_from([1, groups]))
    sides = draw(hnp.arrays(np.float32, (ranges, 2), elements=FLOATS))
    if draw(st.booleans()):
        sides[:, 1] = sides[:, 0]
    record = as_stored(GridRecord(*fields, np.sort(sides, axis=1)))
    zero_point = draw(st.booleans()) and not record.constant
    return GridRecord(**{**vars(record), "zero_point": zero_point})


@st.composite
def scaled_records(draw):
    """Scaled tensors."""
    return ScaledRecord(*draw(level_fields()), np.float32([draw(FLOATS)]))


@st.composite
def stepped_records(draw):
    """Stepped tensors, with steps from the whole range or near each other."""
    fields = draw(level_fields())
    lowest = draw(st.integers(FIRST_STEP, LAST_STEP))
    highest = draw(st.sampled_from([lowest, min(lowest + 9, LAST_STEP), LAST_STEP]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = random.integers(lowest, highest + 1, fields[4].size).astype(np.int16)
    return SteppedRecord(*fields, steps)


@st.composite
def product_records(draw):
    """Indices into codebooks of every dtype, from one weight and one codeword upward."""
    block_size = draw(st.integers(1, 9))
    shape = *draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=12)), block_size
    blocks = math.prod(shape) // block_size
    codewords = draw(st.integers(1, blocks))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codebook = random.standard_normal((codewords, block_size)) * draw(st.sampled_from([1e-3, 40]))
    stored, scaled = draw(st.sampled_from(CODEBOOK_DTYPES)), {}
    if stored == "uint8":
        codebook = random.integers(0, 256, codebook.shape)
        scale = draw(st.floats(0, 2.0**100, width=32))
        scaled = {"scale": scale, "zero": draw(st.integers(0, 255))}
    indices = random.integers(0, codewords, blocks).astype(np.uint16)
    dtype = draw(st.sampled_from(FLOAT_DTYPES))
    return ProductRecord(shape, dtype, codebook.astype(stored), indices, **scaled)


RECORDS = st.one_of(
    raw_records(), grid_records(), scaled_records(), stepped_records(), product_records()
)


def as_stored(record):
    """The record with what a constant tensor comes back with: no levels, the fewest bits."""
    if not isinstance(record, GridRecord) or not record.constant:
        return record
    bits, levels = np.full_like(record.bits, record.min_bits), np.zeros_like(record.levels)
    head = record.shape, record.dtype, record.group_size, record.min_bits
    return GridRecord(*head, bits, levels, record.ranges)


def assert_same(one, other):
    """Two records are equal in every field, arrays to the bit and in their dtype."""
    assert type(one) is type(other)
    for name, value in vars(one).items():
        copy = getattr(other, name)
        if isinstance(value, np.ndarray):
            assert copy.dtype == value.dtype, name
            assert copy.shape == value.shape, name
            assert copy.tobytes() == value.tobytes(), name
        else:
            assert copy == value, name


def grid(numel, group_size=8, bits=(2, 6), seed=0, tail=None, shape=None):
    """A tensor that looks trained: normal weights, or with a Student tail, and mixed bits."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal(numel) if tail is None else random.standard_t(tail, numel)
    weights = weights.astype(np.float32)
    mean, (least, most) = sum(bits) / 2 - 0.6, bits
    drawn = np.round(mean + 0.9 * random.standard_normal(group_count(numel, group_size)))
    group_bits = np.clip(drawn, least, most).astype(np.uint8)
    low, high = weights.min(), weights.max()
    top = (1 << np.repeat(group_bits.astype(np.int64), group_size)[:numel]) - 1
    span = high - low or 1
    levels = np.clip(np.round((weights - low) / span * top), 0, top).astype(np.uint16)
    shape = shape or (numel,)
    ranges = np.float32([[low, high]])
    return GridRecord(shape, "float32", group_size, least, group_bits, levels, ranges)


def matrix(rows, columns, scale, seed=0, group_size=None):
    """A trained weight of 4 bits around zero whose rows and columns differ in size."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.standard_normal((rows, 1)) + random.standard_normal(columns))
    levels = np.rint(scale * sizes * random.laplace(size=(rows, columns))).clip(-8, 7) + 8
    group_size = group_size or levels.size
    bits = np.full(group_count(levels.size, group_size), 4, np.uint8)
    levels = levels.astype(np.uint16).reshape(-1)
    head = (rows, columns), "float32", group_size, 4, bits, levels
    return ScaledRecord(*head, np.float32([0.125]))


def stepped(shape, group_size, bits=4, step=-20, seed=0, dtype="float32"):
    """A trained weight with a step for each group, whose groups differ in size."""
    random, numel = np.random.default_rng(seed), math.prod(shape)
    groups = group_count(numel, group_size)
    octaves = random.standard_normal(groups)
    top = (1 << bits) - 1
    drawn = np.rint(random.standard_normal(numel) * top / 6) + (top + 1) // 2
    levels, widths = drawn.clip(0, top).astype(np.uint16), np.full(groups, bits, np.uint8)
    steps = (step + np.rint(4 * octaves)).astype(np.int16)
    return SteppedRecord(shape, dtype, group_size, bits, widths, levels, steps)


def product(blocks, codewords, block_size=8, stored="float16", seed=0, shape=None):
    """Indices as k-means leaves them: frequent codewords first, the rarest half as frequent."""
    random = np.random.default_rng(seed)
    codebook, scaled = random.standard_normal((codewords, block_size)).astype("f4"), {}
    if stored == "uint8":
        codebook = np.round(codebook * 40 + 128).clip(0, 255)
        scaled = {"scale": 0.125, "zero": 128}
    shares = np.linspace(2, 1, codewords)
    indices = random.choice(codewords, blocks, p=shares / shares.sum()).astype(np.uint16)
    shape = shape or (blocks, block_size)
    return ProductRecord(shape, "float32", codebook.astype(stored), indices, **scaled)


def raw(values, dtype="float32"):
    """A raw tensor of NumPy values."""
    array = np.asarray(values)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return RawRecord(array.shape, dtype, dtype, data)


def small_model():
    """A bit of everything in a few hundred bytes."""
    per_group = grid(10, 4, seed=1)
    ranges = np.float32([[-1, 1], [-2, 0], [0, 0]])
    return {
        "embed.weight": grid(50, 8, (1, 5), shape=(5, 10)),
        "per_group.weight": GridRecord(**{**vars(per_group), "ranges": ranges}),
        "scaled.weight": ScaledRecord(
            (6,), "bfloat16", 6, 3, np.uint8([3]), np.uint16([0, 7, 3, 4, 5, 1]), np.float32([0.25])
        ),
        "zero.weight": as_stored(
            GridRecord(
                (4,),
                "float16",
                2,
                2,
                np.uint8([2, 2]),
                np.zeros(4, np.uint16),
                np.zeros((1, 2), "f4"),
            )
        ),
        "norm.weight": raw(np.linspace(0.5, 1.5, 9, dtype=np.float32)),
        "norm.mask": raw(np.eye(3, dtype=bool), "bool"),
        "norm.steps": raw(np.int64(1500), "int64"),
        "empty": raw(np.zeros((0, 3), np.float32)),
    }


def stepped_model():
    """Small stepped tensors, one of several bitwidths, beside one of float16."""
    several = stepped((5, 10), 8)
    bits = np.uint8([4, 6, 5, 4, 15, 4, 7])
    return {
        "embed.weight": SteppedRecord(**{**vars(several), "bits": bits}),
        "conv.weight": stepped((4, 3, 3, 3), 27, bits=2, seed=1, dtype="bfloat16"),
        "head.weight": stepped((3, 7), 4, bits=3, seed=2, dtype="float16"),
        "scalar": stepped((), 1, bits=1),
        "empty": stepped((0, 3), 1),
        "norm.weight": raw(np.linspace(0.5, 1.5, 9, dtype=np.float16), "float16"),
    }


def codebook_model():
    """Small tensors with codebooks of every dtype, beside one of levels."""
    return {
        "conv.weight": product(12, 5, 9, "uint8", shape=(4, 3, 3, 3)),
        "head.weight": product(20, 6, 2, shape=(4, 10)),
        "one.weight": product(3, 1, 4, "float32"),
        "embed.weight": grid(50, 8, (1, 5), shape=(5, 10)),
    }


def expected_array(record):
    """What a tensor decodes to in NumPy, where bfloat16 is float32 and float8 its byte."""
    numpy_dtype = NUMPY_DTYPES.get(record.dtype, record.dtype)
    if isinstance(record, RawRecord):
        stored = record.data.view(NUMPY_DTYPES.get(record.stored_dtype, record.stored_dtype))
        if record.stored_dtype == "bfloat16":
            stored = (record.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return stored.astype(numpy_dtype).reshape(record.shape)
    values = record.values()
    if record.dtype == "bfloat16":
        # Half of the last bit that stays, minus a little to go to even, and cut.
        bits = values.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        values = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(numpy_dtype)
