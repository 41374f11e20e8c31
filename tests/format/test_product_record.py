"""Product-quantized tensors: records, their sizes, and what a file makes of them."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given

from diffq.errors import FormatError
from diffq.format import layout
from diffq.format.container import encode
from diffq.format.entropy import entropy_bits
from diffq.format.kinds.product import ProductRecord, index_bits
from diffq.format.reader import Reader
from tests.format.craft import Elements, File, Levels, floats, frame
from tests.format.craft import product as crafted
from tests.format.samples import assert_same, product, product_records

CODEBOOK = np.float32([[0.5, -1], [2, 3], [4, 5]])


def assert_both_ways(record, codec="zstd", budget=None):
    """A record comes back as it was, and its values in both ways."""
    reader = Reader(encode({"w": record}, codec=codec), budget)
    assert_same(reader.record("w"), record)
    assert reader.values("w").tobytes() == record.values().tobytes()
    reader.verify()


@given(product_records())
def test_values(record):
    """Block i of the tensor, in C order, is the codeword that index i names."""
    block_size = record.codebook.shape[1]
    flat = record.values().reshape(-1)
    for i, index in enumerate(record.indices):
        word = record.codebook[index].astype(np.float32)
        if record.codebook.dtype == np.uint8:
            word = (word - np.float32(record.zero)) * np.float32(record.scale)
        assert flat[i * block_size : (i + 1) * block_size].tobytes() == word.tobytes()
    assert record.values().shape == record.shape
    assert record.values().size == record.numel
    assert np.isfinite(flat).all()


@pytest.mark.parametrize(("stored", "bits"), [("uint8", 8), ("float16", 16), ("float32", 32)])
@pytest.mark.parametrize("codewords", [1, 2, 3, 64, 100, 256, 257])
def test_stored_bits_is_equation_5(stored, bits, codewords):
    """8 K d + log2 K for each block with uint8 codewords, which take a scale and a zero point."""
    record = product(500, codewords, 8, stored)
    equation = bits * codewords * 8 + math.ceil(math.log2(codewords)) * 500
    assert record.stored_bits() == equation + (40 if stored == "uint8" else 0)


def test_equation_5_of_a_layer():
    """The paper's numbers: K = 256, d = 8 in a layer of 1024 x 4096 take one bit a weight."""
    record = product(1024 * 512, 256, 8, "uint8", shape=(1024, 4096))
    assert record.stored_bits() == 8 * 256 * 8 + 8 * 1024 * 512 + 40


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"codebook": CODEBOOK.astype(np.float64)},
            "codewords are uint8, float16, float32",
        ),
        ({"codebook": CODEBOOK[0]}, "two dimensions"),
        ({"shape": (3, 3)}, "divide a tensor's 9 weights, got blocks of 2"),
        ({"codebook": CODEBOOK[:0]}, "from 1 to 5 codewords, got 0"),
        ({"codebook": CODEBOOK[:, :0]}, "blocks of 0"),
        ({"codebook": np.zeros((6, 2), "f4")}, "from 1 to 5 codewords, got 6"),
        ({"indices": np.zeros(4, np.uint16)}, "one index for each block"),
        ({"indices": np.uint16([0, 1, 2, 3, 0])}, "below 3, got 3"),
        ({"codebook": CODEBOOK * np.float32(np.nan)}, "finite"),
        ({"codebook": CODEBOOK.astype(np.float16) * np.float16(np.inf)}, "finite"),
        ({"scale": 2.0}, "Only uint8"),
        ({"zero": 1}, "Only uint8"),
        ({"codebook": CODEBOOK.astype(np.uint8), "scale": 0.1}, "float32 scale"),
        ({"codebook": CODEBOOK.astype(np.uint8), "scale": -1.0}, "float32 scale"),
        ({"codebook": CODEBOOK.astype(np.uint8), "scale": math.nan}, "float32 scale"),
        ({"codebook": CODEBOOK.astype(np.uint8), "scale": 2.0**121}, "float32 scale"),
        ({"codebook": CODEBOOK.astype(np.uint8), "zero": 256}, "zero point"),
        ({"codebook": CODEBOOK.astype(np.uint8), "zero": -1}, "zero point"),
    ],
)
def test_contradictions(change, rule):
    """Sizes and values that contradict each other are refused with the rule."""
    fields = {"shape": (5, 2), "dtype": "float32", "codebook": CODEBOOK}
    fields["indices"] = np.uint16([0, 1, 2, 0, 1])
    with np.errstate(invalid="ignore"), pytest.raises(FormatError, match=rule):
        ProductRecord(**fields | change)


