"""Packed weights of every kind decode, whole or by rows, to the bits of their records."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffq.format.records import GridRecord, ScaledRecord
from diffq.packed.kinds import pack
from tests.compare import same_bits
from tests.format.samples import grid, grid_records, product, product_records, scaled_records

RECORDS = st.one_of(grid_records(), scaled_records(), product_records()).filter(
    lambda record: record.shape and record.numel
)


def _decoded(record):
    """What the record itself decodes to."""
    return torch.from_numpy(record.values()).to(getattr(torch, record.dtype))


@given(RECORDS)
def test_records_of_every_kind(record):
    """A packed weight decodes to its record's values: all bitwidths, groups, ranges and dtypes."""
    assert same_bits(pack(record).decode(), _decoded(record))


@given(RECORDS, st.integers(0, 2**32 - 1))
def test_rows_of_every_kind(record, seed):
    """Rows that are decoded alone are those of the whole tensor, in any order and repeated."""
    packed = pack(record, by_rows=True)
    if packed.has_rows:
        rows = torch.from_numpy(np.random.default_rng(seed).integers(0, record.shape[0], 7))
        assert same_bits(packed.decode_rows(rows), _decoded(record)[rows])


@pytest.mark.parametrize("bits", range(1, 16))
@pytest.mark.parametrize("kind", ["grid", "zero point", "ranges", "scaled"])
def test_every_bitwidth(kind, bits):
    """Levels of each bitwidth alone decode to their record's values, with their extremes."""
    top = (1 << bits) - 1
    levels = np.resize(np.array([0, top, top // 2, top, 0], np.uint16), 21)
    head = (3, 7), "float32", 7, bits, np.full(3, bits, np.uint8), levels
    if kind == "scaled":
        record = ScaledRecord(*head, np.float32([0.3]))
    else:
        ranges = np.float32([[-0.7, 1.3], [0, 2], [-1, 0]])[: 3 if kind == "ranges" else 1]
        record = GridRecord(*head, ranges, zero_point=kind == "zero point")
    packed = pack(record, by_rows=True)
    assert same_bits(packed.decode(), _decoded(record))
    assert same_bits(packed.decode_rows(torch.tensor([2, 0])), _decoded(record)[[2, 0]])


@pytest.mark.parametrize(("columns", "group_size"), [(8, 4), (64, 8), (512, 8), (6, 1)])
def test_rows_of_large_tables(columns, group_size):
    """Rows are found in tables of many blocks of rows, the last one short."""
    rows = 2_000 if columns < 64 else 300
    record = grid(rows * columns, group_size, (1, 9), shape=(rows, columns))
    chosen = torch.tensor([0, 1, rows - 1, rows // 2, rows - 2, 257 % rows])
    packed = pack(record, by_rows=True)
    assert packed.has_rows
    assert same_bits(packed.decode_rows(chosen), _decoded(record)[chosen])


def test_memory_of_levels():
    """Levels take their bits, a bit map, and little more: also where rows are found alone."""
    record = grid(512 * 1024, 8, (2, 6), shape=(1024, 512))
    for by_rows in (False, True):
        packed = pack(record, by_rows)
        # The file's map counts from the least bitwidth, in as many bits.
        assert packed.nbytes <= 1.03 * record.stored_bits() / 8


def test_memory_of_codewords():
    """Codewords take their indices and their words in float32."""
    record = product(4096, 256)
    assert pack(record).nbytes == 4096 + 4 * 256 * 8


def test_casts_leave_the_grid_exact():
    """A cast changes the dtype that is decoded to, and nothing else."""
    record = grid(600, 8, shape=(20, 30))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        packed = pack(record).to(dtype)
        assert same_bits(packed.decode(), _decoded(record).to(dtype))
        assert same_bits(packed.float().decode(), _decoded(record))


def test_decoded_weights_are_new():
    """Each decoding is a tensor of its own without gradient, so a write to one changes no other."""
    packed = pack(grid(600, 8, shape=(20, 30)))
    one = packed.decode()
    assert not one.requires_grad
    one.zero_()
    assert packed.decode().any()
