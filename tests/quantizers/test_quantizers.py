"""The math of QAT, LSQ and DiffQ: the paper's example, gradients, freezing, no host sync."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import diffq
from diffq.numerics import draws, flat, noise, rounding, segments
from diffq.numerics.grid import BitsLaw
from tests.compare import close, same_bits
from tests.holder import Holder, bits_of, set_bits, weight_quantizers
from tests.models import MODELS, QUANTIZERS, computed, computed_weight, learned, mlp

# --- Section 3.3 of the paper: least squares in one dimension, B = 4, X = 1 ---

TARGET = 0.11
BELOW, ABOVE = 1 / 15, 2 / 15  # TARGET's neighbours on the grid; ABOVE is nearer.


class OneWeight(nn.Module):
    """A weight in [0, 1]: two more weights, never trained, hold the ends of the range."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, TARGET, 1.0]))
        self.weight.register_hook(lambda gradient: gradient * torch.tensor([0.0, 1.0, 0.0]))

    def forward(self, x):
        return x * self.weight[1]


def _least_squares(model, steps, rate):
    """Trains on 1/2 (wx - TARGET x)^2 with X = 1; the quantized weight after each step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    quantized = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        (0.5 * (model(torch.ones(())) - TARGET) ** 2).backward()
        optimizer.step()
        model.eval()
        quantized.append(computed_weight(model, "weight")[1].item())
        model.train()
    return torch.tensor(quantized)


def _decaying(step):
    return 1 / (step + 2)


@pytest.mark.parametrize("rate", [lambda _: 0.5, lambda _: 0.05, _decaying])
def test_straight_through_oscillates(rate):
    """STE's quantized weight jumps between the two neighbours for ever, at any step size."""
    model = OneWeight()
    diffq.QATQuantizer(model, bits=4, min_size=0)
    quantized = _least_squares(model, 400, rate)
    for window in quantized[100:].split(100):
        near = torch.stack([(window - BELOW).abs(), (window - ABOVE).abs()])
        assert (near.min(0).values < 1e-6).all()
        assert (near < 1e-6).any(1).all()
        assert (window[1:] != window[:-1]).sum() > 10


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_diffq_settles_on_the_right_value(kind, seed):
    """DiffQ's weight converges to the target, and its quantized weight to the nearest value."""
    torch.manual_seed(seed)
    model = OneWeight()
    diffq.DiffQuantizer(model, bits=4, min_size=0, noise=kind)
    quantized = _least_squares(model, 800, _decaying)
    assert (quantized[-400:] - ABOVE).abs().max() < 1e-6
    assert abs(model.weight[1].item() - TARGET) < 0.01


def test_diffq_gradient_is_unbiased():
    """The mean of DiffQ's gradient is w - w*, where STE's is Q(w) - w* (Equations 5 and 7)."""
    model = OneWeight()
    diffq.DiffQuantizer(model, bits=4, min_size=0)
    original = model.weight
    for _ in range(1500):
        (0.5 * (model(torch.ones(())) - 0.2) ** 2).backward()
    # Noise of deviation 1/30 in 1500 samples: the mean is known to 0.0009.
    assert original.grad[1].item() / 1500 == pytest.approx(TARGET - 0.2, abs=0.004)

    model = OneWeight()
    diffq.QATQuantizer(model, bits=4, min_size=0)
    (0.5 * (model(torch.ones(())) - 0.2) ** 2).backward()
    gradient = model.weight.grad[1].item()
    assert gradient == pytest.approx(ABOVE - 0.2, abs=1e-6)


# --- Gradients against finite differences ---


#: What two computations of the same gradient in float64 may differ by.
ROUNDING = 1e-12


