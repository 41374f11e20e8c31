"""Segments of levels in rANS: what they hold, how small they get, and what classes bring."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffq.format import contexts, layout, runs
from diffq.format.container import decode, encode
from diffq.format.entropy import LevelPiece
from diffq.format.kinds.product import ProductRecord
from diffq.format.reader import Reader
from diffq.format.records import GridRecord, ScaledRecord
from tests.format.samples import RECORDS, as_stored, assert_same, grid, matrix, product, raw

LARGE = 1 << 30
RESET = st.integers(0, 2**32 - 1)


def bits_per_weight(record, codec="rans"):
    """Bits of the file for each weight."""
    return 8 * len(encode({"w": record}, codec=codec)) / record.numel


def entropy_of(record):
    """Entropy of a record's levels for each weight."""
    return record.coded.entropy_bits() / record.numel


@given(st.lists(RECORDS, min_size=1, max_size=5))
def test_the_smaller_of_both(records):
    """With the codec "rans", no file is larger than with "zstd", and it holds the same."""
    model = {f"t{number}": record for number, record in enumerate(records)}
    data = encode(model, codec="rans")
    assert len(data) <= len(encode(model, codec="zstd"))
    restored, _, _ = decode(data)
    for name, record in model.items():
        assert_same(restored[name], as_stored(record))


@pytest.mark.parametrize(
    ("draw", "scale", "most"),
    [
        ("laplace", 0.18, 1.02),
        ("laplace", 0.32, 1.01),
        ("laplace", 2.5, 1.01),
        ("standard_normal", 0.25, 1.02),
        ("standard_normal", 0.35, 1.01),
        ("standard_normal", 2.5, 1.01),
    ],
)
def test_size_of_long_tensors(draw, scale, most):
    """From 0.8 bits a weight on, a file takes at most 1.01 times the entropy of its levels."""
    levels = np.rint(getattr(np.random.default_rng(0), draw)(size=1 << 20) * scale)
    levels = (levels.clip(-128, 127) + 128).astype(np.uint16)
    head = (1 << 10, 1 << 10), "float32", levels.size, 8, np.uint8([8])
    record = ScaledRecord(*head, levels, np.float32([1]))
    entropy = entropy_of(record)
    assert 0.25 < entropy < 4
    assert (most == 1.01) == (entropy > 0.7)
    assert bits_per_weight(record) <= most * entropy


@pytest.mark.parametrize(("scale", "least"), [(0.05, 0.85), (0.2, 0.95)])
def test_classes_go_below_the_entropy(scale, least):
    """Where rows and columns differ in size, the file is smaller than the levels' entropy."""
    record = matrix(256, 256, scale)
    assert bits_per_weight(record) <= least * entropy_of(record)


def test_tensors_of_a_segment_share_classes():
    """Short tensors that differ in size alone share frequencies by their marks."""
    model = {f"t{i}": matrix(24, 24, 0.02 * 2**i, seed=i) for i in range(6)}
    data = encode(model)
    assert len(data) < 0.95 * len(encode(model, codec="zstd"))
    restored, _, _ = decode(data)
    for name, record in model.items():
        assert_same(restored[name], record)


