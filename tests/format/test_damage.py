"""Accidents: every truncation and every change of a byte is noticed."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffq.format
from diffq.errors import FormatError
from diffq.format.container import decode, encode
from diffq.format.reader import Reader
from tests.format.craft import File, text
from tests.format.samples import grid, matrix, small_model
from tests.fuzz.target import read_repaired, take_apart


def damaged_file(codec="zstd"):
    """A small file with chunks, levels, elements and metadata, compressed and not."""
    records = {**small_model(), "long": grid(900, 8, (2, 4)), "matrix": matrix(20, 30, 0.1)}
    return encode(records, {"tied": "embed.weight"}, {"epoch": 3}, codec)


DATA = damaged_file()
RUNS = damaged_file("rans")
FILES = pytest.mark.parametrize("data", [DATA, RUNS], ids=["zstd", "rans"])


@FILES
def test_every_truncation(data):
    """A file that ends early, at any byte, is refused."""
    for size in range(len(data)):
        with pytest.raises(FormatError):
            decode(data[:size])


@pytest.mark.parametrize("extra", [1, 2, 16, 1000])
def test_trailing_bytes(extra):
    """A file with bytes after its end is refused."""
    for byte in (0, 0x44, 0xFF):
        with pytest.raises(FormatError):
            Reader(DATA + bytes([byte]) * extra)


@FILES
@pytest.mark.parametrize("change", [0x01, 0x20, 0x80, 0xFF])
def test_every_change_of_a_byte(change, data):
    """Any byte with bits flipped is noticed, when the file is opened or a tensor is read."""
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= change
        with pytest.raises(FormatError):
            decode(changed)


def assert_all_substitutions_noticed(data):
    """Every other value of every byte is noticed."""
    for place in range(len(data)):
        changed = bytearray(data)
        for value in set(range(256)) - {data[place]}:
            changed[place] = value
            with pytest.raises(FormatError):
                decode(changed)


def test_every_substitution_in_a_tiny_file():
    """Every other value of every byte of a file of 100 bytes is noticed."""
    assert_all_substitutions_noticed(File(meta=text(b'{"a":1}')).build())


@pytest.mark.slow
@FILES
def test_every_substitution_in_a_small_file(data):
    """Every other value of every byte of a file with all kinds of tensors is noticed."""
    assert_all_substitutions_noticed(data)


def test_every_change_behind_the_checksum():
    """Changed levels in rANS whose checksum is right are noticed, or are other sound levels."""
    file = encode({"matrix": matrix(20, 30, 0.1)}, codec="rans")
    assert Reader(file).codings("matrix") == ["rans"]
    index, data, meta = take_apart(file)
    noticed = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        noticed += not read_repaired(index, bytes(changed), meta)
    assert noticed > 0.8 * len(data)


@given(st.integers(0, len(DATA) - 1), st.integers(0, 255), st.booleans())
def test_inserted_and_removed_bytes(place, value, remove):
    """A byte too many or too few anywhere is noticed."""
    changed = DATA[:place] + (b"" if remove else bytes([value])) + DATA[place + remove :]
    with pytest.raises(FormatError):
        decode(changed)


@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)), st.integers(0, len(DATA)))
def test_swapped_ranges(first, second, third):
    """Two neighbouring ranges of bytes that changed places are noticed."""
    a, b, c = sorted((first, second, third))
    changed = DATA[:a] + DATA[b:c] + DATA[a:b] + DATA[c:]
    if changed != DATA:
        with pytest.raises(FormatError):
            decode(changed)


def test_damage_in_one_tensor_leaves_the_others():
    """A tensor whose bytes are damaged does not keep others of the file from being read."""
    records = {"a": grid(300_000, 8), "b": grid(300_001, 8)}
    data = bytearray(encode(records))
    reader = Reader(data)
    data[len(data) - 16 - reader.stored_bytes("b") // 2] ^= 1
    assert np.array_equal(reader.record("a").levels, records["a"].levels)
    for read in (reader.record, reader.values):
        with pytest.raises(FormatError, match="'b'"):
            read("b")
    with pytest.raises(FormatError, match="'b'"):
        reader.verify()


def test_nothing_asserts_about_input():
    """No assert checks anything in diffq.format: `python -O` would remove it."""
    folder = Path(diffq.format.__file__).parent
    asserts = [
        (path.name, line.strip())
        for path in sorted(folder.glob("*.py"))
        for line in path.read_text().splitlines()
        if re.match(r"\s*assert\b", line)
    ]
    assert asserts == []
