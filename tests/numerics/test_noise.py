"""Pseudo quantization noise: its distributions, and the gradients that pass through it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import diffq
from diffq.numerics import draws, noise
from diffq.numerics.flat import Flat
from diffq.numerics.grid import BitsLaw, widen
from tests.compare import close, same_bits
from tests.holder import Holder, bits_of, set_bits, weight_quantizers
from tests.models import computed_weight

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _samples(layer, count):
    """What several draws of a training weight add to the stored one: [count, weights]."""
    with torch.no_grad():
        return torch.stack([(_drawn(layer) - layer.weight).reshape(-1) for _ in range(count)])


def _drawn(model):
    """What a forward computes with in place of the weight."""
    return computed_weight(model, "weight")


def _noisy_layer(bits, **options):
    """A layer of fixed bitwidth in training mode, and the grid's step."""
    layer = nn.Linear(40, 25, bias=False)
    quantizer = diffq.DiffQuantizer(layer, min_size=0, bits=bits, **options)
    quantizer.no_optimizer()
    original = layer.weight.detach()
    step = float(original.max() - original.min()) / (2**bits - 1)
    return layer, step


def test_gaussian_noise_is_half_a_step():
    """The training weight is the stored one plus noise of mean 0 and deviation step / 2."""
    layer, step = _noisy_layer(4)
    added = _samples(layer, 100) / step
    # 100,000 samples: the mean is known to 0.0016, the deviation to 0.0011.
    assert abs(added.mean()) < 0.01
    assert abs(added.std() - 0.5) < 0.01
    # The share of a normal distribution beyond two deviations, and beyond three.
    assert abs((added.abs() > 1).double().mean() - 0.0455) < 0.005
    assert abs((added.abs() > 1.5).double().mean() - 0.0027) < 0.002


def test_uniform_noise_is_within_half_a_step():
    """Uniform noise fills -step/2 to step/2, evenly: as strong as the error of rounding."""
    layer, step = _noisy_layer(4, noise="uniform")
    added = _samples(layer, 100) / step
    assert added.abs().max() <= 0.5 + 1e-4
    assert added.abs().max() > 0.499
    assert abs(added.mean()) < 0.01
    assert abs(added.std() - 1 / math.sqrt(12)) < 0.005
    shares = torch.histc(added, bins=10, min=-0.5, max=0.5) / added.numel()
    assert (shares - 0.1).abs().max() < 0.01


@pytest.mark.parametrize(("kind", "deviation"), [("gaussian", 0.2), ("uniform", 0.2 / 3**0.5)])
def test_noise_scale_is_steps_per_unit(kind, deviation):
    """noise_scale is the Gaussian's deviation, or half the uniform's width, in steps."""
    layer, step = _noisy_layer(5, noise=kind, noise_scale=0.2)
    assert abs(_samples(layer, 100).std() / step - deviation) < 0.005


def test_noise_is_independent_between_weights_and_draws():
    """Noise of different weights, and of different draws, is uncorrelated."""
    layer, _ = _noisy_layer(3)
    one, other = _samples(layer, 2)
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.15
    assert abs(torch.corrcoef(torch.stack([one[:-1], one[1:]]))[0, 1]) < 0.15


def test_noise_follows_the_groups_bitwidth():
    """Each group's noise is in proportion to the step of its own bitwidth."""
    model = Holder({"weight": torch.randn(15, 200)})
    quantizer = diffq.DiffQuantizer(model, group_size=200, min_size=0, min_bits=1)
    quantizer.no_optimizer()
    set_bits(weight_quantizers(model)["weight"], range(1, 16))
    original = model.weight.detach()
    steps = (original.max() - original.min()) / (2.0 ** torch.arange(1, 16) - 1)
    added = _samples(model, 50).view(50, 15, 200)
    ratio = added.double().std(dim=(0, 2)) / steps
    # The highest bitwidths add less than float32 resolves next to the weight itself.
    torch.testing.assert_close(ratio, torch.full((15,), 0.5).double(), atol=0.02, rtol=0)


def test_noise_goes_with_the_seed():
    """One seed gives one training weight: noise comes from torch's own generator."""
    layer, _ = _noisy_layer(4)
    torch.manual_seed(7)
    first = _drawn(layer)
    torch.manual_seed(7)
    assert same_bits(_drawn(layer), first)
    assert not same_bits(_drawn(layer), first)


