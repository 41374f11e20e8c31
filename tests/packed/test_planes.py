"""Integers in bit planes: every bitwidth, whole and at some places."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffq.format.bitpack import packed_size
from diffq.packed import planes


@given(st.integers(1, 16), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_values_come_back(bits, count, seed):
    """Values of 1 to 16 bits come back from as few bytes as in a file, all or some of them."""
    values = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint16)
    packed = torch.from_numpy(planes.pack(values, bits))
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(count, bits)
    assert planes.unpack(packed, count, bits).tolist() == values.tolist()
    places = torch.randint(count, (2, 5))
    assert planes.unpack_at(packed, count, bits, places).tolist() == values[places].tolist()


@pytest.mark.parametrize("bits", range(1, 17))
def test_largest_values(bits):
    """The largest value of each bitwidth comes back beside zeros."""
    values = np.array([0, (1 << bits) - 1] * 9, np.uint16)
    packed = torch.from_numpy(planes.pack(values, bits))
    assert planes.unpack(packed, len(values), bits).tolist() == values.tolist()
