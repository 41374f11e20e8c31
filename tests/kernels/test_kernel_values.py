"""Values of rounding kernels: those of the grid's functions, bit for bit."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.compare import same_bits
from tests.kernels import backend

DEVICE = backend.device()

from diffq.kernels.noisy import Noisy  # noqa: E402
from diffq.kernels.rounded import Rounded  # noqa: E402
from diffq.numerics import grid  # noqa: E402
from diffq.numerics.grid import BitsLaw  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(weight, group_size, bits, zeros):
    """The values of one tensor by torch's operations."""
    size = min(group_size or weight.numel(), weight.numel())
    low, high = grid.bounds(weight.float())
    point = (weight == 0).any() if zeros else None
    rule = low, high, bits, point
    levels = grid.to_levels(grid.to_groups(weight.float(), size), *rule, weight.dtype)
    return grid.from_groups(grid.from_levels(levels, *rule), weight.shape).to(weight.dtype)


def groups_of(numels, group_size):
    """The groups of each tensor."""
    return [-(-n // min(group_size or n, n)) for n in numels]


def make(numels, dtype, strength=1.0):
    """Random weights, every third of which has zeros."""
    weights = [torch.randn(n).mul_(strength).to(dtype).to(DEVICE) for n in numels]
    for weight in weights[::3]:
        weight[: len(weight) // 3] = 0
    return weights


# Not shrunk: each program that is interpreted takes a fifth of a second.
@settings(max_examples=10, phases=[Phase.generate])
@given(
    numels=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    group_size=st.sampled_from([None, 1, 3, 8, 12, 64, 1000]),
    dtype=st.sampled_from(DTYPES),
    strength=st.sampled_from([1.0, 1e-39, 3e38, 3e4]),
    zeros=st.booleans(),
    whole=st.booleans(),
)
def test_rounding(numels, group_size, dtype, strength, zeros, whole):
    """Values are the grid's, bit for bit: any sizes, dtypes, magnitudes, zeros that stay."""
    # The interpreter has no subnormal bfloat16.
    least = 1e-30 if dtype == torch.bfloat16 and backend.INTERPRETED else 0
    strength = min(max(strength, least), torch.finfo(dtype).max / 16)
    weights = make([n // 16 * 16 + 16 for n in numels] if whole else numels, dtype, strength)
    numels = [weight.numel() for weight in weights]
    counts = groups_of(numels, group_size)
    bits = torch.randint(1, 16, (sum(counts),), dtype=torch.float32, device=DEVICE)
    rounded = Rounded([w.shape for w in weights], group_size, dtype, DEVICE)
    values = rounded.sample(weights, bits, zeros=[zeros] * len(weights))
    for weight, value, part in zip(weights, values, bits.split(counts), strict=True):
        assert same_bits(value, expected(weight, group_size, part, zeros))


def test_large_tensor():
    """Tensors of many pieces and programs, beside one of a single weight."""
    weights = make([20011, 1, 9000], torch.float32)
    bits = torch.full((3,), 4.0, device=DEVICE)
    values = Rounded([w.shape for w in weights], None, torch.float32, DEVICE).sample(weights, bits)
    for weight, value in zip(weights, values, strict=True):
        assert same_bits(value, expected(weight, None, bits[:1], False))


def test_shapes_and_places():
    """Values have the weights' shapes, and each begins where a matrix product is fast."""
    shapes = [(3, 5), (), (2, 3, 7)]
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    bits = torch.full((3,), 15.0, device=DEVICE)
    values = Rounded(shapes, None, torch.float32, DEVICE).sample(weights, bits)
    assert [tuple(value.shape) for value in values] == shapes
    assert all(value.data_ptr() % 16 == 0 for value in values)
    for weight, value in zip(weights, values, strict=True):
        torch.testing.assert_close(value, weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_constants(dtype):
    """One NaN makes a tensor NaN, as in torch; a constant tensor stays; others are unharmed."""
    weights = make([40, 50, 60], dtype)
    weights[0][7] = torch.nan
    weights[1].fill_(0.3)
    bits = torch.full((3,), 3.0, device=DEVICE)
    values = Rounded([w.shape for w in weights], None, dtype, DEVICE).sample(weights, bits)
    assert values[0].isnan().all()
    assert same_bits(values[1], weights[1])
    assert same_bits(values[2], expected(weights[2], None, bits[:1], False))


def test_default_device():
    """Tables are made on the CPU, whatever the default device is."""
    weight, bits = torch.randn(20, device=DEVICE), torch.full((1,), 4.0, device=DEVICE)
    with torch.device("meta"):
        value = Rounded([(20,)], None, torch.float32, DEVICE).sample([weight], bits)[0]
    assert same_bits(value, expected(weight, None, bits, False))


def test_new_addresses():
    """Weights that moved, or became unaligned, are read where they are."""
    rounded = Rounded([(64,)], None, torch.float32, DEVICE)
    bits = torch.full((1,), 5.0, device=DEVICE)
    for weight in (torch.randn(64), torch.randn(65)[1:], torch.randn(64)):
        weight = torch.randn(65, device=DEVICE)[1:] if weight.data_ptr() % 16 else weight.to(DEVICE)
        assert same_bits(rounded.sample([weight], bits)[0], expected(weight, None, bits, False))


def test_blocks():
    """Quant-Noise quantizes blocks whole, at their rate, others each time; the rest stays."""
    weight = torch.randn(5000, device=DEVICE)
    rounded = Rounded([(5000,)], None, torch.float32, DEVICE, rate=0.3, block_size=7)
    bits = torch.full((1,), 4.0, device=DEVICE)
    quantized = expected(weight, None, bits, False)
    torch.manual_seed(0)
    first, second = (rounded.sample([weight], bits)[0] for _ in range(2))
    for value in (first, second):
        chosen = value == quantized
        assert same_bits(value, torch.where(chosen, quantized, weight))
        # Where a weight is a level, nothing is seen.
        seen = torch.where(weight == quantized, torch.nan, chosen.float())
        blocks = torch.nn.functional.pad(seen, (0, -5000 % 7), value=torch.nan)
        means = blocks.view(-1, 7).nanmean(1)
        assert ((means == 0) | (means == 1)).all()
        assert abs(means.mean().item() - 0.3) < 0.08  # some four deviations
    assert not same_bits(first, second)


@pytest.mark.parametrize("group_size", [8, None])
def test_bits_of_logits(group_size):
    """Rounding at learned bitwidths rounds those of the law."""
    law = BitsLaw(2, 15, whole=True)
    weights = make([100, 64], torch.float32)
    counts = groups_of([100, 64], group_size)
    logits = torch.randn(sum(counts), device=DEVICE)
    bits = law.bits(logits)
    shapes = [w.shape for w in weights]
    noisy = Noisy(shapes, group_size, law, "rounding", 0.5, torch.float32, DEVICE)
    values = noisy.sample(weights, logits).values
    for weight, value, part in zip(weights, values, bits.split(counts), strict=True):
        assert same_bits(value, expected(weight, group_size, part, False))
