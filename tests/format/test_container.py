"""Records to files and back."""

import json
import math
import threading
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffq.errors import ConfigError, FormatError
from diffq.format import chunks, layout
from diffq.format import reader as reader_module
from diffq.format.container import Codec, decode, encode, encode_parts
from diffq.format.kinds.product import ProductRecord
from diffq.format.reader import Reader, default_budget, least_size
from diffq.format.records import ITEM_SIZES, GridRecord, RawRecord, ScaledRecord, group_count
from tests.format import craft
from tests.format.samples import (
    NAMES,
    RECORDS,
    as_stored,
    assert_same,
    codebook_model,
    grid,
    grid_records,
    random_levels,
    raw,
    scaled_records,
    small_model,
    stepped,
    stepped_model,
    stepped_records,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)
CODECS = st.sampled_from(get_args(Codec))
LARGE = 1 << 40


def assert_same_values(one, other):
    """Two arrays of values are equal to the bit."""
    assert one.dtype == other.dtype == np.float32
    assert one.shape == other.shape
    assert one.tobytes() == other.tobytes()


@given(
    st.dictionaries(NAMES, RECORDS, max_size=6),
    CODECS,
    st.dictionaries(st.text(), JSON, max_size=3),
)
def test_round_trip(records, codec, metadata):
    """Records of any shape, kind and dtype come back in every bit, in their order."""
    restored, aliases, read = decode(encode(records, {}, metadata, codec))
    assert list(restored) == list(records)
    for name, record in records.items():
        assert_same(as_stored(record), restored[name])
    assert aliases == {}
    assert read == metadata


