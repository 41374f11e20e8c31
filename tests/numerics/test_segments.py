"""Parts of a flat tensor: sums, maxima and repeated values, on a CPU and by torch's operations."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffq.numerics import segments
from diffq.numerics.segments import Segments, joined_slices
from tests.compare import same_bits
from tests.numerics.ways import both_ways

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


way = both_ways(segments)


def _flat(counts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(counts))
    return torch.randint(-99, 99, (sum(counts),), generator=generator).to(dtype)


@given(COUNTS, st.sampled_from([torch.float32, torch.float64]))
def test_sums_and_maxima_are_those_of_each_part(counts, dtype):
    """Each part has its own sum and maximum, empty ones zero and minus infinity."""
    flat = _flat(counts, dtype)
    parts = torch.split(flat, counts)
    sums = torch.stack([part.sum() for part in parts])
    most = [part.max() if len(part) else flat.new_full((), -torch.inf) for part in parts]
    assert same_bits(Segments(counts).sums(flat), sums)
    assert same_bits(Segments(counts).largest(flat), torch.stack(most))


@given(COUNTS)
def test_spread_repeats_each_value(counts):
    """Each element gets the value of its part; one part's value stands for all elements."""
    values = torch.arange(1.0, len(counts) + 1)
    wanted = torch.repeat_interleave(values, torch.tensor(counts))
    found = Segments(counts).spread(values)
    assert same_bits(found.expand(len(wanted)) if len(counts) == 1 else found, wanted)


@given(COUNTS)
def test_starts_are_where_parts_begin(counts):
    """The parts follow each other without gaps."""
    cut = Segments(counts)
    assert cut.total == sum(counts)
    assert cut.starts_on(torch.device("cpu")).tolist() == list(cut.starts)
    ends = [start + count for start, count in zip(cut.starts, cut.counts, strict=True)]
    assert list(cut.starts) == [0, *ends[:-1]]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=6))
def test_slices_that_touch_are_one(steps):
    """The same elements in the same order, with no slice that ends where the next one begins."""
    slices, place = [], 0
    for gap, length in steps:
        slices.append((place + gap, place + gap + length))
        place += gap + length
    joined = joined_slices(slices)
    assert [i for a, b in joined for i in range(a, b)] == [
        i for a, b in slices for i in range(a, b)
    ]
    assert all(end < start for (_, end), (start, _) in pairwise(joined))
