"""Records, and levels sorted by bitwidth."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffq.errors import FormatError
from diffq.format.dtypes import DTYPES
from diffq.format.groups import group_count, merge_levels, split_groups, stream_counts
from diffq.format.kinds.affine import repeat
from diffq.format.records import (
    FIRST_STEP,
    LAST_STEP,
    MAX_RANGE,
    PER_OCTAVE,
    STEPS,
    GridRecord,
    RawRecord,
    ScaledRecord,
    SteppedRecord,
)
from tests.format.samples import (
    grid,
    grid_records,
    level_fields,
    random_levels,
    scaled_records,
    stepped,
    stepped_records,
)


@given(level_fields())
def test_split_and_merge(fields):
    """Streams hold the levels of each bitwidth in order, and merge to the same tensor."""
    _, _, group_size, _, bits, levels = fields
    numel = levels.size
    streams = split_groups(levels, bits, group_size)
    of_weights = np.repeat(bits, group_size)[:numel]
    assert list(streams) == sorted(set(of_weights.tolist()))
    for width, stream in streams.items():
        assert np.array_equal(stream, levels[of_weights == width])
    assert stream_counts(bits, group_size, numel) == {w: s.size for w, s in streams.items()}
    assert np.array_equal(merge_levels(streams, bits, group_size, numel), levels)


def test_all_bitwidths_at_once():
    """All bitwidths from 1 to 15 can stand in one tensor."""
    bits = np.repeat(np.arange(1, 16), 3).astype(np.uint8)
    levels = random_levels(bits, 5, bits.size * 5 - 2, seed=0)
    streams = split_groups(levels, bits, 5)
    assert list(streams) == list(range(1, 16))
    assert np.array_equal(merge_levels(streams, bits, 5, levels.size), levels)


@given(grid_records())
def test_grid_values(record):
    """A grid's value is level * step + low, or a multiple of the step if it has a zero point.

    Each operation is rounded to float32.
    """
    expected = np.empty(record.numel, np.float32)
    for i, level in enumerate(record.levels):
        group = i // record.group_size
        low, high = record.ranges[group if len(record.ranges) > 1 else 0]
        step = np.float32((high - low) / np.float32(2.0 ** record.bits[group] - 1))
        if record.zero_point and low <= 0 <= high:
            top = 2.0 ** record.bits[group] - 1
            zero = min(np.rint(-low / (step or np.float32(1))), top)
            expected[i] = np.float32(level - zero) * step
        else:
            expected[i] = np.float32(np.float32(level) * step) + low
    values = record.values()
    assert values.dtype == np.float32
    assert values.shape == record.shape
    assert np.array_equal(values.reshape(-1), expected)
    assert np.isfinite(values).all()


@given(scaled_records())
def test_scaled_values(record):
    """A scaled value is (level - 2**(bits - 1)) * scale."""
    bits = np.repeat(record.bits.astype(np.int64), record.group_size)[: record.numel]
    zero = (1 << bits >> 1).astype(np.float32)
    expected = (record.levels.astype(np.float32) - zero) * record.scale
    assert np.array_equal(record.values().reshape(-1), expected)


@given(stepped_records())
def test_stepped_values(record):
    """A stepped value is level - 2**(bits - 1), which is exact, times 2**(step / 4)."""
    roots = [root / 2**23 for root in (0x800000, 0x9837F0, 0xB504F3, 0xD744FD)]
    expected = []
    for i, level in enumerate(record.levels.tolist()):
        group = i // record.group_size
        octave, quarter = divmod(int(record.steps[group]), 4)
        step = math.ldexp(roots[quarter], octave)
        # A product of 24 and 14 bits is exact in float64, and rounded where it becomes float32.
        expected.append(np.float32((level - 2 ** (int(record.bits[group]) - 1)) * step))
    values = record.values()
    assert values.dtype == np.float32
    assert values.shape == record.shape
    assert np.array_equal(values.reshape(-1), np.float32(expected))
    assert np.isfinite(values).all()


def test_steps_are_quarter_octaves():
    """Each step is the float32 nearest to 2**(number / 4), normal, and doubles every four."""
    numbers = np.arange(FIRST_STEP, LAST_STEP + 1)
    # Of three quarters, 2**(1/4) and its likes are rounded once as float64.
    assert np.array_equal(STEPS, np.exp2(numbers / PER_OCTAVE).astype(np.float32))
    assert np.array_equal(STEPS[PER_OCTAVE:], 2 * STEPS[:-PER_OCTAVE])
    assert STEPS[0] == np.finfo(np.float32).tiny
    assert np.isfinite(STEPS[-1] * np.float32(2**14))


@pytest.mark.parametrize("bits", [1, 8, 15])
@pytest.mark.parametrize("number", [FIRST_STEP, LAST_STEP])
def test_extreme_steps(bits, number):
    """The lowest and highest level of the extreme steps are finite and normal, the middle is 0."""
    levels = np.uint16([0, (1 << bits) - 1, 1 << bits >> 1])
    record = SteppedRecord((3,), "float32", 3, 1, np.uint8([bits]), levels, np.int16([number]))
    low, high, middle = record.values()
    assert middle == 0
    assert np.isfinite([low, high]).all()
    assert -low >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        (np.int16([0]), "2 groups have as many steps, got shape .1,"),
        (np.zeros((2, 1), np.int16), "2 groups have as many steps, got shape .2, 1"),
        (np.int16([FIRST_STEP - 1, 0]), "from -504 to 451, got -505 to 0"),
        (np.int16([-32768, 32767]), "from -504 to 451, got -32768 to 32767"),
        (np.int16([0, LAST_STEP + 1]), "from -504 to 451, got 0 to 452"),
    ],
)
def test_bad_steps(steps, rule):
    """A stepped tensor refuses steps that are too many, too few or out of range."""
    fields = (4,), "float32", 2, 2, np.uint8([2, 3]), np.zeros(4, np.uint16)
    with pytest.raises(FormatError, match=rule):
        SteppedRecord(*fields, steps)


def test_size_of_steps():
    """A step counts 16 bits, and in the bound of entropy coding what it is worth."""
    record = stepped((6, 8), 8, bits=4)
    record = SteppedRecord(**{**vars(record), "steps": np.int16([-20, -20, -20, -16, -20, -16])})
    assert record.stored_bits() == 6 * 16 + 8 + 48 * 4
    entropy = -4 * math.log2(4 / 6) - 2 * math.log2(2 / 6)
    bound = record.entropy_bound_bits() - record.coded.entropy_bits()
    assert bound == pytest.approx(entropy)


@given(st.one_of(grid_records(), scaled_records(), stepped_records()))
def test_affine_by_bitwidth(record):
    """Without parameters of each group, a table of all bitwidths decodes as each group does."""
    ranged = isinstance(record, GridRecord) and len(record.ranges) != 1
    ranged = ranged or isinstance(record, SteppedRecord)
    assert record.per_group == ranged
    if ranged:
        return
    table, own = record.affine(np.arange(1, 16, dtype=np.uint8)), record.affine(record.bits)
    for part, wanted in zip(vars(table).values(), vars(own).values(), strict=True):
        if part is not None and part.size > 1:
            assert part[record.bits - 1].tobytes() == wanted.tobytes()
        elif part is not None:
            assert part.tobytes() == wanted.tobytes()


def test_extreme_ranges_stay_finite():
    """At the largest range that is allowed, the highest level is still finite."""
    top = np.float32(MAX_RANGE)
    for low, high in ((-top, np.float32(0)), (np.float32(0), top), (-top / 2, top / 2)):
        for bits in range(1, 16):
            levels = np.uint16([0, (1 << bits) - 1])
            record = GridRecord(
                (2,), "float32", 2, 1, np.uint8([bits]), levels, np.float32([[low, high]])
            )
            assert np.isfinite(record.values()).all()


@pytest.mark.parametrize(
    ("ranges", "rule"),
    [
        ([[np.nan, 1]], "finite"),
        ([[0, np.inf]], "finite"),
        ([[1, 0]], "low at most high"),
        ([[-3e38, 3e38]], "could overflow"),
        ([[0, 1], [0, 1]], "1 or 1 ranges"),
        ([0, 1], "1 or 1 ranges"),
    ],
)
def test_bad_ranges(ranges, rule):
    """A grid refuses ranges that are not finite, not in order, too large or too many."""
    with pytest.raises(FormatError, match=rule):
        GridRecord((2,), "float32", 2, 2, np.uint8([2]), np.zeros(2, np.uint16), np.float32(ranges))


@pytest.mark.parametrize("scale", [[np.nan], [np.inf], [1e38], [1, 2]])
def test_bad_scale(scale):
    """A scaled tensor refuses a scale that is not one, not finite, or overflows at 15 bits."""
    fields = (2,), "float32", 2, 2, np.uint8([15]), np.zeros(2, np.uint16)
    with pytest.raises(FormatError, match="one scale"):
        ScaledRecord(*fields, np.float32(scale))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"group_size": 0}, "group size"),
        ({"group_size": 9}, "group size"),
        ({"min_bits": 0}, "min_bits"),
        ({"min_bits": 16}, "min_bits"),
        ({"min_bits": 6}, "Bitwidths"),
        ({"bits": np.uint8([2, 16])}, "Bitwidths"),
        ({"bits": np.uint8([2])}, "bitwidths"),
        ({"levels": np.zeros(7, np.uint16)}, "levels"),
        ({"ranges": np.float32([[1, 1]]), "zero_point": True}, "no zero point"),
    ],
)
def test_contradictions(change, rule):
    """Sizes and bitwidths that contradict each other are refused with the rule."""
    fields = dict(vars(grid(8, 4, (3, 5)))) | change
    with pytest.raises(FormatError, match=rule):
        GridRecord(**fields)


@pytest.mark.parametrize(
    ("dtype", "stored", "data", "rule"),
    [
        ("quint8", "quint8", [0] * 4, "Cannot store dtype quint8"),
        ("int32", "float16", [0] * 4, "Cannot store dtype int32 as float16"),
        ("float32", "bfloat16", [0] * 4, "Cannot store dtype float32 as bfloat16"),
        ("float32", "float32", [0] * 4, "has 8 bytes, got 4"),
        ("bool", "bool", [0, 2], "0 or 1, got 2"),
    ],
)
def test_bad_raw(dtype, stored, data, rule):
    """A raw record refuses unknown dtypes, sizes that do not fit, and bools that are none."""
    with pytest.raises(FormatError, match=rule):
        RawRecord((2,), dtype, stored, np.uint8(data))


def test_stored_bits_is_equation_12():
    """Levels at their bitwidth, the map at the width of its largest entry, 64 + 8 bits."""
    record = GridRecord(
        (10,),
        "float32",
        4,
        2,
        np.uint8([2, 6, 3]),
        np.zeros(10, np.uint16),
        np.float32([[0, 1]]),
    )
    assert record.stored_bits() == 64 + 8 + 3 * 3 + (4 * 2 + 4 * 6 + 2 * 3)


def test_constant_has_no_streams():
    """A constant tensor has no levels to store and counts its parameters alone."""
    record = GridRecord(
        (4,), "float32", 2, 2, np.uint8([2, 3]), np.zeros(4, np.uint16), np.float32([[1, 1]])
    )
    assert record.coded is None
    assert record.stored_bits() == 64 + 8
    assert merge_levels({}, record.bits, 2, 4).tolist() == [0, 0, 0, 0]


@given(st.integers(1, 10), st.integers(1, 15))
def test_repeat(numel, group_size):
    """A value per group stands for each of its weights; one value stands for all."""
    one = np.float32([3])
    assert repeat(one, group_size, numel) is one
    per_group = np.arange(group_count(numel, group_size), dtype=np.float32)
    if per_group.size > 1:
        expected = [i // group_size for i in range(numel)]
        assert repeat(per_group, group_size, numel).tolist() == expected


def test_codes_of_dtypes():
    """The codes are those of docs/format.md, section 4."""
    page = Path(__file__).parents[2] / "docs" / "format.md"
    rows = re.findall(r"\| (\d+) \| (\w+) ", page.read_text(encoding="utf-8"))
    assert {int(code): name for code, name in rows} == dict(enumerate(DTYPES))