def _attached(**options):
    """A float64 layer of 6 x 5 weights with DiffQ, and its input."""
    layer = nn.Linear(5, 6).double()
    quantizer = diffq.DiffQuantizer(layer, min_size=0, group_size=4, exclude=["bias"], **options)
    quantizer.no_optimizer()
    set_bits(weight_quantizers(layer)["weight"], [2.3, 3, 2.8, 4.2, 3.6, 2.5, 5, 3.3])
    return layer, torch.randn(7, 5).double()


def _loss(layer, weight, logits, x):
    """The loss as a function of stored weight and logits, on one sample of noise."""
    torch.manual_seed(5)
    output = functional_call(layer, {"weight": weight, "_diffq.learned": logits}, (x,))
    return torch.tanh(output).pow(2).sum()


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_loss_gradient_to_weights(kind):
    """With the noise fixed, the loss's gradient to every weight is right, range ends included."""
    layer, x = _attached(noise=kind)
    weight = layer.weight.detach().clone().requires_grad_()
    logits = weight_quantizers(layer)["weight"].logits
    assert torch.autograd.gradcheck(
        lambda w: _loss(layer, w, logits, x), (weight,), nondet_tol=ROUNDING
    )
    (gradient,) = torch.autograd.grad(_loss(layer, weight, logits, x), weight)
    ends = torch.stack([weight.detach().argmin(), weight.detach().argmax()])
    # The ends carry the gradient of the range on top of their own.
    torch.manual_seed(5)
    noisy = functional_call(layer, {"weight": weight.detach()}, (torch.eye(5).double(),))
    noisy = (noisy - layer.bias).t().detach().requires_grad_()
    (own,) = torch.autograd.grad(torch.tanh(x @ noisy.t() + layer.bias).pow(2).sum(), noisy)
    difference = (gradient - own).reshape(-1).abs()
    assert (difference[ends] > 1e-3).all()
    difference[ends] = 0
    assert difference.max() < 1e-9


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_loss_gradient_to_logits(kind):
    """With the noise fixed, the loss's gradient to every logit agrees with finite differences."""
    layer, x = _attached(noise=kind)
    weight = layer.weight.detach()
    logits = weight_quantizers(layer)["weight"].logits.double().requires_grad_()
    # Bitwidths are computed in float32: a wide difference, to a tolerance that fits it.
    assert torch.autograd.gradcheck(
        lambda z: _loss(layer, weight, z, x),
        (logits,),
        eps=3e-3,
        atol=1e-3,
        rtol=2e-3,
        nondet_tol=ROUNDING,
    )
    (gradient,) = torch.autograd.grad(_loss(layer, weight, logits, x), logits)
    assert (gradient.abs() > 5e-3).all()


def test_rounding_gradient_is_that_of_constant_noise():
    """With "rounding", gradients are those of w + step * n, n = (Q(w) - w) / step held constant.

    The bitwidths in the step are the rounded ones, with the real ones' gradient.
    """
    layer, x = _attached(noise="rounding")
    weight = layer.weight
    quantized = weight_quantizers(layer)["weight"]
    torch.tanh(layer(x)).pow(2).sum().backward()

    stored, start = weight.detach().clone(), quantized.logits.double()
    real_bits = BitsLaw(2, 15).bits(start)
    offset = torch.round(real_bits) - real_bits

    def step_of(stored, real):
        bits = BitsLaw(2, 15).bits(real) + offset
        step = (stored.max() - stored.min()) / (2**bits - 1)
        return step.repeat_interleave(4)[:30].view(6, 5)

    step = step_of(stored, start)
    unit = (torch.round((stored - stored.min()) / step) * step + stored.min() - stored) / step

    def surrogate(stored, real):
        noisy = stored + step_of(stored, real) * unit
        return torch.tanh(x @ noisy.t() + layer.bias).pow(2).sum()

    points = (stored.requires_grad_(), start.requires_grad_())
    assert torch.autograd.gradcheck(surrogate, points, nondet_tol=ROUNDING)
    wanted = torch.autograd.grad(surrogate(*points), points)
    torch.testing.assert_close(weight.grad, wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantized.grad.double(), wanted[1], rtol=1e-4, atol=1e-5)
    assert (quantized.grad != 0).all()


