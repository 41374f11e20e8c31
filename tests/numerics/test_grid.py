"""The pure math of the grid: groups, ranges, steps, levels and values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffq.format.records import MAX_RANGE, GridRecord
from diffq.numerics import grid
from diffq.numerics.grid import BitsLaw
from tests.compare import same_bits

BITS = st.integers(1, 15)

#: Float32 weights without the extremes where a step has too few digits of its own.
PLAIN = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda x: 0.0 if abs(x) < 1e-25 else x)

#: Any finite float32 whose range still fits in float32, denormal numbers included.
ANY = st.floats(-(2.0**126), 2.0**126, width=32)


def _arrays(elements, **sides):
    return hnp.arrays(np.float32, hnp.array_shapes(max_dims=1, **sides), elements=elements)


def _quantize(weights, bits):
    """Levels and values of one group, as arrays, and the step."""
    groups = torch.from_numpy(weights).view(1, -1)
    low, high = grid.bounds(groups)
    width = torch.tensor([float(bits)])
    levels = grid.to_levels(groups, low, high, width)
    values = grid.from_levels(levels, low, high, width)
    return levels[0].numpy(), values[0].numpy(), grid.step_size(low, high, width).item()


@given(hnp.array_shapes(min_dims=0, max_dims=4, max_side=6), st.integers(1, 20))
def test_groups_come_back_as_the_tensor(shape, group_size):
    """from_groups undoes to_groups for every shape and group size, dividing or not."""
    tensor = torch.arange(float(math.prod(shape))).view(shape)
    groups = grid.to_groups(tensor, group_size)
    assert groups.shape == (math.ceil(tensor.numel() / group_size), group_size)
    assert same_bits(grid.from_groups(groups, tensor.shape), tensor)


@given(hnp.array_shapes(min_dims=0, max_dims=3, max_side=6), st.integers(1, 20))
def test_groups_hold_consecutive_weights(shape, group_size):
    """Weight i of the flattened tensor is in group i // group_size; the rest is zero padding."""
    numel = math.prod(shape)
    flat = grid.to_groups(torch.arange(1.0, numel + 1).view(shape), group_size).reshape(-1)
    assert flat[:numel].tolist() == list(range(1, numel + 1))
    assert not flat[numel:].any()


def test_groups_follow_the_logical_order():
    """Groups are cut in C order, whatever the memory layout: transposed or channels_last."""
    tensor = torch.arange(120.0).view(2, 3, 4, 5)
    wanted = grid.to_groups(tensor, 7)
    assert same_bits(grid.to_groups(tensor.to(memory_format=torch.channels_last), 7), wanted)
    square = torch.arange(12.0).view(3, 4)
    assert same_bits(grid.to_groups(square.t(), 5), grid.to_groups(square.t().contiguous(), 5))


@given(_arrays(ANY))
def test_bounds_are_minimum_and_maximum(weights):
    """bounds gives the smallest and the largest weight, each of shape [1]."""
    low, high = grid.bounds(torch.from_numpy(weights))
    assert (low.shape, high.shape) == ((1,), (1,))
    assert (low.item(), high.item()) == (weights.min(), weights.max())


def test_bounds_pass_nan_on():
    """A NaN anywhere in the tensor shows in both bounds, so that checking those is enough."""
    low, high = grid.bounds(torch.tensor([1.0, math.nan, 2.0]))
    assert math.isnan(low)
    assert math.isnan(high)


@given(_arrays(ANY), BITS)
@example(np.array([0, 1e-45], np.float32), 15)
# Four times the smallest number: the step is rounded down so far that it fits four times.
@example(np.array([0, 4 * 2.0**-149], np.float32), 2)
@example(np.array([-1e-38, 1e-38, 3e-42], np.float32), 15)
@example(np.array([-1e38, 1e38, 1e-38], np.float32), 15)
@example(np.array([1, 1 + 2**-23], np.float32), 15)
def test_levels_fit_their_bits(weights, bits):
    """Levels are whole numbers from 0 to 2**bits - 1, and values finite, for any finite weights."""
    levels, values, _ = _quantize(weights, bits)
    assert (levels == np.round(levels)).all()
    assert (levels >= 0).all()
    assert (levels <= 2**bits - 1).all()
    assert np.isfinite(values).all()