@given(st.one_of(grid_records(), scaled_records(), stepped_records()), CODECS)
def test_values_are_those_of_the_record(record, codec):
    """The fast way to values gives what the record's own arithmetic gives, bit for bit."""
    reader = Reader(encode({"a": record}, codec=codec))
    assert_same_values(reader.values("a"), record.values())
    assert np.array_equal(reader.bits("a"), as_stored(record).bits)


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_every_raw_dtype(dtype, codec):
    """Raw tensors of every dtype are stored to the bit, NaN payloads and -0.0 included."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 2 if dtype == "bool" else 256, 1000 * ITEM_SIZES[dtype], np.uint8)
    record = RawRecord((10, 100), dtype, dtype, data)
    smooth = RawRecord((10, 100), dtype, dtype, np.zeros_like(data))
    restored, _, _ = decode(encode({"a": record, "b": smooth}, codec=codec))
    assert_same(restored["a"], record)
    assert_same(restored["b"], smooth)


@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_all_bitwidths_at_once(codec):
    """One tensor can use all bitwidths from 1 to 15."""
    bits = np.tile(np.arange(1, 16), 40).astype(np.uint8)
    levels = random_levels(bits, 7, bits.size * 7 - 3, seed=0)
    record = GridRecord((levels.size,), "float32", 7, 1, bits, levels, np.float32([[-0.3, 0.7]]))
    reader = Reader(encode({"a": record}, codec=codec))
    assert_same(reader.record("a"), record)
    assert_same_values(reader.values("a"), record.values())


@pytest.mark.parametrize(
    ("numel", "group_size"),
    [
        (layout.MAX_WEIGHTS + 5, 8),
        (layout.MAX_WEIGHTS + 5, 1000),
        (2 * layout.MAX_WEIGHTS + 5, 2 * layout.MAX_WEIGHTS + 5),
        (2 * layout.MAX_WEIGHTS + 100, layout.MAX_WEIGHTS + 50),
    ],
)
@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_long_tensors_are_cut(numel, group_size, codec):
    """Tensors longer than a segment come back, also where a group fills several segments."""
    record = grid(numel, group_size)
    reader = Reader(encode({"a": record}, codec=codec), LARGE)
    assert_same(reader.record("a"), record)
    assert_same_values(reader.values("a"), record.values())


@pytest.mark.parametrize("group_size", [1, 7, layout.MAX_BYTES // 2 + 1])
@pytest.mark.parametrize("codec", get_args(Codec))
def test_long_stepped_tensors_are_cut(group_size, codec):
    """Stepped tensors longer than a segment come back, and so do more steps than fit in one."""
    record = stepped((layout.MAX_BYTES // 2 + 5,), group_size, bits=2)
    reader = Reader(encode({"a": record}, codec=codec), LARGE)
    assert_same(reader.record("a"), record)
    assert_same_values(reader.values("a"), record.values())


@pytest.mark.parametrize("codec", get_args(Codec))
def test_stepped_tensors_need_version_1_1(codec):
    """A file with a stepped tensor is of version 1.1 whatever its codec, one without of 1.0."""
    model = {"a": stepped((4, 6), 6), "b": raw(np.zeros(2, np.float32))}
    assert encode(model, codec=codec)[8:10] == b"\x01\x01"
    assert encode({"b": model["b"]}, codec=codec)[8:10] == b"\x01\x00"
    for name, record in decode(encode(model, codec=codec))[0].items():
        assert_same(record, model[name])


def test_small_stepped_tensors_share_segments():
    """Short stepped tensors share segments of steps and of levels, beside other kinds."""
    records = {**stepped_model(), **small_model()}
    alone = sum(len(encode({name: record})) for name, record in records.items())
    data = encode(records)
    assert len(data) < 0.8 * alone
    reader = Reader(data)
    for name, record in records.items():
        assert_same(reader.record(name), record)


def test_long_raw_tensors_are_cut():
    """Raw tensors longer than a segment come back."""
    data = np.arange(layout.MAX_BYTES // 2 + 3).astype(np.uint16)
    assert_same(decode(encode({"a": raw(data, "int16")}))[0]["a"], raw(data, "int16"))


def test_ranges_per_group():
    """Grids with a range for each group come back, long ones and short ones."""
    one = grid(layout.MAX_WEIGHTS + 20, 16)
    sides = np.random.default_rng(0).standard_normal((one.bits.size, 2)).astype(np.float32)
    record = GridRecord(**{**vars(one), "ranges": np.sort(sides, axis=1)})
    reader = Reader(encode({"a": record}))
    assert_same(reader.record("a"), record)
    assert_same_values(reader.values("a"), record.values())


@given(st.integers(1, 3), st.integers(0, 40))
def test_short_tensors_share_segments(seed, extra):
    """Tensors that share segments are decoded one by one as well as all at once."""
    records = {f"layer.{i}": grid(40 + i * extra, 1 + i, seed=seed) for i in range(12)}
    reader = Reader(encode(records))
    for name, record in records.items():
        assert_same(reader.record(name), record)
        assert_same_values(reader.values(name), record.values())
    for name, values in reader.values_of().items():
        assert_same_values(values, records[name].values())


def model_of_many_sizes():
    """Large, small and raw tensors, so that every kind of segment occurs."""
    return {
        **small_model(),
        **{f"product.{name}": record for name, record in codebook_model().items()},
        "large": grid(layout.MAX_WEIGHTS + 100, 8, seed=2),
        "raw.large": raw(np.random.default_rng(3).standard_normal(300_000).astype(np.float32)),
        **{f"layer.{i}": grid(3000 + i, 8, seed=i, tail=3 + i % 4) for i in range(8)},
    }


def test_threads_do_not_matter():
    """One thread and many write the same bytes and read the same tensors."""
    records = model_of_many_sizes()
    data = encode(records, threads=1)
    for threads in (2, 7, None):
        assert encode(records, threads=threads) == data
        many, one = Reader(data, threads=threads), Reader(data, threads=1)
        for name, record in many.records().items():
            assert_same(record, one.record(name))
        for name, values in many.values_of().items():
            assert_same_values(values, one.values(name))


def test_one_reader_in_many_threads():
    """Threads that share a reader get what one thread gets."""
    records = model_of_many_sizes()
    reader, failures = Reader(encode(records)), []

    def read(offset):
        try:
            names = list(records)
            for name in names[offset:] + names[:offset]:
                assert_same(reader.record(name), as_stored(records[name]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_same_records_same_bytes():
    """The bytes depend on the records alone, not on how their arrays lie in memory."""
    records, copies = small_model(), {}
    for name, record in records.items():
        fields = dict(vars(record))
        for field, value in fields.items():
            if isinstance(value, np.ndarray):
                spread = np.zeros((*value.shape, 2), value.dtype)
                spread[..., 0] = value
                fields[field] = spread[..., 0]
        copies[name] = type(record)(**fields)
    assert encode(copies) == encode(records)


def test_parts_are_the_file():
    """encode_parts gives the bytes of encode."""
    records = small_model()
    assert b"".join(encode_parts(records, metadata={"a": 1})) == encode(records, metadata={"a": 1})


def test_index_says_it_all():
    """Names, kinds, shapes, dtypes and group sizes are known before any tensor is read."""
    records = codebook_model() | small_model()
    reader = Reader(encode(records, {"tied": "embed.weight"}, {"epoch": 3}))
    assert list(reader.entries) == list(records)
    assert reader.aliases == {"tied": "embed.weight"}
    assert reader.metadata == {"epoch": 3}
    for name, record in records.items():
        entry = reader.entries[name]
        assert (entry.name, entry.shape, entry.dtype) == (name, record.shape, record.dtype)
        if isinstance(record, RawRecord):
            assert (entry.kind, entry.stored_dtype) == ("raw", record.stored_dtype)
        elif isinstance(record, ProductRecord):
            assert (entry.kind, entry.stored_dtype) == ("product", record.stored_dtype)
            assert (entry.codewords, entry.block_size) == record.codebook.shape
            assert (entry.scale, entry.zero) == (record.scale, record.zero)
        else:
            assert entry.kind == ("scaled" if isinstance(record, ScaledRecord) else "grid")
            assert entry.group_size == record.group_size
            assert entry.groups == group_count(record.numel, record.group_size)
            assert entry.constant == record.constant


def test_aliases_read_their_tensor():
    """A tensor can be read by the name of an alias."""
    records = small_model()
    reader = Reader(encode(records, {"tied": "embed.weight"}))
    assert_same(reader.record("tied"), records["embed.weight"])
    both = reader.values_of(["tied", "embed.weight"])
    assert both["tied"] is both["embed.weight"] or np.array_equal(*both.values())


def test_bytes_of_tensors_add_up():
    """The bytes that tensors take add up to the segments of the file."""
    records = model_of_many_sizes()
    data = encode(records)
    reader = Reader(data)
    total = sum(reader.stored_bytes(name) for name in records)
    assert total == reader.size - reader.overhead
    assert 0 < reader.overhead < 1600


def test_values_into_memory_of_the_caller():
    """Values are written to the arrays that the caller passes."""
    record = grid(100, 8, shape=(4, 25))
    reader = Reader(encode({"a": record}))
    out = np.empty((4, 25), np.float32)
    assert np.shares_memory(reader.values("a", out), out)
    assert_same_values(out, record.values())


@pytest.mark.parametrize(
    "out",
    [np.empty((25, 4), np.float32), np.empty((4, 25)), np.empty((25, 4), np.float32).T],
)
def test_values_into_unfit_memory(out):
    """An array of another shape, dtype or order is refused."""
    reader = Reader(encode({"a": grid(100, 8, shape=(4, 25))}))
    with pytest.raises(ConfigError, match="C-contiguous float32"):
        reader.values("a", out)


def test_names_that_are_not_there():
    """A name that the file does not have is an error, as are values of a raw tensor."""
    reader = Reader(encode({"a": raw(np.zeros(3, np.float32))}))
    for read in (reader.record, reader.values, reader.bits, reader.stored_bytes):
        with pytest.raises(ConfigError, match="got 'b'"):
            read("b")
    with pytest.raises(ConfigError, match="stored as levels"):
        reader.values("a")
    with pytest.raises(ConfigError, match="stored as levels"):
        reader.bits("a")


def test_reader_closes():
    """After close the buffer can be changed or unmapped."""
    buffer = bytearray(encode(small_model()))
    reader = Reader(buffer)
    reader.verify()
    reader.close()
    buffer.clear()


def test_more_shared_segments_than_are_kept(monkeypatch):
    """Tensors come back one by one if not all segments that they share stay in memory."""
    monkeypatch.setattr(reader_module, "_MOST_SHARED", 1)
    records = model_of_many_sizes()
    reader = Reader(encode(records))
    for _ in range(2):
        for name, record in records.items():
            assert_same(reader.record(name), as_stored(record))


def test_read_only_buffers_of_any_kind():
    """bytes, bytearray and memoryview are read alike."""
    data = encode(small_model())
    for buffer in (data, bytearray(data), memoryview(data)):
        Reader(buffer).verify()


@pytest.mark.parametrize(
    ("aliases", "rule"),
    [
        ({"tied": "nothing"}, "must name a stored tensor, got 'nothing'"),
        ({"embed.weight": "empty"}, "must be a new name"),
        ({"embed.weight": "embed.weight"}, "must be a new name"),
        ({"a": "b", "b": "a"}, "must name a stored tensor, got 'b'"),
        ({"a": "embed.weight", "b": "a"}, "must name a stored tensor, got 'a'"),
    ],
)
def test_bad_aliases_are_not_written(aliases, rule):
    """An alias to nothing, of a tensor's name, of itself, in a cycle or of an alias is refused."""
    with pytest.raises(FormatError, match=rule):
        encode(small_model(), aliases)


