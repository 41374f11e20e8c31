"""Many tensors as the rows of one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffq.numerics import flat as module
from diffq.numerics.flat import WIDTH, Flat, rows_of
from tests.compare import same_bits
from tests.numerics.ways import both_ways

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5)
GROUPS = st.sampled_from([None, 1, 3, 8, 100])


way = both_ways(module)


def _tensors(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randint(-9, 9, shape, generator=generator).to(dtype) for shape in shapes]


def _flat(tensors, group_size):
    return Flat([tensor.shape for tensor in tensors], group_size)


@given(SHAPES, GROUPS, st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_split_takes_apart_what_join_put_together(shapes, group_size, dtype):
    """Joined tensors are in rows of a group, in float32 at least, and come back as they were."""
    tensors = _tensors(shapes, dtype)
    flat = _flat(tensors, group_size)
    joined = flat.join(tensors, tensors[0])
    assert joined.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert joined.shape == (flat.rows.total, group_size or WIDTH)
    assert all(same_bits(b.to(dtype), a) for a, b in zip(tensors, flat.split(joined), strict=True))
    assert joined.double().sum() == sum(tensor.double().sum() for tensor in tensors)
    nothing = flat.join([None, *tensors[1:]], tensors[0])
    assert not flat.split(nothing)[0].any()


@given(SHAPES, GROUPS)
def test_ends_are_the_first_extremes(shapes, group_size):
    """Minimum and maximum of each tensor, and the first place of each among all elements."""
    tensors = _tensors(shapes)
    flat = _flat(tensors, group_size)
    ends = flat.ends(tensors)
    starts = [row * flat.width for row in flat.rows.starts]
    for tensor, start, low, high, places in zip(tensors, starts, *ends, strict=True):
        assert (low, high) == (tensor.min(), tensor.max())
        first = tensor.reshape(-1).tolist()
        wanted = [first.index(low.item()), first.index(high.item())]
        assert (places - start).tolist() == wanted


@given(SHAPES, GROUPS)
def test_groups_have_rows(shapes, group_size):
    """A group's number reaches its rows."""
    tensors = _tensors(shapes)
    flat = _flat(tensors, group_size)
    numbers = torch.arange(1.0, flat.groups.total + 1)
    rows = flat.to_rows(numbers).expand(flat.rows.total)
    counts = flat.rows.counts if group_size is None else [1] * flat.rows.total
    assert same_bits(rows, torch.repeat_interleave(numbers, torch.tensor(counts)))


def test_pieces_are_all_rows_in_order():
    """What is computed piece by piece is what is computed at once, for tensors of all sizes."""
    sizes = [5, 2**18 + 3, 1, 2**17, 70]
    tensors = [torch.randn(size) for size in sizes]
    flat = _flat(tensors, 8)
    numbers, seen = torch.randn(flat.rows.total), []

    def product(piece, room):
        seen.append(piece)
        assert room.shape == (piece.rows.stop - piece.rows.start, 8)
        torch.mul(flat.join(tensors, tensors[0], piece), rows_of(numbers, piece)[:, None], out=room)
        return (room.amax(1),)

    with torch.no_grad():
        rows, most = flat.compute(tensors[0], product)
    whole = flat.join(tensors, tensors[0]) * numbers[:, None]
    assert same_bits(rows, whole)
    assert same_bits(most, whole.amax(1))
    # On other devices and where there is a graph, all at once.
    on_cpu = module.in_numpy(tensors[0])
    assert (len(seen) > 3) == on_cpu
    assert [piece.rows.start for piece in seen[1:]] == [piece.rows.stop for piece in seen[:-1]]


@given(SHAPES, GROUPS)
def test_zeros_and_the_largest_magnitude(shapes, group_size):
    """Tensors that hold an exact zero, of those that are looked at; the largest of all elements."""
    tensors = _tensors(shapes)
    flat = _flat(tensors, group_size)
    wanted = [number % 2 == 0 for number in range(len(tensors))]
    found = flat.zeros(tensors, wanted).tolist()
    expected = [
        0 in t.reshape(-1).tolist() and want for t, want in zip(tensors, wanted, strict=True)
    ]
    assert found == expected
    assert flat.largest(tensors) == max(tensor.abs().max() for tensor in tensors)