@given(_arrays(PLAIN, min_side=2, max_side=20), BITS)
def test_error_is_at_most_half_a_step(weights, bits):
    """No weight moves by more than half a step, up to the rounding of float32."""
    _, values, step = _quantize(weights, bits)
    slack = 4 * float(np.finfo(np.float32).eps) * float(np.abs(weights).max())
    error = np.abs(values.astype(np.float64) - weights.astype(np.float64))
    assert (error <= 0.5 * step + slack).all()


@given(_arrays(PLAIN, min_side=2, max_side=20), BITS)
def test_ends_of_the_range(weights, bits):
    """The minimum has level 0 and its own value, the maximum level 2**bits - 1 and nearly so."""
    assume(weights.min() < weights.max())
    levels, values, _ = _quantize(weights, bits)
    low, high = weights.argmin(), weights.argmax()
    assert levels[low] == 0
    assert values[low] == weights[low]
    assert levels[high] == 2**bits - 1
    slack = 4 * float(np.finfo(np.float32).eps) * float(np.abs(weights).max())
    assert abs(float(values[high]) - float(weights[high])) <= slack


@given(_arrays(PLAIN, min_side=2, max_side=20), BITS)
def test_quantizing_twice_changes_no_level(weights, bits):
    """Quantized values have the levels they came from, where float32 can tell them apart."""
    levels, values, step = _quantize(weights, bits)
    assume(step > 8 * float(np.finfo(np.float32).eps) * float(np.abs(weights).max()))
    low, high = grid.bounds(torch.from_numpy(weights))
    again = grid.to_levels(torch.from_numpy(values).view(1, -1), low, high, torch.tensor([bits]))
    assert (again[0].numpy() == levels).all()


@given(_arrays(ANY, max_side=12), BITS)
def test_each_operation_is_rounded_to_float32(weights, bits):
    """Levels and values are, bit for bit, what float32 scalars give one operation at a time."""
    levels, values, _ = _quantize(weights, bits)
    # The grid's own bounds: which zero is the minimum of 0.0 and -0.0 is not specified.
    low, high = (bound.numpy()[0] for bound in grid.bounds(torch.from_numpy(weights)))
    with np.errstate(under="ignore"):
        step = np.float32(np.float32(high - low) / np.float32(2**bits - 1))
        for weight, level, value in zip(weights, levels, values, strict=True):
            ratio = np.float32(np.float32(weight - low) / (step if step > 0 else np.float32(1)))
            # round() of a Python float is half to even, like the grid.
            assert level == min(round(float(ratio)), 2**bits - 1)
            wanted = np.float32(np.float32(level * step) + low)
            assert value.tobytes() == wanted.tobytes()


def test_halves_go_to_the_even_level():
    """A weight halfway between two levels gets the even one."""
    weights = np.array([0, 0.5, 1.5, 2.5, 3], np.float32)
    levels, values, step = _quantize(weights, 2)
    assert step == 1
    assert levels.tolist() == values.tolist() == [0, 0, 2, 2, 3]


@given(ANY, st.integers(1, 9), BITS)
def test_constant_tensors_keep_their_value(value, numel, bits):
    """Where all weights are equal, every level is 0 and every value is the weight itself."""
    levels, values, step = _quantize(np.full(numel, value, np.float32), bits)
    assert step == 0
    assert not levels.any()
    assert (values == np.float32(value)).all()


def test_every_group_has_its_own_grid():
    """Bitwidths and ranges of [groups] apply to their own group only."""
    groups = torch.tensor([[0.0, 0.4, 1.0], [0.0, 0.4, 1.0], [2.0, 2.8, 4.0]])
    low, high = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 4.0])
    bits = torch.tensor([1.0, 4.0, 2.0])
    levels = grid.to_levels(groups, low, high, bits)
    assert levels.tolist() == [[0, 0, 1], [0, 6, 15], [0, 1, 3]]
    values = grid.from_levels(levels, low, high, bits)
    wanted = [[0, 0, 1], [0, 6 / 15, 1], [2, 2 + 2 / 3, 4]]
    torch.testing.assert_close(values, torch.tensor(wanted))


def test_step_of_real_bitwidths():
    """The step is (high - low) / (2**b - 1), for bitwidths between whole numbers too."""
    bits = torch.tensor([1.0, 2.5, 8.0, 15.0])
    steps = grid.step_size(torch.tensor([-1.0]), torch.tensor([2.0]), bits)
    wanted = [3 / (2**b - 1) for b in (1.0, 2.5, 8.0, 15.0)]
    torch.testing.assert_close(steps, torch.tensor(wanted))