def test_qat_gradient_is_the_identity():
    """The weight's gradient under QAT is that of the quantized weight, unchanged."""
    layer = nn.Linear(5, 6)
    diffq.QATQuantizer(layer, bits=2, min_size=0)
    upstream = torch.randn(6, 5)
    computed_weight(layer, "weight").backward(upstream)
    assert close(layer.weight.grad, upstream)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_lsq_gradients(bits, sign):
    """LSQ's gradients to scale and weights are those of its paper, with 1 / sqrt(N Qp)."""
    layer = nn.Linear(5, 6, bias=False).double()
    diffq.LSQQuantizer(layer, bits=bits, min_size=0).no_optimizer()
    weight, quantized = layer.weight, weight_quantizers(layer)["weight"]
    scale = quantized.scale
    with torch.no_grad():
        # Small enough that weights leave the range on both sides; its sign has no meaning.
        scale.copy_(sign * weight.abs().mean() / 2 ** (bits - 1))
    upstream = torch.randn(6, 5).double()
    computed_weight(layer, "weight").backward(upstream)

    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    size = abs(scale.item())
    total, sides = 0.0, set()
    for value, up, found in zip(
        weight.reshape(-1).tolist(),
        upstream.reshape(-1).tolist(),
        weight.grad.reshape(-1).tolist(),
        strict=True,
    ):
        ratio = value / size
        inside = lowest <= ratio <= highest
        sides.add("inside" if inside else ratio > 0)
        slope = round(ratio) - ratio if inside else (lowest if ratio < 0 else highest)
        total += up * slope
        assert found == pytest.approx(up if inside else 0, abs=1e-12)
    assert sides == {"inside", True, False}
    assert quantized.grad.item() == pytest.approx(sign * total / math.sqrt(30 * highest), rel=1e-4)


# --- Forward values ---


def _real_bits(model, name):
    """The bitwidths that training computes with, float32 [groups]."""
    quantized = weight_quantizers(model)[name]
    return quantized.bits(quantized.weight.detach(), quantized.learned_or_none)


@pytest.mark.parametrize("bits", range(1, 16))
def test_qat_uses_the_grid_of_the_tensor(bits):
    """In training and eval, QAT's weight is the nearest value of Equation 1's grid."""
    layer = nn.Linear(7, 9)
    original = layer.weight.detach().double()
    diffq.QATQuantizer(layer, bits=bits, min_size=0)
    low, high = original.min(), original.max()
    step = (high - low) / (2**bits - 1)
    trained = computed_weight(layer, "weight")
    assert ((trained - original).abs() <= step / 2 + 1e-6).all()
    levels = (trained - low) / step
    assert (levels - levels.round()).abs().max() < 2e-2
    layer.eval()
    assert same_bits(computed_weight(layer, "weight"), trained)


def test_one_bit_keeps_the_extremes():
    """With 1 bit, each weight becomes the minimum or the maximum, whichever is nearer."""
    layer = nn.Linear(7, 9)
    original = layer.weight.detach().clone()
    diffq.QATQuantizer(layer, bits=1, min_size=0)
    low, high = original.min(), original.max()
    wanted = torch.where(original - low > high - original, high, low)
    torch.testing.assert_close(computed_weight(layer, "weight"), wanted)


def test_qat_per_channel():
    """With per_channel, each slice of the first dimension has its own range."""
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight.mul_(torch.tensor([1.0, 10.0, 0.1, 0.0]).view(4, 1, 1, 1))
        conv.weight[3] = 0.3
    slices = [conv.weight.detach()[channel].clone() for channel in range(4)]
    diffq.QATQuantizer(conv, bits=5, per_channel=True, min_size=0)
    quantized = computed_weight(conv, "weight")
    for channel, wanted in enumerate(slices):
        alone = Holder({"weight": wanted})
        diffq.QATQuantizer(alone, bits=5, min_size=0)
        assert same_bits(quantized[channel], computed_weight(alone, "weight"))