@pytest.mark.parametrize("name", ["", "a\nb", "a\x7f", "\ud800", "x" * 1025, "é" * 513])
def test_bad_names_are_not_written(name):
    """Names that are empty, too long, no text or have control characters are refused."""
    with pytest.raises(FormatError, match="A name"):
        encode({name: raw(np.zeros(1, np.float32))})
    with pytest.raises(FormatError, match="A name"):
        encode({"a": raw(np.zeros(1, np.float32))}, {name: "a"})


def test_longest_name():
    """A name of 1024 bytes is written and read."""
    name = "é" * 512
    assert list(Reader(encode({name: raw(np.zeros(1, np.float32))})).entries) == [name]


def test_level_that_does_not_fit_is_not_written():
    """A level that needs more bits than its group has is refused, with the tensor's name."""
    record = GridRecord(
        (4,), "float32", 2, 2, np.uint8([2, 3]), np.uint16([0, 4, 1, 1]), np.float32([[0, 1]])
    )
    with pytest.raises(FormatError, match="'a': levels of 2 bits must be below 4, got 4"):
        encode({"a": record})


@pytest.mark.parametrize(
    ("shape", "rule"),
    [((1,) * 33, "at most 32 dimensions"), ((0, 2**49), r"at most 2\*\*48")],
)
def test_shapes_that_no_reader_takes(shape, rule):
    """Shapes beyond the limits of the format are refused before they are written."""
    data = np.zeros(4 * math.prod(shape), np.uint8)
    with pytest.raises(FormatError, match=rule):
        encode({"a": RawRecord(shape, "float32", "float32", data)})


