"""Kernels of LSQ: values and gradients are those of the quantizer's own operations."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.compare import same_bits
from tests.kernels import backend

DEVICE = backend.device()

from diffq.format.records import MAX_RANGE  # noqa: E402
from diffq.kernels.scaled import Scaled  # noqa: E402
from diffq.numerics.flat import Flat  # noqa: E402
from diffq.numerics.scaled import Levels, pass_scale, positive, scale_all  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Batch:
    """Random tensors with their kernels."""

    def __init__(self, numels, bits, dtype, strength=1.0):
        self.weights = [torch.randn(n, device=DEVICE).mul_(strength).to(dtype) for n in numels]
        self.levels = [Levels(-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in bits]
        each = zip(self.weights, self.levels, strict=True)
        starts = [2 * w.double().abs().mean() / math.sqrt(levels.highest) for w, levels in each]
        most = [MAX_RANGE / -levels.lowest for levels in self.levels]
        starts = [start.clamp(max=limit) for start, limit in zip(starts, most, strict=False)]
        self.scales = torch.stack(starts).float()
        self.scales[::2].neg_()  # the sign does not count
        self.scaled = Scaled([(n,) for n in numels], self.levels, dtype, DEVICE)

    def values(self):
        """What training computes with, by torch's operations; without graph."""
        return self._values(self.weights)

    def gradients(self, grads):
        """Those of weights and scales, by torch's operations."""
        weights = [w.clone().requires_grad_() for w in self.weights]
        scales = self.scales.clone().requires_grad_()
        parts = zip(weights, self._values(weights), self.levels, scales.split(1), strict=True)
        values = [
            pass_scale(Flat([w.shape], None), levels, s, [w], [value])[0]
            for w, value, levels, s in parts
        ]
        used = [(v, g) for v, g in zip(values, grads, strict=True) if g is not None]
        torch.autograd.backward(*zip(*used, strict=True))
        return [w.grad for w in weights], scales.grad

    @torch.no_grad()
    def _values(self, weights):
        parts = zip(weights, self.scales.split(1), self.levels, strict=True)
        every = ((Flat([w.shape], None), [w], positive(s), levels) for w, s, levels in parts)
        return [each[0].split(scale_all(*each))[0] for each in every]


@settings(max_examples=8, phases=[Phase.generate])
@given(
    numels=st.lists(st.integers(1, 500), min_size=2, max_size=3),
    bits=st.lists(st.integers(2, 15), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
    strength=st.sampled_from([1.0, 3e4, 3e38]),
    aligned=st.booleans(),
)
def test_values_and_gradients(numels, bits, dtype, strength, aligned):
    """Values bit for bit, gradients up to the rounding of sums."""
    numels = [n // 16 * 16 + 16 for n in numels] if aligned else numels
    batch = Batch(numels, bits[: len(numels)], dtype, min(strength, torch.finfo(dtype).max / 16))
    values = batch.scaled.sample(batch.weights, batch.scales)
    for value, expected in zip(values, batch.values(), strict=True):
        assert same_bits(value, expected.to(dtype))
    grads = [torch.randn(n, device=DEVICE).to(dtype) for n in numels]
    weights, scales = batch.gradients(grads)
    found, for_scales = batch.scaled.gradients(batch.weights, batch.scales, grads)
    assert same_bits(found, weights)
    # Where terms cancel, what is left is as wrong as they were.
    torch.testing.assert_close(for_scales, scales, rtol=1e-3, atol=1e-3)


def test_sums_of_large_tensors():
    """Sums over many programs; values that were not used."""
    batch = Batch([20000, 40], [3, 4], torch.float32)
    grads = [torch.ones(20000, device=DEVICE), None]
    weights, scales = batch.gradients(grads)
    found, for_scales = batch.scaled.gradients(batch.weights, batch.scales, grads)
    assert same_bits(found[0], weights[0])
    assert found[1] is None
    torch.testing.assert_close(for_scales, scales, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-39, -1e-39])
def test_vanishing_scale(scale):
    """A scale below the least positive one counts as that, and gets no gradient."""
    batch = Batch([16, 16], [4, 4], torch.float32)
    batch.scales[0] = scale
    values = batch.scaled.sample(batch.weights, batch.scales)
    assert same_bits(values, batch.values())
    grads = [torch.randn(16, device=DEVICE) for _ in range(2)]
    found, for_scales = batch.scaled.gradients(batch.weights, batch.scales, grads)
    weights, scales = batch.gradients(grads)
    assert same_bits(found, weights)
    torch.testing.assert_close(for_scales, scales)


def test_nan():
    """NaN weights give NaN values, alone."""
    batch = Batch([16, 16], [4, 4], torch.float32)
    batch.weights[0][3] = torch.nan
    values = batch.scaled.sample(batch.weights, batch.scales)
    assert values[0].isnan().nonzero().flatten().tolist() == [3]
    assert values[1].isfinite().all()
