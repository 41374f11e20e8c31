"""Unit noise: its distributions, and what its numbers depend on."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffq.numerics import draws
from tests.compare import same_bits

KINDS = ["gaussian", "uniform"]
FEW, MANY = 2**14, 2**20 + 7


def _drawn(kind, *counts, dtype=torch.float32):
    samples = [torch.empty(count, dtype=dtype) for count in counts]
    fill = draws.source(kind, sum(counts), samples[0], dtype)
    for sample in samples:
        fill(sample)
    return samples


def _probability(kind, numbers):
    """The distribution function."""
    numbers = numbers.double()
    return torch.special.ndtr(numbers) if kind == "gaussian" else (numbers + 1) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_distribution(kind, count, dtype):
    """The numbers follow their distribution: Kolmogorov's distance is that of true samples."""
    torch.manual_seed(1)
    (sample,) = _drawn(kind, count, dtype=dtype)
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    distance = (_probability(kind, sample).sort().values - ranks).abs().max()
    # Exceeded once in 1,500 times by true samples.
    assert distance < 2 / math.sqrt(count)


@pytest.mark.parametrize("kind", KINDS)
def test_many_numbers_are_quantiles(kind):
    """Each of many numbers is one of 65,536 quantiles, all of which come, of equal weight."""
    (sample,) = _drawn(kind, 2**21, dtype=torch.float64)
    places = _probability(kind, sample) * 2**16 - 0.5
    codes = places.round()
    assert (places - codes).abs().max() < 1e-6
    counts = torch.bincount(codes.long(), minlength=2**16)
    assert len(counts) == 2**16
    # 32 of each are expected; the sum of squares is that of chance, within 5 deviations.
    chi_squared = ((counts - 32.0) ** 2 / 32).sum()
    assert abs(chi_squared - 2**16) < 5 * math.sqrt(2 * 2**16)


def test_moments():
    """Quantized as they are, the Gaussian's numbers have variance 1 and kurtosis 3."""
    quantiles = draws._quantiles("gaussian", torch.float64)
    assert abs(quantiles.mean()) < 1e-12
    assert abs(quantiles.square().mean() - 1) < 1e-4
    assert abs((quantiles**4).mean() - 3) < 3e-3
    assert 4.3 < quantiles.max() < 4.4


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_depend_on_the_seed_alone(kind):
    """The same seed gives the same numbers, also with other threads; another seed others."""
    samples = []
    threads = torch.get_num_threads()
    try:
        for count, seed in ((1, 5), (3, 5), (1, 6)):
            torch.set_num_threads(count)
            torch.manual_seed(seed)
            samples.append(_drawn(kind, MANY)[0])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(*samples[:2])
    assert _correlation(*samples[1:]) < 0.01


def _correlation(first, second):
    return abs(torch.corrcoef(torch.stack([first, second]))[0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_independent(kind):
    """Draws in a row, samples of one draw and neighbours in one are not correlated."""
    one, other = _drawn(kind, MANY, MANY)
    (later,) = _drawn(kind, MANY)
    for first, second in ((one, other), (one, later), (one[:-1], one[1:]), (one[:-4], one[4:])):
        assert _correlation(first, second) < 0.005


def test_default_device_and_inference_mode():
    """The table of quantiles is an ordinary one on the CPU, wherever the first draw happens."""
    draws._quantiles.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        sample = torch.empty(MANY, device="cpu")
        draws.source("gaussian", MANY, sample, sample.dtype)(sample)
    (sample,) = _drawn("gaussian", MANY)
    assert sample.std() > 0.9
    assert not draws._quantiles("gaussian", torch.float32).is_inference()


def test_tensors_without_numbers():
    """Tensors that only stand for others are left to torch, however large."""
    draws._quantiles.cache_clear()
    with FakeTensorMode():
        fake = torch.empty(MANY)
        draws.source("gaussian", MANY, fake, fake.dtype)(fake)
    meta = torch.empty(MANY, device="meta")
    draws.source("uniform", MANY, meta, meta.dtype)(meta)
    assert draws._quantiles.cache_info().currsize == 0