def test_unknown_codec():
    """Another codec than zstd, rans and packed is refused."""
    with pytest.raises(ConfigError, match="'zstd', 'rans' or 'packed', got 'lzma'"):
        encode({}, codec="lzma")


def test_empty_file():
    """A file without tensors is a file."""
    assert decode(encode({})) == ({}, {}, {})


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": math.nan},
        {"a": math.inf},
        {"a": {1, 2}},
        {"a": b"bytes"},
        {"a": "x" * (1 << 20)},
        {("a",): 1},
        json.loads('{"a":' * 33 + "1" + "}" * 33),
    ],
)
def test_bad_metadata_is_not_written(metadata):
    """Metadata that is not plain JSON, too long or too deep is refused."""
    with pytest.raises(FormatError, match="The metadata must be plain JSON"):
        encode({}, {}, metadata)


def test_metadata_that_is_no_dict():
    """Metadata other than a dict is refused."""
    with pytest.raises(FormatError, match="The metadata is a dict, got list"):
        encode({}, {}, [1])


def test_metadata_compresses_within_the_ratio():
    """Metadata that compresses beyond what a reader accepts is stored so that it can be read."""
    metadata = {"log": " " * 1_000_000}
    assert decode(encode({}, {}, metadata))[2] == metadata


def test_budget():
    """A file decodes to at most 8 MB and 1024 times its size, unless the caller allows more."""
    data = craft.File(tensors=(craft.raw((12 << 20,), dtype=1),), segments=()).build()
    with pytest.raises(FormatError, match=f"budget of {default_budget(len(data))}.*larger budget"):
        Reader(data)
    zeros = raw(np.zeros(10_000_000, np.uint8), "uint8")
    with pytest.raises(FormatError, match="budget"):
        Reader(encode({"zeros": zeros}), zeros.data.size - 1)
    assert_same(Reader(encode({"zeros": zeros}), zeros.data.size).record("zeros"), zeros)


@given(st.integers(0, 1 << 40))
def test_least_size(decoded):
    """least_size is the smallest size of a file whose default budget is enough."""
    size = least_size(decoded)
    assert default_budget(size) >= decoded
    assert size == 0 or default_budget(size - 1) < decoded


@pytest.mark.parametrize("numel", [8 << 20, (8 << 20) + 200_000, (8 << 20) + 310_000, 20_000_000])
def test_files_are_readable_by_default(numel):
    """A file that decodes to far more than its content is filled up to what its budget needs."""
    zeros = raw(np.zeros(numel, np.uint8), "uint8")
    data = encode({"zeros": zeros})
    reader = Reader(data)
    reader.verify()
    assert_same(reader.record("zeros"), zeros)
    assert len(data) <= max(600, least_size(numel) + chunks.HEADER_BYTES)


def test_budget_counts_all_tensors():
    """The budget is for all tensors together, at 4 bytes a weight."""
    records = {"a": grid(1000, 1000), "b": grid(1000, 1000)}
    data, needed = encode(records), 2 * (4 * 1000 + 4 * 2 + 1)
    Reader(data, needed).verify()
    with pytest.raises(FormatError, match="up to 'b'"):
        Reader(data, needed - 1)
