"""The nearest values on the grids of many tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffq.numerics import grid
from diffq.numerics import rounding as module
from diffq.numerics.flat import Flat
from diffq.numerics.rounding import round_all
from tests.compare import same_bits
from tests.numerics.ways import both_ways

way = both_ways(module)


def _one(weight, group_size, bits, zero):
    """The values of one tensor."""
    low, high = grid.bounds(weight)
    rule = low, high, bits, torch.tensor(zero)
    levels = grid.to_levels(grid.to_groups(weight, group_size), *rule)
    return grid.from_groups(grid.from_levels(levels, *rule), weight.shape)


@given(
    numels=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    group_size=st.sampled_from([None, 1, 3, 8, 64, 100]),
    scale=st.sampled_from([1.0, 1e-38, 1e-42, 1e37]),
    zeros=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_single_tensors(numels, group_size, scale, zeros, seed):
    """Each tensor is on its own grid, bit for bit, with a zero point where one is asked for."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(numel, generator=generator) * scale for numel in numels]
    weights[0][::2] = 0
    weights[-1][:] = weights[-1][0]
    flat = Flat([weight.shape for weight in weights], group_size)
    bits = torch.randint(1, 16, (flat.groups.total,), generator=generator).float()
    points = torch.tensor(zeros[: len(weights)])
    values = flat.split(round_all(flat, weights, bits, points if points.any() else None).values)
    each = zip(weights, values, bits.split(list(flat.groups.counts)), zeros, strict=False)
    for weight, value, widths, zero in each:
        assert same_bits(value, _one(weight, group_size or len(weight), widths, zero))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_other_tensors_of_one_that_is_not_finite(number):
    """NaN and Inf stay within their tensor, and warn of nothing."""
    weights = [torch.randn(40), torch.randn(40)]
    expected = _one(weights[1], 8, torch.full((5,), 3.0), False)
    weights[0][7] = number
    flat = Flat([weight.shape for weight in weights], 8)
    values = flat.split(round_all(flat, weights, torch.full((10,), 3.0), None).values)
    assert not values[0].isfinite().all()
    assert same_bits(values[1], expected)
