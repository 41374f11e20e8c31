"""Ranges of a grid: least squared error, histograms, and a level that is zero."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffq import errors
from diffq.numerics import grid
from diffq.numerics import ranges as observers
from diffq.numerics.ranges import BINS, Histogram
from tests.compare import same_bits

BITS = st.integers(1, 15)

#: Any finite float32 whose range still fits in float32, denormal numbers included.
ANY = st.floats(-(2.0**126), 2.0**126, width=32)


def _arrays(elements=ANY, **sides):
    return hnp.arrays(np.float32, hnp.array_shapes(max_dims=1, **sides), elements=elements)


def _error(weight, low, high, bits):
    """Squared error of a grid, in float64."""
    groups, width = weight.view(1, -1), torch.tensor([float(bits)])
    values = grid.from_levels(grid.to_levels(groups, low, high, width), low, high, width)
    return (values.double() - groups.double()).square().sum().item()


@given(_arrays(), BITS)
@example(np.array([0, 1e-45], np.float32), 15)
@example(np.array([3, 3], np.float32), 4)
def test_fitted_range_is_never_worse(weights, bits):
    """The fitted range lies in the full one, and its squared error is never larger."""
    weight = torch.from_numpy(weights)
    full = grid.bounds(weight)
    low, high = observers.fit_range(weight, bits)
    assert full[0] <= low <= high <= full[1]
    assert _error(weight, low, high, bits) <= _error(weight, *full, bits)


@given(_arrays(min_side=2), BITS)
def test_fitted_range_of_a_tensor_keeps_its_levels(weights, bits):
    """Only a constant tensor gets a range without width, which would store no levels."""
    weight = torch.from_numpy(weights)
    low, high = observers.fit_range(weight, bits)
    assert (low == high).item() == (weight == weight[0]).all().item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["normal", "one-sided", "outlier"])
def test_search_finds_what_brute_force_finds(name, bits):
    """The search comes within 5% of the best of 10,000 ranges on the same histogram."""
    normal = torch.randn(4000)
    weight = {
        "normal": normal,
        "one-sided": normal.relu().square(),
        "outlier": torch.cat([normal, torch.tensor([20.0])]),
    }[name]
    histogram = Histogram.of(weight)
    span = histogram.high - histogram.low
    centers = (histogram.centers() - histogram.low) / span
    places = torch.linspace(0, 0.99, 100)
    errors = [
        observers._errors(centers, histogram.counts, pairs, bits)
        for pairs in torch.cartesian_prod(places, places).split(1000)
    ]
    low, high = observers.least_error_range(histogram, bits)
    cuts = torch.stack([low - histogram.low, histogram.high - high], dim=1) / span
    found = observers._errors(centers, histogram.counts, cuts, bits)
    assert found <= 1.05 * torch.cat(errors).min()


def test_fitted_range_cuts_outliers():
    """With one outlier among many weights, four bits are spent on the many."""
    weight = torch.cat([torch.randn(10_000), torch.tensor([30.0])])
    low, high = observers.fit_range(weight, 4)
    assert high < 6
    assert _error(weight, low, high, 4) < 0.25 * _error(weight, *grid.bounds(weight), 4)


@given(_arrays(), BITS)
def test_search_through_zero(weights, bits):
    """For a grid with a zero point, the range holds zero wherever the full one does."""
    weight = torch.cat([torch.from_numpy(weights), torch.zeros(1)])
    low, high = observers.fit_range(weight, bits, zero_point=torch.tensor(True))
    assert low <= 0 <= high


@pytest.mark.parametrize("sign", [-1, 1])
@given(
    _arrays(st.floats(2.0**-20, 1, width=32), min_side=8),
    st.floats(2.0**-40, 2.0**-3, width=32),
    BITS,
    st.integers(-60, 60),
)
def test_search_that_cuts_at_zero(sign, weights, beyond, bits, exponent):
    """Zero stays a level where the search cuts off a small share on one side of it."""
    parts = torch.from_numpy(weights), -torch.tensor([beyond]), torch.zeros(4)
    weight = sign * torch.cat(parts) * 2.0**exponent
    wanted, full = torch.tensor(True), grid.bounds(weight)
    for low, high in (
        observers.fit_range(weight, bits, wanted),
        observers.least_error_range(Histogram.of(weight), bits, wanted),
    ):
        assert full[0] <= low <= 0 <= high <= full[1]
        rule = low, high, torch.tensor([float(bits)]), wanted
        values = grid.from_levels(grid.to_levels(weight[None], *rule), *rule)
        assert (values[0, -4:] == 0).all()


@given(_arrays(st.floats(2.0**-20, 1, width=32), min_side=2), BITS, st.booleans())
def test_search_without_zero_in_range(weights, bits, below):
    """A range that does not hold zero stays within the full one, its end near zero uncut."""
    weight = torch.from_numpy(-weights if below else weights)
    full = grid.bounds(weight)
    low, high = observers.least_error_range(Histogram.of(weight), bits, torch.tensor(True))
    assert full[0] <= low <= high <= full[1]
    assert high == full[1] if below else low == full[0]


@given(st.lists(_arrays(), min_size=1, max_size=4))
def test_histograms_merge_without_losing_values(parts):
    """A merged histogram counts every value, over the range of all."""
    merged = Histogram.of(torch.from_numpy(parts[0]))
    for part in parts[1:]:
        merged = merged.merge(Histogram.of(torch.from_numpy(part)))
    everything = np.concatenate(parts)
    assert merged.counts.sum() == everything.size
    assert (merged.low.item(), merged.high.item()) == (everything.min(), everything.max())


def test_merged_histogram_is_near_the_whole_one():
    """Values move by at most one bin in a merge: the cumulated counts stay within a bin."""
    parts = torch.randn(2, 5000) * torch.tensor([[1.0], [3.0]])
    whole = Histogram.of(parts).counts.cumsum(0)
    merged = Histogram.of(parts[0]).merge(Histogram.of(parts[1])).counts.cumsum(0)
    assert (merged[:-1] <= whole[1:]).all()
    assert (merged[1:] >= whole[:-1]).all()
    assert len(merged) == BINS


@given(ANY.map(abs), ANY.map(abs), BITS)
@example(0.0, 0.0, 4)
@example(2.0**126, 2.0**126, 1)
@example(1e-44, 3e-44, 15)
def test_kept_zero_is_a_level(below, above, bits):
    """After keep_zero, 0.0 decodes to 0.0 exactly, and every level to a multiple of the step."""
    low, high = torch.tensor([-below]), torch.tensor([above])
    width = torch.tensor([float(bits)])
    low, high = observers.keep_zero(low, high, width)
    levels = grid.to_levels(torch.zeros(1, 1), low, high, width)
    assert grid.from_levels(levels, low, high, width).item() == 0.0
    step = grid.step_size(low, high, width).double()
    every = torch.arange(2.0**bits)[None]
    values = grid.from_levels(every, low, high, width)
    assert same_bits(values.double(), every.double() * step + low.double())


@given(st.floats(2.0**-100, 2.0**100, width=32), st.floats(0, 1), BITS)
def test_kept_zero_moves_the_range_by_half_a_step(span, share, bits):
    """keep_zero moves an end by at most half a step, and one in 2**(23 - bits) of the range."""
    low, high = torch.tensor([-span * share]), torch.tensor([span * (1 - share)])
    moved = observers.keep_zero(low, high, torch.tensor([float(bits)]))
    step = (moved[1] - moved[0]).item() / (2**bits - 1)
    most = 0.5 * step + span * 2.0 ** (bits - 23)
    assert abs(moved[0] - low).item() <= most
    assert abs(moved[1] - high).item() <= most


def test_observers_by_name():
    """An unknown observer is refused with the names of the known ones."""
    with pytest.raises(errors.ConfigError, match=r"min-max, histogram, channel, got 'mean'"):
        observers.check_observer("mean")
