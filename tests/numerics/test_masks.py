"""Random blocks of weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffq.numerics.masks import block_mask
from tests.compare import same_bits


@given(hnp.array_shapes(min_dims=0, max_dims=4, max_side=5), st.integers(1, 30), st.floats(0, 1))
def test_blocks_are_picked_whole(shape, block_size, rate):
    """All weights of a block of the flattened tensor are picked, or none."""
    mask = block_mask(torch.zeros(shape), rate, block_size)
    assert (mask.shape, mask.dtype) == (torch.Size(shape), torch.bool)
    for block in mask.reshape(-1).split(block_size):
        assert block.all() or not block.any()


@pytest.mark.parametrize("rate", [0, 0.0, 1, 1.0])
def test_extreme_rates_draw_nothing(rate):
    """At rate 0 and 1 the mask is known, and the random state stays as it was."""
    before = torch.get_rng_state()
    mask = block_mask(torch.zeros(7, 9), rate, 4)
    assert same_bits(torch.get_rng_state(), before)
    assert mask.all().item() == mask.any().item() == bool(rate)


@pytest.mark.parametrize("block_size", [1, 8])
def test_rate_is_the_share_of_blocks(block_size):
    """Blocks are picked independently with the rate as probability."""
    blocks = block_mask(torch.zeros(20_000 * block_size), 0.3, block_size)[::block_size]
    # Four standard deviations of the mean of 20,000 draws.
    assert abs(blocks.double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    pairs = blocks.view(-1, 2)
    assert abs(pairs.all(1).double().mean() - 0.09) < 4 * math.sqrt(0.09 * 0.91 / 10_000)


def test_kernels_and_rows():
    """With a kernel's size whole kernels are picked; a block size that divides stays in a row."""
    kernels = block_mask(torch.zeros(8, 8, 3, 3), 0.5, 9).flatten(2)
    assert same_bits(kernels.all(2), kernels.any(2))
    rows = block_mask(torch.zeros(16, 32), 0.5, 8).view(16, 4, 8)
    assert same_bits(rows.all(2), rows.any(2))