def test_post_training_quantization():
    """With training=False, training forwards are in full precision and eval is quantized."""
    layer = nn.Linear(7, 9)
    original = layer.weight.detach().clone()
    diffq.QATQuantizer(layer, bits=3, training=False, min_size=0)
    assert same_bits(computed_weight(layer, "weight"), original)
    layer.eval()
    evaluated = computed_weight(layer, "weight")
    assert len(evaluated.unique()) <= 8
    assert not same_bits(evaluated, original)


@pytest.mark.parametrize("bits", [2, 4, 8, 15])
def test_lsq_uses_signed_levels(bits):
    """LSQ's weight is round(clamp(w / s, -2^(b-1), 2^(b-1) - 1)) * s, from its paper's first s."""
    layer = nn.Linear(7, 9, bias=False)
    original = layer.weight.detach().clone()
    diffq.LSQQuantizer(layer, bits=bits, min_size=0).no_optimizer()
    scale = weight_quantizers(layer)["weight"].scale
    highest = 2 ** (bits - 1) - 1
    assert scale.item() == pytest.approx(2 * original.abs().mean().item() / math.sqrt(highest))
    wanted = torch.round((original / scale).clamp(-highest - 1, highest)) * scale
    torch.testing.assert_close(computed_weight(layer, "weight"), wanted)
    layer.eval()
    # Adding zero takes the sign off zeros, which are rounded to from both sides.
    assert same_bits(computed_weight(layer, "weight"), wanted + 0)


def test_lsq_learns_from_a_tensor_of_zeros():
    """A weight that starts at zero, as residual branches do, can still learn under LSQ."""
    layer = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(layer.weight)
    quantizer = diffq.LSQQuantizer(layer, min_size=0, bits=4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    x = torch.randn(64, 8)
    target = x @ torch.randn(8, 8)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append((layer(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("group_size", [1, 4, 7, None])
def test_diffq_evaluates_at_rounded_bits(group_size):
    """In eval, each group is on the grid of its rounded bitwidth over the tensor's range."""
    model = Holder({"weight": torch.randn(9, 5)})
    original = model.weight.detach().clone().double().reshape(-1)
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=group_size)
    with torch.no_grad():
        weight_quantizers(model)["weight"].logits.normal_(std=2)
    model.eval()
    values = computed_weight(model, "weight").detach().reshape(-1)
    low, high = original.min(), original.max()
    real = _real_bits(model, "weight")
    for index, value in enumerate(values):
        group = index // (group_size or 45)
        bits = quantizer.bits()["weight"][group].item()
        assert abs(bits - real[group].item()) <= 0.5
        step = (high - low) / (2**bits - 1)
        assert abs(value - original[index]) <= step / 2 + 1e-6
        level = (value - low) / step
        assert abs(level - level.round()) < 2e-2


def test_bits_start_where_they_should():
    """init_bits is the bitwidth of every group at the start, 8 unless said."""
    for options, wanted in (({}, 8), ({"init_bits": 5.5}, 5.5), ({"bits": 3}, 3)):
        layer = nn.Linear(16, 16)
        diffq.DiffQuantizer(layer, min_size=0, **options)
        bits = _real_bits(layer, "weight")
        torch.testing.assert_close(bits, torch.full_like(bits, float(wanted)))


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rounding"])
def test_size_penalty_lowers_the_bits_that_do_not_matter(kind):
    """Training with a size penalty spends fewer bits on groups that the loss ignores."""
    layer = nn.Linear(16, 16, bias=False)
    quantizer = diffq.DiffQuantizer(layer, min_size=0, group_size=16, noise=kind)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    quantizer.setup_optimizer(optimizer, lr=0.5)
    # The second half of the outputs is not used.
    for _ in range(60):
        optimizer.zero_grad()
        x = torch.randn(32, 16)
        target = x @ layer.weight.detach().t()
        loss = (layer(x) - target)[:, :8].square().mean()
        (3e3 * loss + 1e5 * quantizer.model_size()).backward()
        optimizer.step()
    bits = quantizer.bits()["weight"].float()
    assert bits[8:].max() <= 3
    assert bits[:8].min() > bits[8:].max()


# --- Freezing ---


def _trained(kind="gaussian", optimizer=None):
    """A model after a few steps with momentum, its quantizer and optimizer."""
    torch.manual_seed(0)
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=4, noise=kind)
    optimizer = (optimizer or torch.optim.AdamW)(model.parameters(), lr=1e-2)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    _train(model, quantizer, optimizer)
    return model, quantizer, optimizer


def _train(model, quantizer, optimizer, steps=5):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 16)).square().mean() + quantizer.model_size()
        loss.backward()
        optimizer.step()