@pytest.mark.parametrize("codewords", [1, 2, 3, 255, 256, 257, 512, 40_000, 65_535, 65_536])
@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_codebooks_of_any_size(codewords, codec):
    """Indices of 0 to 16 bits come back, and packed take their bits and hardly more."""
    record = product(max(codewords, 3000), codewords, 2)
    assert_both_ways(record, codec)
    size = 8 * len(encode({"w": record}, codec=codec))
    assert size <= record.stored_bits() + 8 * 150


@pytest.mark.parametrize("codewords", [1, 5, 1000])
@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_long_tensors_are_cut(codewords, codec):
    """Tensors of more blocks than a segment holds come back."""
    assert_both_ways(product(2 * layout.MAX_WEIGHTS + 5, codewords, 2), codec, 1 << 30)


def test_most_blocks_and_weights_of_a_segment():
    """A tensor with exactly as many blocks as a segment holds takes one."""
    assert_both_ways(product(layout.MAX_WEIGHTS, 4, 1), budget=1 << 30)


@pytest.mark.parametrize("codewords", [16, 256, 1024, 4096])
def test_indices_are_near_their_entropy(codewords):
    """Entropy-coded, indices sorted by frequency take at most 1.03 times their entropy."""
    record = product(400_000, codewords, 8, "uint8")
    indices = entropy_bits(np.bincount(record.indices))
    codebook = record.codebook.size * 8
    assert 8 * len(encode({"w": record})) <= 1.03 * indices + codebook + 8 * 1000
    assert record.entropy_bound_bits() == pytest.approx(indices + codebook + 40)


def test_bits_of_an_index():
    """An index has log2 K bits, rounded up: none for a single codeword."""
    assert [index_bits(k) for k in (1, 2, 3, 4, 5, 256, 257, 65_536)] == [0, 1, 2, 2, 3, 8, 9, 16]


def test_indices_share_segments_with_levels():
    """Short tensors of levels and of indices stand in one segment and are told apart."""
    from tests.format.samples import grid

    records = {f"w{i}": product(90 + i, 4 + i, 3, seed=i) for i in range(6)}
    records |= {f"g{i}": grid(400, 8, (2, 4), seed=i) for i in range(3)}
    reader = Reader(encode(records))
    assert sum(segment.item == layout.LEVELS for segment in reader._layout.segments) < 4
    for name, record in records.items():
        assert_same(reader.record(name), record)
    for name, values in reader.values_of().items():
        assert values.tobytes() == records[name].values().tobytes()


def test_no_bits_by_group():
    """Indices have no bitwidths of groups of weights to ask for."""
    from diffq.errors import ConfigError

    with pytest.raises(ConfigError, match="stored as levels"):
        Reader(encode({"w": product(20, 4)})).bits("w")


def test_budget_counts_codebook_and_indices():
    """A codebook counts as it is stored and at 4 bytes an entry, an index at 2 bytes."""
    record = product(1000, 100, 8, "float16")
    data, needed = encode({"w": record}), 4 * 8000 + 2 * 1000 + (2 + 4) * 800
    Reader(data, needed).verify()
    with pytest.raises(FormatError, match="budget"):
        Reader(data, needed - 1)


def test_tiny_file_of_many_weights():
    """A file of less than 1 KiB takes less than 16 MB to read, whatever it says."""
    blocks = 3 << 17
    tensor = crafted((blocks, 4), 4, 2, stored=9)
    indices = Levels(frame(bytes(blocks // 8)), payload=blocks // 8, used=2, widths=(1,))
    data = File(tensors=(tensor,), segments=(Elements(bytes(16)), indices)).build()
    assert len(data) < 1024
    tracemalloc.start()
    try:
        reader = Reader(data, threads=2)
        assert not reader.values("w").any()
        reader.verify()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16_000_000


def test_crafted_file_is_sound():
    """What the hostile files are made from is a sound file: each breaks one rule alone."""
    parts = {"tensors": (crafted(),), "segments": (Elements(floats(*range(8))), Levels(b"\xe4"))}
    record = Reader(File(**parts).build()).record("w")
    assert record.indices.tolist() == [0, 1, 2, 3]
    assert record.values().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    scaled = crafted(stored=1, scale=floats(0.5) + b"\x03")
    parts = {"tensors": (scaled,), "segments": (Elements(bytes(range(8))), Levels(b"\xe4"))}
    values = Reader(File(**parts).build()).values("w")
    assert values.tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