def _perturbed(weights, group_size, kind="gaussian"):
    """Noisy weights, and the bits of each group, from 1 on."""
    flat = Flat([weight.shape for weight in weights], group_size)
    wide = widen(weights[0]).dtype
    bits = torch.arange(1, 1 + flat.groups.total, dtype=wide)
    drawn = noise.perturb(flat, weights, bits, kind, 0.5, [False] * len(weights))
    return flat.split(drawn.values), bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("group_size", [1, 4, 100, None])
def test_perturb_adds_step_times_noise(dtype, kind, group_size):
    """Noise is one draw for all tensors, cut into their groups and scaled by each group's step."""
    weights = [torch.randn(3, 5).to(dtype), torch.randn(7).to(dtype)]
    torch.manual_seed(3)
    noisy, bits = _perturbed(weights, group_size, kind)
    torch.manual_seed(3)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    width = group_size or 64
    rows = [-(-weight.numel() // width) for weight in weights]
    unit = draws.source(kind, sum(rows) * width, bits, bits.dtype)(
        torch.empty(sum(rows), width, dtype=wide)
    )
    units = torch.split(unit.double(), rows)
    widths = torch.split(bits.double(), rows if group_size else [1, 1])
    for weight, value, unit, width in zip(weights, noisy, units, widths, strict=True):
        span = weight.double().max() - weight.double().min()
        added = unit * (0.5 * span / (2**width - 1))[:, None]
        added = added.reshape(-1)[: weight.numel()].view(weight.shape)
        assert value.dtype == wide
        exact = added + weight
        # The step is rounded a few times, the product may be before it is added.
        error = (value - exact).abs()
        assert (error <= torch.finfo(wide).eps * (8 * added.abs() + exact.abs())).all()


def test_noise_does_not_depend_on_strides():
    """A weight in channels_last gets the noise of the contiguous one, element by element."""
    weight = torch.randn(4, 6, 3, 3)
    torch.manual_seed(0)
    (plain,), _ = _perturbed([weight], 4)
    torch.manual_seed(0)
    (last,), _ = _perturbed([weight.contiguous(memory_format=torch.channels_last)], 4)
    assert same_bits(last, plain)


def _pass_noise(weight, value, logits, law, group_size):
    """The value of one tensor, with the gradient of its noise."""
    flat = Flat([weight.shape], group_size)
    drawn = noise.Drawn.of(flat, [weight], [value])
    (passed,) = noise.pass_noise(drawn, law, logits, [weight], [value])
    return passed


LAW = BitsLaw(2, 15)


def _as_autograd_sees_it(weight, value, logits, law, group_size):
    """w + step * n as a plain expression, with n = (value - w) / step held constant."""
    low, high = weight.amin(), weight.amax()
    bits = torch.tensor([4.0]) if logits is None else law.bits(logits)
    step = (high - low) / (2**bits - 1)
    numel = weight.numel()
    spread = step.repeat_interleave(group_size)[:numel].view(weight.shape)
    unit = ((value - weight) / torch.where(spread > 0, spread, 1)).detach()
    return weight + spread * unit


@given(
    st.integers(1, 12), st.integers(1, 5), st.sampled_from(["learned", "whole", "fixed"]),
    st.booleans(),
)  # fmt: skip
def test_gradients_are_those_of_constant_noise(numel, group_size, bits, twice):
    """Backward is that of w + step * n, n held constant: to weights, range and logits.

    With create_graph=True too, where it can be differentiated again.
    """
    generator = torch.Generator().manual_seed(numel * 10 + group_size)
    weight = torch.randn(numel, generator=generator, dtype=torch.float64).requires_grad_()
    groups = -(-numel // group_size)
    group_size = numel if bits == "fixed" else group_size
    logits = None
    if bits != "fixed":
        logits = torch.randn(groups, generator=generator, dtype=torch.float64).requires_grad_()
    law = BitsLaw(2, 15, whole=bits == "whole")
    value = weight.detach() + 0.5 * torch.rand(numel, generator=generator).double()
    if numel == 1:
        value = weight.detach().clone()
    upstream = torch.randn(numel, generator=generator, dtype=torch.float64)
    inputs = [weight] if logits is None else [weight, logits]

    wanted = torch.autograd.grad(
        _as_autograd_sees_it(weight, value, logits, law, group_size) @ upstream, inputs
    )
    passed = _pass_noise(weight, value, logits, law, group_size)
    assert bits_of(passed) == bits_of(value)
    found = torch.autograd.grad(passed @ upstream, inputs, create_graph=twice)
    torch.testing.assert_close(found, wanted)
    assert all(grad.requires_grad == twice for grad in found[1:])


def test_second_derivatives():
    """With create_graph=True, the gradients' own gradients agree with finite differences."""
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, dtype=torch.float64, requires_grad=True)
    value = weight.detach() + 0.1 * torch.rand(6).double()

    def passed(upstream):
        noisy = _pass_noise(weight, value, logits, LAW, 3)
        return torch.autograd.grad(noisy, (weight, logits), upstream, create_graph=True)

    upstream = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(passed, (upstream,))


def test_the_first_of_equal_extremes_gets_the_gradient_of_the_range():
    """Of several equal minima, one gets the range's gradient: a subgradient, as for max()."""
    weight = torch.tensor([-1.0, -1.0, 0.0, 1.0], requires_grad=True)
    value = weight.detach() + torch.tensor([0.0, 0.0, 0.5, 0.0])
    _pass_noise(weight, value, None, LAW, 4).sum().backward()
    assert close(weight.grad, torch.tensor([0.75, 1, 1, 1.25]))


def test_constant_tensors_pass_finite_gradients():
    """A constant tensor has step 0 and error 0: its gradients are finite."""
    weight = torch.full((4,), 0.5, requires_grad=True)
    logits = torch.zeros(1, requires_grad=True)
    _pass_noise(weight, weight.detach().clone(), logits, LAW, 4).sum().backward()
    assert close(weight.grad, torch.ones(4))
    assert not logits.grad.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-39, 1e-44])
