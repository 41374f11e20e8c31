"""Records as plain fields, as states hold them, and as elements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffq.errors import FormatError
from diffq.format.dtypes import TypedBytes
from diffq.format.kinds.base import QuantizedRecord
from diffq.format.records import KINDS
from tests.format.samples import (
    RECORDS,
    as_stored,
    assert_same,
    codebook_model,
    grid,
    product,
    small_model,
    stepped,
    stepped_model,
)

GRID = grid(30, 4, (2, 6))
SHARED = grid(30, 30, (4, 4))
WORDS = product(15, 6, 2, "uint8")
ONE = product(15, 1, 2)
STEPS = stepped((30,), 4)
RAW = small_model()["norm.weight"]


class Given:
    """Fields of the right types, which reading of states has seen to."""

    def __init__(self, record, packed, **changes):
        self.values = record.fields(packed) | changes
        self.kind = self.values["kind"]
        self.shape = self.values.pop("shape", record.shape)
        self.dtype = self.values.pop("dtype", record.dtype)

    def number(self, key):
        """A whole number."""
        return self.values[key]

    flag = typed = number

    def array(self, key, dims, *dtypes):
        """An array."""
        assert self.values[key].ndim == dims
        assert self.values[key].dtype.name in dtypes
        return self.values[key]


def read(fields):
    """The record of some fields."""
    (kind,) = (kind for kind in KINDS if fields.kind in kind.record_type.state_kinds)
    return kind.record_type.from_fields(fields)


@given(RECORDS, st.booleans())
def test_records_come_back(record, packed):
    """Every record comes back from its fields in every bit."""
    assert_same(as_stored(read(Given(record, packed))), record)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("records", [small_model(), codebook_model(), stepped_model()])
def test_models_come_back(records, packed):
    """Records of each kind come back from their fields, constants and zero points included."""
    zeros = type(GRID)(**vars(GRID) | {"zero_point": True})
    for record in (*records.values(), GRID, zeros):
        assert_same(as_stored(read(Given(record, packed))), record)


def test_kinds_are_told_apart():
    """No two kinds of records share a name, in files or in states."""
    in_files = [kind.kind for kind in KINDS]
    in_states = [name for kind in KINDS for name in kind.record_type.state_kinds]
    assert in_files == ["raw", "grid", "scaled", "product", "stepped"]
    assert in_states == ["raw", "grid", "grid with zero point", "scaled", "product", "stepped"]


@pytest.mark.parametrize(
    ("record", "packed", "change", "rule"),
    [
        (GRID, True, {"group_size": 0}, "group size is from 1 to 30 weights, got 0"),
        (GRID, True, {"min_bits": 16}, "min_bits is from 1 to 15, got 16"),
        (GRID, True, {"dtype": "int32"}, "decode to one of .*, got int32"),
        (GRID, True, {"map_width": 5}, "map_width is from 0 to 4 .* got 5 and"),
        (GRID, True, {"shape": (2**50,)}, "1125899906842624 weights need more bytes"),
        (GRID, True, {"shape": (29,), "bit_map": np.zeros(3, np.uint8)}, "need"),
        (SHARED, True, {"bits": 256 + 4}, "bits from 1 to 15, got 0 and 260"),
        (SHARED, True, {"levels": np.zeros(16, "u1")}, "levels need 15 bytes, got 16"),
        (
            GRID,
            True,
            {"ranges": np.zeros((1, 3), "f4")},
            r"pairs of low and high, got shape \(1, 3",
        ),
        (GRID, False, {"levels": np.zeros(29, "i2")}, "8 bitwidths and 30 levels, got .*29"),
        (GRID, False, {"levels": np.full(30, -1, "i2")}, "below 2.* of its group, got 65535"),
        (WORDS, True, {"scale": np.ones(2, "f4")}, "one scale, got 2"),
        (WORDS, False, {"indices": np.full(15, -1, "i4")}, "below 6, got 4294967295"),
        (WORDS, False, {"indices": np.zeros(14, "i4")}, "one index for each block"),
        (ONE, True, {"indices": np.zeros(1, "u1")}, "needs no indices, got 1"),
        (STEPS, True, {"steps": np.zeros(7, "i2")}, r"8 groups have as many steps, got .*\(7,\)"),
        (STEPS, False, {"steps": np.full(8, -505, "i2")}, "from -504 to 451, got -505 to -505"),
        (STEPS, False, {"steps": np.int16([0] * 7 + [452])}, "from -504 to 451, got 0 to 452"),
        (STEPS, True, {"group_size": 31}, "group size is from 1 to 30 weights, got 31"),
        (STEPS, True, {"levels": np.zeros(14, "u1")}, "30 weights need more|need 15"),
        (STEPS, False, {"levels": np.full(30, 16, "i2")}, "below 2.* of its group, got 16"),
        (RAW, True, {"shape": (3, 3)}, r"shape \[3, 3\], got \[9\]"),
    ],
)
def test_contradictions(record, packed, change, rule):
    """Fields that contradict each other are refused with the rule, before memory is taken."""
    with pytest.raises(FormatError, match=rule):
        read(Given(record, packed, **change))


@pytest.mark.parametrize("records", [small_model(), codebook_model(), stepped_model()])
def test_decoded_elements(records):
    """A record decodes to its values, or to the bytes that it keeps, as a copy."""
    for record in records.values():
        decoded = record.decoded()
        assert isinstance(decoded, TypedBytes)
        assert decoded.shape == record.shape
        if isinstance(record, QuantizedRecord):
            assert decoded.dtype == "float32"
            assert decoded.data.tobytes() == record.values().tobytes()
        else:
            assert decoded.dtype == record.stored_dtype
            assert decoded.data.tobytes() == record.data.tobytes()
            assert not np.shares_memory(decoded.data, record.data)


def test_counts_of_levels():
    """Each bitwidth in use is counted; indices have one."""
    widths = np.repeat(GRID.bits, 4)[:30]
    assert GRID.coded.counts() == dict(zip(*np.unique(widths, return_counts=True), strict=True))
    assert WORDS.coded.counts() == {3: 15}