def _bits(quantizer):
    """Tensor name to the rounded bitwidths of its groups, as a list."""
    return {name: bits.tolist() for name, bits in quantizer.bits().items()}


def _momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, _momentum])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rounding"])
def test_frozen_bits_stay(kind, rounding, optimizer):
    """After freeze_bits, bitwidths stay, though the optimizer holds momentum for them."""
    model, quantizer, optimizer = _trained(kind, optimizer)
    quantizer.freeze_bits(rounding=rounding)
    before = _bits(quantizer)
    weights = bits_of(model[0].weight)
    size = quantizer.model_size()
    assert not size.requires_grad
    _train(model, quantizer, optimizer)
    assert _bits(quantizer) == before
    assert same_bits(quantizer.model_size(), size)
    assert bits_of(model[0].weight) != weights


def test_freezing_before_a_backward():
    """A backward that was due when bits were frozen does not move them."""
    model, quantizer, optimizer = _trained()
    before = _bits(quantizer)
    optimizer.param_groups[-1]["lr"] = 10.0
    loss = model(torch.randn(8, 16)).square().mean() + quantizer.model_size()
    quantizer.freeze_bits()
    loss.backward()
    optimizer.step()
    assert _bits(quantizer) == before
    assert _real_bits(model, "0.weight").tolist() == before["0.weight"]


def test_frozen_bits_are_whole():
    """From freeze_bits on, training's noise and size have the bitwidths of evaluation."""
    model, quantizer, _ = _trained()
    real = _real_bits(model, "0.weight")
    assert (real != real.round()).any()
    quantizer.freeze_bits()
    for name in weight_quantizers(model):
        assert same_bits(_real_bits(model, name), quantizer.bits()[name].float())
    assert quantizer.model_size().item() == pytest.approx(quantizer.true_model_size(), rel=1e-6)


