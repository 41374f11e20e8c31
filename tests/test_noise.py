"""Pseudo quantization noise: its distributions, and the gradients that pass through it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import diffq
from diffq import grid, noise
from tests.holder import Holder, bits_of, set_bits, weight_quantizers

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _samples(layer, original, count):
    """What several reads of a training weight add to the stored one: [count, weights]."""
    with torch.no_grad():
        return torch.stack([(layer.weight - original).reshape(-1) for _ in range(count)])


def _noisy_layer(bits, **options):
    """A layer of fixed bitwidth in training mode, its stored weight, and the grid's step."""
    layer = nn.Linear(40, 25, bias=False)
    quantizer = diffq.DiffQuantizer(layer, min_size=0, bits=bits, **options)
    quantizer.no_optimizer()
    original = layer.parametrizations.weight.original.detach()
    step = float(original.max() - original.min()) / (2**bits - 1)
    return layer, original, step


def test_gaussian_noise_is_half_a_step():
    """The training weight is the stored one plus noise of mean 0 and deviation step / 2."""
    layer, original, step = _noisy_layer(4)
    added = _samples(layer, original, 100) / step
    # 100,000 samples: the mean is known to 0.0016, the deviation to 0.0011.
    assert abs(added.mean()) < 0.01
    assert abs(added.std() - 0.5) < 0.01
    # The share of a normal distribution beyond two deviations, and beyond three.
    assert abs((added.abs() > 1).double().mean() - 0.0455) < 0.005
    assert abs((added.abs() > 1.5).double().mean() - 0.0027) < 0.002


def test_uniform_noise_is_within_half_a_step():
    """Uniform noise fills -step/2 to step/2, evenly: as strong as the error of rounding."""
    layer, original, step = _noisy_layer(4, noise="uniform")
    added = _samples(layer, original, 100) / step
    assert added.abs().max() <= 0.5 + 1e-4
    assert added.abs().max() > 0.499
    assert abs(added.mean()) < 0.01
    assert abs(added.std() - 1 / math.sqrt(12)) < 0.005
    shares = torch.histc(added, bins=10, min=-0.5, max=0.5) / added.numel()
    assert (shares - 0.1).abs().max() < 0.01


@pytest.mark.parametrize(("kind", "deviation"), [("gaussian", 0.2), ("uniform", 0.2 / 3**0.5)])
def test_noise_scale_is_steps_per_unit(kind, deviation):
    """noise_scale is the Gaussian's deviation, or half the uniform's width, in steps."""
    layer, original, step = _noisy_layer(5, noise=kind, noise_scale=0.2)
    assert abs(_samples(layer, original, 100).std() / step - deviation) < 0.005


def test_noise_is_independent_between_weights_and_reads():
    """Noise of different weights, and of different reads outside a forward, is uncorrelated."""
    layer, original, _ = _noisy_layer(3)
    one, other = _samples(layer, original, 2)
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.15
    assert abs(torch.corrcoef(torch.stack([one[:-1], one[1:]]))[0, 1]) < 0.15


def test_noise_follows_the_groups_bitwidth():
    """Each group's noise is in proportion to the step of its own bitwidth."""
    model = Holder({"weight": torch.randn(15, 200)})
    quantizer = diffq.DiffQuantizer(model, group_size=200, min_size=0, min_bits=1)
    quantizer.no_optimizer()
    set_bits(weight_quantizers(model)["weight"], range(1, 16))
    original = model.parametrizations.weight.original.detach()
    steps = (original.max() - original.min()) / (2.0 ** torch.arange(1, 16) - 1)
    added = _samples(model, original, 50).view(50, 15, 200)
    ratio = added.double().std(dim=(0, 2)) / steps
    # The highest bitwidths add less than float32 resolves next to the weight itself.
    torch.testing.assert_close(ratio, torch.full((15,), 0.5).double(), atol=0.02, rtol=0)