@pytest.mark.parametrize("columns", [1, 3, 1000, layout.MAX_WEIGHTS // 2 + 1, (1 << 20) + 500])
def test_rows_that_segments_cut(columns):
    """Segments that begin and end within a row are read, and rows longer than a segment."""
    rows = -(-(layout.MAX_WEIGHTS + 1000) // columns)
    record = matrix(rows, columns, 0.1, group_size=1000 if rows > 1 else rows * columns)
    reader = Reader(encode({"w": record}, codec="rans"), LARGE)
    assert reader.codings("w") == ["rans"]
    assert_same(reader.record("w"), record)
    assert reader.values("w").tobytes() == record.values().tobytes()


@pytest.mark.parametrize("mixed", [True, False])
def test_classes_of_mixed_bitwidths(mixed):
    """Groups of different bitwidths keep a stream each, whose levels have classes."""
    plain = matrix(120, 100, 0.3)
    bits = np.random.default_rng(0).integers(4, 8 if mixed else 5, 3000).astype(np.uint8)
    head = plain.shape, "float32", 4, 4, bits
    record = GridRecord(*head, plain.levels, np.float32([[-1, 1]]))
    reader = Reader(encode({"w": record}, codec="rans"))
    assert reader.codings("w") == ["rans"]
    assert_same(reader.record("w"), record)
    assert np.array_equal(reader.bits("w"), bits)


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 60), RESET)
def test_classes_of_pieces(columns, start, count, seed):
    """A level's class is the sum of its row's and its column's mark, wherever the piece begins."""
    rows = contexts.Rows(columns, start, count)
    places = np.arange(start, start + count)
    row, column = places // columns - start // columns, places % columns
    assert rows.rows == row.max() + 1
    marks = np.random.default_rng(seed).integers(0, contexts.CLASSES, rows.marks).astype(np.uint8)
    wanted = marks[row].astype(int) + marks[rows.rows + column]
    assert rows.classes(marks, 0, 60).tolist() == wanted.tolist()
    assert rows.classes(marks, 20, 25).tolist() == np.clip(wanted, 20, 25).tolist()
    of_rows, of_columns = rows.sizes()
    assert of_rows.tolist() == np.bincount(row, minlength=rows.rows).tolist()
    assert of_columns.tolist() == np.bincount(column, minlength=columns).tolist()


def test_indices_of_16_bits():
    """Indices that no byte holds, and levels of 15 bits, are coded and read back."""
    random, blocks = np.random.default_rng(0), 40_000
    indices = (random.random(blocks) ** 9 * 9).astype(np.uint16) * np.uint16(4999)
    words = random.standard_normal((blocks, 1)).astype(np.float16)
    wide = (1 << 14 | (random.random(blocks) < 0.1)).astype(np.uint16)
    head = (200, 200), "float32", blocks, 15, np.uint8([15]), wide
    for record in (
        ProductRecord((blocks,), "float32", words, indices),
        GridRecord(*head, np.float32([[0, 1]])),
    ):
        reader = Reader(encode({"w": record}, codec="rans"))
        assert reader.codings("w") == ["rans"]
        assert_same(reader.record("w"), record)
        assert reader.values("w").tobytes() == record.values().tobytes()


def test_codings():
    """A reader tells how integers, or else elements, are coded."""
    levels = np.random.default_rng(0).integers(0, 8, 300_000).astype(np.uint16)
    head = (levels.size,), "float32", levels.size, 3, np.uint8([3])
    model = {
        "trained": matrix(600, 500, 0.1),
        "even": GridRecord(*head, levels, np.float32([[0, 1]])),
        "noise": raw(np.random.default_rng(1).integers(0, 256, 300_000, np.uint8), "uint8"),
        "smooth": raw(np.zeros(300_000, np.float32)),
        "words": product(40, 1),
        "empty": raw(np.zeros(0, np.float32)),
    }
    told = {"even": ["none"], "noise": ["none"], "smooth": ["zstd"], "empty": []}
    reader = Reader(encode(model, codec="rans"), LARGE)
    assert reader.codings("trained") == ["rans"]
    assert {name: reader.codings(name) for name in told} == told
    assert Reader(encode(model, codec="zstd"), LARGE).codings("trained") == ["zstd"]
    assert Reader(encode(model, codec="packed"), LARGE).codings("trained") == ["none"]


def test_stored_bytes_add_up():
    """Bytes of tensors and overhead are those of the file, in rANS as well."""
    model = {f"t{i}": matrix(30 + i, 40, 0.1, seed=i) for i in range(5)}
    data = encode(model, codec="rans")
    reader = Reader(data)
    assert sum(map(reader.stored_bytes, model)) + reader.overhead == len(data)


def test_version_is_the_lowest_that_describes_a_file():
    """Files without a segment in rANS are those of "zstd", byte for byte, in version 1.0."""
    levels = np.random.default_rng(0).integers(0, 8, 1000).astype(np.uint16)
    head = (1000,), "float32", 1000, 3, np.uint8([3])
    for model in (
        {},
        {"a": raw(np.float32([1, 2]))},
        {"b": GridRecord(*head, levels, np.float32([[0, 1]]))},
    ):
        data = encode(model, codec="rans")
        assert data[8:10] == b"\x01\x00"
        assert data == encode(model, codec="zstd")
    assert encode({"w": matrix(60, 50, 0.1)}, codec="rans")[8:10] == b"\x01\x01"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    """The bytes, and what is read, do not depend on the number of threads."""
    model = {"a": grid(3 << 20, 1 << 10, (1, 4)), "b": matrix(50, 40, 0.1)}
    data = encode(model, codec="rans", threads=1)
    assert encode(model, codec="rans", threads=threads) == data
    assert_same(Reader(data, LARGE, threads).record("a"), model["a"])


@pytest.mark.parametrize("count", [1, 2, 700, 9000, 300_000])
@pytest.mark.parametrize("rare", [1, 5, 200])
def test_a_writer_takes_lanes_enough(count, rare):
    """However few bytes levels need, their rows stay within what a reader accepts."""
    levels = np.zeros(count, np.uint16)
    levels[:: max(count // rare, 1)] = 3
    columns = max(count // 50, 1)
    piece = LevelPiece("w", np.uint8([2]), levels, count, 0, columns)
    found = runs.encode([piece], 1 << 20)
    assert found
    coding, stored = found
    place = layout.Piece(0, layout.Part(layout.LEVELS, count, count), 0, count)
    (decoded,) = runs.decode(memoryview(stored), coding, [place], "here")
    assert np.array_equal(decoded.streams[2], levels)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5000), st.integers(1, 12), st.floats(-2, 3))
def test_only_what_is_small_enough(seed, count, bits, octaves):
    """A segment is coded just where it takes at most the given bytes, to the byte."""
    random, top = np.random.default_rng(seed), (1 << bits) - 1
    drawn = np.rint(random.laplace(size=count) * 2.0**octaves) + top // 2
    levels, columns = drawn.clip(0, top).astype(np.uint16), int(count**0.5)
    pieces = [LevelPiece("w", np.uint8([bits]), levels, count, 0, columns)]
    found = runs.encode(pieces, 1 << 20)
    size = len(found[1])
    assert runs.encode(pieces, size) == found
    assert runs.encode(pieces, size - 1) is None


def test_states_and_words_are_not_computed_in_vain(monkeypatch):
    """Levels that rANS cannot make smaller than zstd does are not coded in it."""
    levels = np.resize(np.arange(8, dtype=np.uint16), 1 << 16)
    record = GridRecord(
        (1 << 16,), "float32", 1 << 16, 3, np.uint8([3]), levels, np.float32([[0, 1]])
    )
    monkeypatch.setattr(runs.rans, "encode", None)
    assert encode({"w": record}) == encode({"w": record}, codec="zstd")


@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_rans_is_the_default(codec):
    """Without a codec, a file is that of "rans", and only that one has levels in rANS."""
    model = {"w": matrix(60, 50, 0.1), "b": raw(np.float32([1, 2]))}
    data = encode(model, codec=codec)
    assert (data == encode(model)) == (codec == "rans")
    assert (data[8:10] == b"\x01\x01") == (codec == "rans")


def test_lanes():
    """Lanes cost at most 0.9 % of a long segment, and one is enough for a short one."""
    few, many = np.array([900, 100]), np.array([900, 100]) << 10
    entropy = 0.469 / 8
    assert runs._lanes([few], int(entropy * few.sum())) == 1
    size = int(8 * entropy * many.sum())
    assert 4 * runs._lanes([many] * 8, size) <= 0.009 * size + 4
    assert runs._lanes([many << 6] * 8, size << 6) <= 1 << 10
    assert runs._lanes([np.array([1 << 20])], 0) == 1


def test_kept_levels_are_decoded_once(monkeypatch):
    """After verify(keep=True), tensors in rANS are read without decoding them again."""
    model = {"a": matrix(600, 500, 0.1), "b": matrix(50, 40, 0.1), "c": matrix(20, 30, 0.1)}
    reader, decoded = Reader(encode(model, codec="rans"), LARGE), []
    real = runs.decode
    monkeypatch.setattr(runs, "decode", lambda *args: decoded.append(args) or real(*args))
    reader.verify(keep=True)
    once = len(decoded)
    assert once >= 2
    for name, record in model.items():
        assert reader.values(name).tobytes() == record.values().tobytes()
    assert len(decoded) == once
    reader.verify()
    assert len(decoded) > once