def test_frozen_bits_keep_the_noise():
    """freeze_bits() alone goes on with random noise."""
    model, quantizer, _ = _trained()
    quantizer.freeze_bits()
    assert not same_bits(*(computed_weight(model, "0.weight") for _ in range(2)))


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rounding"])
@pytest.mark.parametrize("fixed", [None, 3])
def test_frozen_rounding_trains_on_the_weights_of_evaluation(kind, fixed):
    """With freeze_bits(rounding=True), training computes what eval computes, bit for bit."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=5, noise=kind, bits=fixed)
    quantizer.no_optimizer()
    if fixed is None:
        for weight in weight_quantizers(model).values():
            nn.init.normal_(weight.logits, std=2)
    quantizer.freeze_bits(rounding=True)
    trained = computed(model)
    assert same_bits(computed(model.eval()), trained)


@pytest.mark.parametrize("rounding", [False, True])
def test_the_freeze_survives_a_checkpoint(rounding):
    """A state dict carries the freeze: a model that loads it goes on with frozen bits."""
    model, quantizer, _ = _trained()
    quantizer.freeze_bits(rounding=rounding)
    other = mlp()
    resumed = diffq.DiffQuantizer(other, min_size=0, group_size=4)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    resumed.setup_optimizer(optimizer, lr=0.1)
    _train(other, resumed, optimizer)
    other.load_state_dict(model.state_dict())
    assert _bits(resumed) == _bits(quantizer)
    _train(other, resumed, optimizer)
    assert _bits(resumed) == _bits(quantizer)
    assert not resumed.model_size().requires_grad
    weights = [computed_weight(other, "0.weight") for _ in range(2)]
    assert same_bits(*weights) == rounding


def test_an_earlier_checkpoint_learns_again():
    """Loading a state dict from before the freeze takes the freeze back."""
    model, quantizer, optimizer = _trained()
    earlier = {name: value.clone() for name, value in model.state_dict().items()}
    quantizer.freeze_bits(rounding=True)
    model.load_state_dict(earlier)
    assert quantizer.model_size().requires_grad
    logits = bits_of(weight_quantizers(model)["0.weight"].logits)
    _train(model, quantizer, optimizer)
    assert bits_of(weight_quantizers(model)["0.weight"].logits) != logits


# --- No host synchronisation in a training step ---


class HostSyncError(AssertionError):
    """A value was read back from the device."""


class NoHostSync(TorchDispatchMode):
    """Refuses every operation that waits for a value from the device."""

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        # A mask as index is counted first.
        masks = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        masked = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if name in self.REFUSED or masked or "unique" in name:
            raise HostSyncError(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_sync():
    """Refuses reads, also those that no dispatched operation shows on a CPU."""

    def refuse(name):
        def read(*args, **kwargs):
            raise HostSyncError(name)

        return read

    with pytest.MonkeyPatch.context() as patch, NoHostSync():
        for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__array__"):
            patch.setattr(torch.Tensor, name, refuse(name))
        # As on a device other than the CPU, whose numbers NumPy does not reach.
        for module in (draws, flat, noise, rounding, segments):
            patch.setattr(module, "in_numpy", lambda tensor: False)
        yield


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("model", ["mlp", "tied-head", "conv", "encoder", "lstm"])
@pytest.mark.parametrize("stored", [{}, {"float16": True}, {"min_size": 1e-4, "small_bits": 8}])
def test_training_step_reads_nothing_back(kind, model, stored):
    """Forward, model_size and backward of a training step never wait for the device.

    But for the first forward, which looks for writes to quantized tensors.
    """
    make, inputs = MODELS[model]
    network, x = make(), inputs()
    quantizer = QUANTIZERS[kind](network, exclude=["bias*"], **stored)
    quantizer.no_optimizer()
    network(x)
    with no_host_sync():
        loss = network(x).square().mean() + quantizer.model_size()
        loss.backward()
    assert all(p.grad is not None for _, p in learned(network))


@pytest.mark.parametrize("rounding", [False, True])
def test_training_step_after_the_freeze_reads_nothing_back(rounding):
    """Neither does one after freeze_bits, nor freeze_bits itself."""
    model, quantizer, _ = _trained()
    x = torch.randn(8, 16)
    with no_host_sync():
        quantizer.freeze_bits(rounding=rounding)
        loss = model(x).square().mean() + quantizer.model_size()
        loss.backward()
    assert torch.isfinite(loss)


def test_reads_would_be_seen():
    """The refusal works: what does read values back, as true_model_size, is refused."""
    _, quantizer, _ = _trained()
    for read in (
        quantizer.true_model_size,
        quantizer.bits,
        lambda: quantizer.model_size().item(),
        lambda: float(quantizer.model_size().detach()),
        lambda: bool(quantizer.model_size() > 0),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.ones(3)[torch.ones(3) > 0],
    ):
        with no_host_sync(), pytest.raises(HostSyncError):
            read()