def test_noise_goes_with_the_seed():
    """One seed gives one training weight: noise comes from torch's own generator."""
    layer, _, _ = _noisy_layer(4)
    torch.manual_seed(7)
    first = layer.weight
    torch.manual_seed(7)
    assert torch.equal(layer.weight, first)
    assert not torch.equal(layer.weight, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_draw_computes_in_float32_at_least(kind, dtype):
    """Noise is [groups, group_size], in float32 or in the weight's dtype if that is wider."""
    sample = noise.draw(kind, 3, 5, torch.zeros(15, dtype=dtype))
    assert sample.shape == (3, 5)
    assert sample.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


def test_draw_has_no_sample_of_rounding():
    """The rounding error needs no random numbers, and touches no generator."""
    before = torch.get_rng_state()
    assert noise.draw("rounding", 3, 5, torch.zeros(15)) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_keeps_shape_and_dtype(dtype):
    """The noisy weight has the shape and dtype of the weight, for groups that do not divide."""
    weight = torch.randn(3, 5).to(dtype)
    step = torch.rand(4)
    unit = torch.randn(4, 4)
    noisy = noise.perturb(weight, step, unit)
    wanted = weight + (step[:, None] * unit).reshape(-1)[:15].view(3, 5)
    assert (noisy.shape, noisy.dtype) == (weight.shape, dtype)
    assert torch.equal(noisy, wanted.to(dtype))


def test_gradients_of_perturb():
    """Gradients of w + step * n to w and to the step agree with finite differences."""
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    step = torch.rand(4, dtype=torch.float64, requires_grad=True)
    unit = torch.randn(4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w, s: noise.perturb(w, s, unit), (weight, step))


def test_gradients_through_range_and_bits():
    """They reach weights, minimum, maximum and bitwidths when the step is made of these."""
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    unit = torch.randn(4, 4, dtype=torch.float64)

    def noisy(weight, logits):
        low, high = grid.bounds(weight)
        step = grid.step_size(low, high, grid.bits_of_logits(logits, 2, 15))
        return noise.perturb(weight, step * 0.5, unit)

    assert torch.autograd.gradcheck(noisy, (weight, logits))


@given(st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_straight_through_gradients_are_those_of_constant_noise(numel, group_size, constant):
    """Backward is that of w + step * n with n = (quantized - w) / step held constant."""
    generator = torch.Generator().manual_seed(numel * 10 + group_size)
    weight = torch.randn(numel, generator=generator, dtype=torch.float64)
    if constant:
        weight.fill_(0.3)
    weight.requires_grad_()
    groups = -(-numel // group_size)
    step = torch.rand(groups, generator=generator, dtype=torch.float64) + 0.1
    step.requires_grad_()
    quantized = weight.detach() + 0.5 * torch.rand(numel, generator=generator).double()
    upstream = torch.randn(numel, generator=generator, dtype=torch.float64)

    spread = step.repeat_interleave(group_size)[:numel]
    unit = ((quantized - weight) / spread).detach()
    wanted = torch.autograd.grad((weight + spread * unit) @ upstream, (weight, step))

    passed = noise.straight_through(weight, quantized, step, group_size)
    assert bits_of(passed) == bits_of(quantized)
    found = torch.autograd.grad(passed @ upstream, (weight, step))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[0], upstream)


def test_straight_through_of_a_zero_step_is_finite():
    """A constant tensor has step 0 and error 0: its gradients are finite."""
    weight = torch.full((4,), 0.5, requires_grad=True)
    step = torch.zeros(1, requires_grad=True)
    passed = noise.straight_through(weight, weight.detach().clone(), step, 4)
    passed.sum().backward()
    assert weight.grad.tolist() == [1, 1, 1, 1]
    assert step.grad.tolist() == [0]


def test_straight_through_without_step():
    """Without a step the gradient goes to the weight alone, unchanged."""
    weight = torch.randn(2, 3, requires_grad=True)
    upstream = torch.randn(2, 3)
    noise.straight_through(weight, torch.zeros(2, 3)).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 6), (2, 3, 4, 5)])
@pytest.mark.parametrize("group_size", [1, 4, None])
def test_rounding_trains_on_the_weights_of_evaluation(shape, dtype, group_size):
    """With noise="rounding", the weight in training is the one of evaluation, bit for bit."""
    model = Holder({"weight": torch.randn(shape).to(dtype)})
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=group_size, noise="rounding")
    with torch.no_grad():
        for parameter in weight_quantizers(model)["weight"].parameters():
            parameter.normal_(std=2)
    trained = bits_of(model.weight)
    quantizer.model.eval()
    assert bits_of(model.weight) == trained


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rounding"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_keep_dtype_and_stay_finite(kind, dtype):
    """In every precision, weights and logits get finite gradients of their own dtype."""
    model = Holder(
        {"weight": torch.randn(5, 7).to(dtype), "flat": torch.full((9,), 0.25, dtype=dtype)}
    )
    diffq.DiffQuantizer(model, min_size=0, group_size=4, noise=kind)
    (model.weight.float().square().sum() + model.flat.float().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert len(gradients) == 4
    for name, parameter in model.named_parameters():
        assert gradients[name].dtype == parameter.dtype
        assert torch.isfinite(gradients[name]).all()
    assert gradients["parametrizations.weight.0.logits"].any()


def test_constant_tensors_get_no_noise():
    """A constant tensor has a step of zero, and so trains as it is."""
    model = Holder({"weight": torch.full((9,), 0.25)})
    diffq.DiffQuantizer(model, min_size=0)
    assert torch.equal(model.weight, torch.full((9,), 0.25))