def test_tiny_ranges_pass_finite_gradients(scale):
    """The inverse of a tiny range overflows; its gradient does not."""
    weight = (torch.randn(4, 8) * scale).requires_grad_()
    value = weight.detach() * 1.25
    _pass_noise(weight, value, None, LAW, 32).sum().backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() < 32


def test_straight_through_is_the_identity():
    """The straight-through estimator gives the weight its gradient unchanged."""
    weight = torch.randn(2, 3, requires_grad=True)
    upstream = torch.randn(2, 3)
    (passed,) = noise.straight_through([weight], [torch.zeros(2, 3)])
    passed.backward(upstream)
    assert close(weight.grad, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 6), (2, 3, 4, 5)])
@pytest.mark.parametrize("group_size", [1, 4, None])
def test_rounding_trains_on_the_weights_of_evaluation(shape, dtype, group_size):
    """With noise="rounding", the weight in training is the one of evaluation, bit for bit."""
    model = Holder({"weight": torch.randn(shape).to(dtype)})
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=group_size, noise="rounding")
    quantizer.no_optimizer()
    weight_quantizers(model)["weight"].logits.normal_(std=2)
    trained = bits_of(_drawn(model))
    quantizer.model.eval()
    assert bits_of(_drawn(model)) == trained


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rounding"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_keep_dtype_and_stay_finite(kind, dtype):
    """In every precision, weights and logits get finite gradients of their own dtype."""
    model = Holder(
        {"weight": torch.randn(5, 7).to(dtype), "flat": torch.full((9,), 0.25, dtype=dtype)}
    )
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=4, noise=kind)
    quantizer.no_optimizer()
    with quantizer.computing():
        (model.weight.float().square().sum() + model.flat.float().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert len(gradients) == 3
    for name, parameter in model.named_parameters():
        assert gradients[name].dtype == parameter.dtype
        assert torch.isfinite(gradients[name]).all()
    assert weight_quantizers(model)["weight"].grad.any()


def test_constant_tensors_get_no_noise():
    """A constant tensor has a step of zero, and so trains as it is."""
    model = Holder({"weight": torch.full((9,), 0.25)})
    diffq.DiffQuantizer(model, min_size=0).no_optimizer()
    assert same_bits(_drawn(model), torch.full((9,), 0.25))
