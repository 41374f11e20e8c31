"""Packing integers of 1 to 16 bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffq.errors import FormatError
from diffq.format import bitpack

BITS = st.integers(1, 16)


def packed_by_hand(values, bits):
    """Section 6 of docs/format.md, one bit at a time."""
    out, left = b"", bits
    for width in (8, 8, 4, 2, 1):
        if left >= width:
            left -= width
            digits = [value >> left + i & 1 for value in values for i in range(width)]
            number = sum(digit << i for i, digit in enumerate(digits))
            out += number.to_bytes(-(-len(digits) // 8), "little")
    return out


@given(BITS, st.data())
def test_layout(bits, data):
    """Packed bytes are those of section 6, of the size that is announced."""
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40))
    packed = bitpack.pack(np.array(values, np.uint16), bits)
    assert packed.tobytes() == packed_by_hand(values, bits)
    assert packed.size == bitpack.packed_size(len(values), bits)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 65535, 65536, 65537, 131073])
def test_round_trip(bits, count):
    """Unpacking gives back what was packed, across the blocks that the work is cut in."""
    values = np.random.default_rng(bits).integers(0, 1 << bits, count).astype(np.uint16)
    packed = bitpack.pack(values, bits)
    unpacked = bitpack.unpack(packed, count, bits)
    assert unpacked.dtype == np.uint16
    assert np.array_equal(unpacked, values)
    if bits <= 8:
        narrow = np.empty(count, np.uint8)
        bitpack.unpack_into(packed, narrow, bits)
        assert np.array_equal(narrow, values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_any_unsigned_dtype(dtype):
    """Values of any unsigned dtype pack to the same bytes."""
    values = np.arange(100) % 32
    expected = bitpack.pack(values.astype(np.uint16), 5)
    assert np.array_equal(bitpack.pack(values.astype(dtype), 5), expected)


@pytest.mark.parametrize("bits", [-1, 0, 17])
def test_bitwidth_out_of_range(bits):
    """A bitwidth outside 1 to 16 is refused with the rule and what was got."""
    with pytest.raises(FormatError, match=f"between 1 and 16, got {bits}"):
        bitpack.pack(np.zeros(3, np.uint8), bits)


@given(BITS)
def test_value_too_large(bits):
    """A value that needs more bits is refused."""
    with pytest.raises(FormatError, match=f"below {1 << bits}, got {1 << bits}"):
        bitpack.pack(np.array([0, 1 << bits], np.uint32), bits)


@given(BITS, st.integers(0, 100), st.integers(-3, 3).filter(bool))
def test_wrong_size(bits, count, more):
    """Another number of bytes than the values need is refused."""
    size = max(bitpack.packed_size(count, bits) + more, 0)
    if size == bitpack.packed_size(count, bits):
        size += 1
    with pytest.raises(FormatError, match="need"):
        bitpack.unpack(np.zeros(size, np.uint8), count, bits)


@given(BITS, st.integers(1, 100))
def test_padding_must_be_zero(bits, count):
    """Bits after the last value of a run of fields must be zero."""
    packed = bitpack.pack(np.zeros(count, np.uint16), bits)
    offset = 0
    for width, _ in bitpack.fields(bits):
        offset += -(-count * width // 8)
        if count * width % 8:
            damaged = packed.copy()
            damaged[offset - 1] = 0x80
            with pytest.raises(FormatError, match="padding"):
                bitpack.unpack(damaged, count, bits)
