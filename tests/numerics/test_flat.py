"""Many tensors as the rows of one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffq.numerics import flat as module
from diffq.numerics.flat import WIDTH, Flat
from tests.compare import same_bits

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5)
GROUPS = st.sampled_from([None, 1, 3, 8, 100])


@pytest.fixture(params=["numpy", "torch"], autouse=True, scope="module")
def backend(request):
    """Both ways: as on a CPU, and as on other devices."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(module, "in_numpy", lambda tensor: False)
        yield


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
    joined = flat.join(tensors, tensors[0])
    ends = flat.ends(joined)
    starts = [row * flat.width for row in flat.rows.starts]
    for tensor, start, low, high, places in zip(tensors, starts, *ends, strict=True):
        assert (low, high) == (tensor.min(), tensor.max())
        first = tensor.reshape(-1).tolist()
        wanted = [first.index(low.item()), first.index(high.item())]
        assert (places - start).tolist() == wanted


@given(SHAPES, GROUPS)
def test_groups_have_rows(shapes, group_size):
    """A group's number reaches its rows, and the sums of its rows are its sum."""
    tensors = _tensors(shapes)
    flat = _flat(tensors, group_size)
    numbers = torch.arange(1.0, flat.groups.total + 1)
    rows = flat.to_rows(numbers).expand(flat.rows.total)
    counts = flat.rows.counts if group_size is None else [1] * flat.rows.total
    assert same_bits(rows, torch.repeat_interleave(numbers, torch.tensor(counts)))
    sums = flat.group_sums(torch.ones(flat.rows.total))
    assert sums.tolist() == [float(count) for count in counts]


def test_pieces_are_all_rows_in_order():
    """The pieces of a large tensor are its rows, each with its numbers."""
    tensor = torch.arange(2**19).float()
    flat = _flat([tensor], 8)
    joined, numbers = flat.join([tensor], tensor), torch.arange(2**16).float()
    found = list(flat.pieces(joined, numbers, torch.ones(1)))
    assert same_bits(torch.cat([rows for rows, _, _ in found]), joined)
    assert same_bits(torch.cat([own for _, own, _ in found]), numbers)
    assert all(len(shared) == 1 for _, _, shared in found)
    # In the memory of what was joined.
    found[-1][0].zero_()
    assert not joined[-1].any()
