"""How small files get, and what decides it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffq.format import costs, entropy, layout, pooling
from diffq.format.container import encode
from diffq.format.entropy import entropy_bits
from diffq.format.records import GridRecord, RawRecord, ScaledRecord
from tests.format.samples import RECORDS, grid, raw


def language_model(tail=None):
    """0.84M weights in groups of 8 with 2 to 6 bits, and biases and norms."""
    random, records = np.random.default_rng(0), {"embed.weight": grid(256 * 128, tail=tail)}
    for i in range(4):
        shapes = {"attn.in": 384 * 128, "attn.out": 128**2, "up": 512 * 128, "down": 512 * 128}
        for j, (name, numel) in enumerate(shapes.items()):
            records[f"layers.{i}.{name}.weight"] = grid(numel, seed=10 * i + j, tail=tail)
            bias = 0.02 * random.standard_normal(numel // 128)
            records[f"layers.{i}.{name}.bias"] = raw(bias.astype(np.float32))
    return records


def convolutional_model(tail=None):
    """Twenty tensors of a few thousand weights with batch norm: 60 kB quantized."""
    random, records = np.random.default_rng(0), {}
    for i in range(20):
        name = f"layer{i // 6 + 1}.{i % 6 // 2}.conv{i % 2 + 1}.weight"
        records[name] = grid(int(random.integers(6000, 11000)) // 9 * 9, seed=i, tail=tail)
        records[name.replace("conv", "bn")] = raw(random.standard_normal(32).astype(np.float32))
    return records


def bound(records):
    """Bytes of levels, bit maps and raw tensors at zeroth-order entropy, without parameters."""
    total = 0.0
    for record in records.values():
        total += record.entropy_bound_bits()
        if not isinstance(record, RawRecord):
            total -= record.parameter_bits
    return total / 8


def packed_size(records):
    """Bytes by Equation 12 of the paper."""
    return sum(record.stored_bits() for record in records.values()) / 8


def test_language_model_is_near_the_bound():
    """A language model takes at most 1.03 times the entropy of its levels, maps and raw tensors."""
    records = language_model()
    size = len(encode(records))
    assert size <= 1.03 * bound(records)
    assert size <= packed_size(records) + 1000


@pytest.mark.parametrize("tail", [None, 8])
def test_small_model_is_near_the_bound(tail):
    """Twenty short tensors take at most 1.10 times their entropy, names and headers included."""
    records = convolutional_model(tail)
    assert 40_000 < packed_size(records) < 90_000
    assert len(encode(records)) <= 1.10 * bound(records)


@pytest.mark.parametrize("model", [language_model, convolutional_model])
def test_packed_codec_is_near_equation_12(model):
    """Without entropy coding, a file takes what Equation 12 counts and 1 kB at most."""
    records = model()
    assert len(encode(records, codec="packed")) <= packed_size(records) + 1000


def test_levels_without_structure_cost_no_more_than_packed():
    """Levels that cannot be compressed take their bitwidth and hardly more."""
    levels = np.random.default_rng(0).integers(0, 8, 1_000_000).astype(np.uint16)
    fields = (levels.size,), "float32", levels.size, 3, np.uint8([3]), levels
    record = GridRecord(*fields, np.float32([[0, 1]]))
    assert len(encode({"w": record})) <= 3 * levels.size / 8 + 150


@given(hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, 1000)))
def test_entropy_of_counts(counts):
    """Entropy is -sum p log2 p for each symbol, times the symbols."""
    total = counts.sum()
    expected = sum(n * np.log2(total / n) for n in counts.tolist() if n)
    assert entropy_bits(counts) == pytest.approx(expected, abs=1e-6)


def test_bound_of_a_grid():
    """The bound of a grid: its range, its bit map, and the levels of each bitwidth."""
    bits, levels = np.uint8([2, 3, 2, 2]), np.uint16([0, 1, 7, 7, 0, 1, 3, 2])
    record = GridRecord((8,), "float32", 2, 2, bits, levels, np.float32([[0, 1]]))
    bit_map = 4 * (0.25 * 2 + 0.75 * np.log2(4 / 3))
    two_bits = 6 * (2 / 3 * np.log2(3) + 1 / 3 * np.log2(6))
    assert record.entropy_bound_bits() == pytest.approx(64 + bit_map + two_bits)


@given(RECORDS)
def test_bound_is_at_most_what_is_stored(record):
    """Entropy never exceeds what Equation 12 counts."""
    assert 0 <= record.entropy_bound_bits() <= record.stored_bits()


def test_bound_of_other_kinds():
    """A raw tensor counts its bytes, a constant its range, a scaled tensor its scale and levels."""
    assert raw(np.zeros(5, np.float32)).entropy_bound_bits() == 160
    zeros = np.zeros(4, np.uint16)
    constant = GridRecord((4,), "float32", 4, 2, np.uint8([2]), zeros, np.float32([[1, 1]]))
    assert constant.entropy_bound_bits() == 64
    scaled = ScaledRecord(
        (4,), "float32", 4, 2, np.uint8([2]), np.uint16([0, 1, 2, 3]), np.ones(1, "f4")
    )
    assert scaled.entropy_bound_bits() == 32 + 8


def test_no_count_is_near_a_tie():
    """Rounded to 1/1024 bit, the log2 of no count depends on the last digits of a float."""
    counts = np.arange(1, 2 * layout.MAX_WEIGHTS + 1)
    scaled = np.log2(counts) * costs.UNIT
    assert abs(scaled - np.floor(scaled) - 0.5).min() > 1e-9


def test_alike_tensors_share_and_others_do_not():
    """Tensors of like statistics share a segment; one of other statistics gets its own."""
    alike = {f"a{i}": grid(4000, seed=i) for i in range(5)}
    other = {"b": grid(150_000, 8, (2, 6), seed=9, tail=2)}
    sizes = [len(encode(records)) for records in (alike, other, {**alike, **other})]
    alone = sum(len(encode({name: record})) for name, record in alike.items())
    assert sizes[0] < alone - 4 * 200
    assert sizes[2] <= sizes[0] + sizes[1]


def test_pools_do_not_overflow():
    """Short tensors open another segment when one is full."""
    records = {f"w{i}": grid(1 << 18, 1 << 18, (2, 2), seed=i) for i in range(5)}
    records |= {f"r{i}": raw(np.full(1 << 18, i, np.uint8), "uint8") for i in range(17)}
    for compress in (True, False):
        plan = pooling.Pooling(compress)
        for name, record in records.items():
            plan.add(record.entry(name), record.coded)
        for segment in plan.layout.segments:
            assert segment.count * max(segment.item, 1) <= segment.pieces[0].part.limit * max(
                segment.item, 1
            )
        assert len(plan.layout.segments) < len(records)


@given(st.integers(1, 15), st.integers(1, 3000))
def test_packed_width_of_a_stream(width, count):
    """The width that a stream is packed at is its own or one of the wider 2, 4 and 8 bits."""
    symbols = np.random.default_rng(count).integers(0, 1 << width, count).astype(np.uint16)
    best = entropy._best_width(entropy._Stream(width, symbols))
    assert best == width or (best > width and best in entropy.WIDER)