def test_gradients_of_the_step():
    """The step's gradients to range and bitwidths agree with finite differences."""
    low = torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)
    high = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    bits = torch.tensor([1.2, 3.0, 7.9, 14.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grid.step_size, (low, high, bits))


@given(st.integers(1, 14), st.integers(1, 14), st.floats(-30, 30))
def test_bits_are_equation_11(min_bits, more, logit):
    """b = b_min + sigmoid(l) * (b_max - b_min), and so never leaves that interval."""
    max_bits = min_bits + more
    bits = BitsLaw(min_bits, max_bits).bits(torch.tensor(logit, dtype=torch.float64)).item()
    assert bits == pytest.approx(min_bits + (max_bits - min_bits) / (1 + math.exp(-logit)))
    assert min_bits <= bits <= max_bits


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0, 1))
def test_logit_inverts_bits(min_bits, more, share):
    """`logit` finds the logit of a bitwidth, at the ends to 1% of the interval."""
    max_bits = min_bits + more
    wanted = min_bits + share * more
    law = BitsLaw(min_bits, max_bits)
    logit = law.logit(wanted)
    found = law.bits(torch.tensor(logit, dtype=torch.float64)).item()
    assert math.isfinite(logit)
    assert abs(found - wanted) <= 0.01 * more + 1e-9
    if 0.01 <= share <= 0.99:
        assert found == pytest.approx(wanted)


def test_gradient_of_equation_11():
    """The gradient of the bitwidth to its logit agrees with finite differences."""
    logits = torch.linspace(-4, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BitsLaw(2, 15).bits, (logits,))


@pytest.mark.parametrize("whole", [False, True])
def test_slopes_are_the_gradients(whole):
    """`log_step_slope` is what autograd finds for log(step)."""
    law = BitsLaw(2, 15, whole)
    logits = torch.linspace(-4, 4, 7, dtype=torch.float64, requires_grad=True)
    step = grid.step_size(torch.tensor([-1.0]), torch.tensor([2.0]), law.bits(logits))
    (slope,) = torch.autograd.grad(step.log().sum(), logits)
    torch.testing.assert_close(law.log_step_slope(logits), slope)


# Zero points


def _with_zero(weights, bits, zero_point=True):
    """Levels, values and step of weights and a zero, the last of them."""
    groups = torch.from_numpy(np.append(weights, np.float32(0))).view(1, -1)
    low, high = grid.bounds(groups)
    rule = low, high, torch.tensor([float(bits)]), torch.tensor(zero_point)
    levels = grid.to_levels(groups, *rule)
    return levels[0], grid.from_levels(levels, *rule)[0], grid.step_size(*rule[:3]).item()


@given(_arrays(ANY), BITS)
@example(np.array([-1e-45, 3e-45], np.float32), 15)
@example(np.array([-22 * 2.0**-149], np.float32), 4)
@example(np.array([-(2.0**126), 2.0**126], np.float32), 15)
@example(np.array([-1e38, 1e-38], np.float32), 1)
@example(np.array([-0.0, 1], np.float32), 3)
def test_zero_stays_zero(weights, bits):
    """With a zero point, 0.0 comes back as 0.0, and all levels fit, for any finite weights."""
    levels, values, _ = _with_zero(weights, bits)
    assert values[-1].item() == 0
    assert math.copysign(1, values[-1].item()) == 1
    assert ((levels >= 0) & (levels <= 2**bits - 1) & (levels == levels.round())).all()
    assert values.isfinite().all()


@given(_arrays(PLAIN, min_side=2, max_side=20), BITS)
def test_error_with_zero_point_is_at_most_half_a_step(weights, bits):
    """A level at zero moves no weight by more than half a step, ends of the range included."""
    _, values, step = _with_zero(weights, bits)
    eps = 4 * float(np.finfo(np.float32).eps)
    slack = eps * float(np.abs(weights).max()) + eps * 2**bits * step
    error = np.abs(values[:-1].double().numpy() - weights.astype(np.float64))
    assert (error <= 0.5 * step + slack).all()


@given(_arrays(ANY), BITS, st.integers(1, 15))
def test_records_decode_zero_points(weights, bits, others):
    """NumPy decodes what torch computes, bit for bit, at several bitwidths and with two ranges."""
    groups = torch.from_numpy(np.stack([np.append(weights, np.float32(0)), np.append(0, weights)]))
    groups = groups.float()
    low, high = groups.amin(1), groups.amax(1)
    widths = torch.tensor([bits, others])
    rule = low, high, widths.float(), torch.tensor(True)
    levels = grid.to_levels(groups, *rule)
    assume((low < high).any())
    record = GridRecord(
        tuple(groups.shape),
        "float32",
        groups.shape[1],
        1,
        widths.numpy().astype(np.uint8),
        levels.reshape(-1).numpy().astype(np.uint16),
        torch.stack([low, high], 1).numpy(),
        zero_point=True,
    )
    assert record.values().tobytes() == grid.from_levels(levels, *rule).numpy().tobytes()


@given(_arrays(ANY), BITS)
def test_zero_points_that_are_not_wanted(weights, bits):
    """Where the zero point turns out not to be wanted, the grid is the plain one to the bit."""
    weights = np.append(weights, np.float32(0))
    levels, values, _ = _with_zero(weights[:-1], bits, zero_point=False)
    plain_levels, plain_values, _ = _quantize(weights, bits)
    assert np.array_equal(levels.numpy(), plain_levels)
    assert np.array_equal(values.numpy(), plain_values)


@given(st.floats(2.0**-20, 2.0**20, width=32), st.floats(2.0**-20, 2.0**20, width=32), BITS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_ranges_without_zero_are_plain(sign, near, far, bits):
    """Where zero is outside of the range, a zero point changes nothing."""
    weights = np.sort(sign * np.float32([near, near + far]))
    groups = torch.from_numpy(weights).view(1, -1)
    rule = *grid.bounds(groups), torch.tensor([float(bits)]), torch.tensor(True)
    levels = grid.to_levels(groups, *rule)
    plain_levels, plain_values, _ = _quantize(weights, bits)
    assert np.array_equal(levels[0].numpy(), plain_levels)
    assert np.array_equal(grid.from_levels(levels, *rule)[0].numpy(), plain_values)


HALVES = st.sampled_from([torch.float16, torch.bfloat16])


def _edges(dtype):
    """Weights of a half type, most of them near its ends."""
    largest = torch.finfo(dtype).max
    shares = st.floats(-1, 1) | st.floats(0.9, 1) | st.floats(-1, -0.9) | st.just(0.0)
    numbers = st.lists(shares, min_size=2, max_size=9)
    return numbers.map(lambda n: (torch.tensor(n) * largest).clamp(-largest, largest).to(dtype))


@given(HALVES.flatmap(_edges), BITS, st.booleans())
@example(torch.tensor([-65504, 0, 60000, 1], dtype=torch.float16), 2, True)
@example(torch.tensor([-65504, 65504, 3], dtype=torch.float16), 15, False)
@example(torch.tensor([3.3895e38, -1e36, 0], dtype=torch.bfloat16), 1, True)
@example(torch.tensor([65504, -65504], dtype=torch.float16), 12, True)
def test_values_are_finite_in_half_types(weight, bits, zeros):
    """Each weight gets its nearest level of those whose values are finite in its dtype."""
    groups = weight.float().view(1, -1)
    low, high = grid.bounds(groups)
    assume((high - low).item() <= MAX_RANGE)
    rule = low, high, torch.tensor([float(bits)]), torch.tensor(zeros)
    levels = grid.to_levels(groups, *rule, dtype=weight.dtype)
    values = grid.from_levels(levels, *rule)
    assert torch.isfinite(values.to(weight.dtype)).all()
    free = grid.to_levels(groups, *rule)
    stays = torch.isfinite(grid.from_levels(free, *rule).to(weight.dtype))
    assert same_bits(levels[stays], free[stays])
    assert ((levels - free).abs() == ~stays).all()
    if not zeros:
        assert stays.all()
        plain = grid.to_levels(groups, *rule[:3], dtype=weight.dtype)
        assert same_bits(plain.int(), free.int())


@given(HALVES, st.floats(2, 2.0**127, width=32))
@example(torch.float16, 65519.0)
@example(torch.float16, 65520.0)
@example(torch.bfloat16, 3.39e38)
def test_finite_levels_are_the_last_ones(dtype, step):
    """The next multiple of a step after the last finite one is not finite."""
    steps = torch.tensor([step])
    lowest, highest = grid.finite_levels(steps, torch.zeros(1), dtype)
    assert lowest == -highest
    assert torch.isfinite((highest * steps).to(dtype)).all()
    beyond = (highest + 1) * steps
    assert torch.isinf(beyond.to(dtype)).all() or highest + 1 == highest
