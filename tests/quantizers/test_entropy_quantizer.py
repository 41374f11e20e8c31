"""EntropyQuantizer: levels around zero, a learned step for each row, and the levels' entropy."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffq
from diffq.format.records import STEPS
from diffq.numerics.fineness import StepFineness
from diffq.numerics.flat import Flat
from diffq.numerics.lengths import code_lengths
from diffq.numerics.stepped import COARSEST, FINEST, numbers_of, pass_steps, steps_of
from diffq.quantizers.entropy import SteppedBatch
from tests.compare import close, same_bits
from tests.holder import Holder
from tests.models import SUMS, seeded
from tests.readers import x16


def _entropy(levels):
    """Zeroth-order entropy of integers in bits for all of them, by NumPy."""
    counts = np.unique(levels, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _attached(*shape, scale=1.0, **options):
    torch.manual_seed(0)
    model = Holder({"weight": scale * torch.randn(shape)})
    quantizer = diffq.EntropyQuantizer(model, min_size=0, **options)
    quantizer.no_optimizer()
    return model, quantizer


# Steps.


def test_steps_are_quarter_octaves():
    """Steps are powers of two in quarter octaves, the same by torch and in files."""
    numbers = torch.arange(FINEST, COARSEST + 1)
    steps = steps_of(numbers)
    assert same_bits(steps, torch.from_numpy(STEPS))
    exact = [2.0 ** (number / 4) for number in range(FINEST, COARSEST + 1)]
    assert np.array_equal(steps.numpy(), np.array(exact).astype(np.float32))


@given(st.integers(FINEST, COARSEST))
def test_numbers_survive_their_logarithms(number):
    """What is learned of a step, and its fineness, give the step's number back."""
    learned = StepFineness().learned(torch.tensor([-float(number)], dtype=torch.float64))
    assert numbers_of(learned).item() == number
    assert StepFineness().of(learned).item() == -number


@pytest.mark.parametrize("init_bits", [2, 4, 7])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_first_steps(init_bits, scale):
    """Normal weights begin with the entropy that was asked for, whatever their scale."""
    _, quantizer = _attached(256, 256, scale=scale, init_bits=init_bits)
    # A step is within an eighth of an octave of what was asked for.
    assert abs(quantizer.mean_bits() - init_bits) < 0.15


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((8, 100), 8), ((8, 16), 2), ((9, 16), 3), ((5, 3, 3, 3), 2), ((130,), 3), ((3,), 1)],
)
def test_rows(shape, rows):
    """A row has a step, or as many rows together as have 64 weights."""
    model, _ = _attached(*shape)
    assert model._diffq.learned.shape == (rows,)


# Levels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_are_multiples_of_the_step(dtype):
    """Eval computes with whole multiples of each row's step, the nearest ones, and so do files."""
    torch.manual_seed(0)
    model = Holder({"weight": torch.randn(6, 70).to(dtype)})
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    weight, steps = model.weight.detach(), steps_of(numbers_of(model._diffq.learned))
    # Adding zero turns -0.0 into 0.0.
    levels = (weight.float() / steps[:, None]).round() + 0.0
    expected = (levels * steps[:, None]).to(dtype)
    model.eval()
    with quantizer.computing():
        assert same_bits(model.weight.detach(), expected)
    file = io.BytesIO()
    diffq.save(quantizer, file)
    file.seek(0)
    plain = Holder({"weight": torch.zeros(6, 70, dtype=dtype)})
    diffq.load(file, plain)
    assert same_bits(plain.weight.detach(), expected)


def test_training_computes_with_what_eval_does():
    """A training forward and an eval forward read the same values."""
    model, quantizer = _attached(6, 70)
    with quantizer.computing():
        trained = model.weight.detach().clone()
    model.eval()
    with quantizer.computing():
        assert same_bits(trained, model.weight.detach())


def test_zero_stays_zero():
    """A weight that is exactly zero has the level zero."""
    torch.manual_seed(0)
    weight = torch.randn(4, 80)
    weight[:, ::3] = 0
    model = Holder({"weight": weight})
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    assert not quantizer.detach(quantized=True).weight[:, ::3].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged(value):
    """A weight that is not finite is an error that names the tensor."""
    model, quantizer = _attached(4, 80)
    with torch.no_grad():
        model.weight[1, 2] = value
    with pytest.raises(diffq.WeightError, match="weights of weight must be finite"):
        quantizer.compressed_model_size()


# The gradient of steps.


def test_gradient_of_steps():
    """A step has the gradient of w + s * e, with the rounding error e held constant."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 8, requires_grad=True), torch.randn(13, requires_grad=True)]
    flat = Flat([w.shape for w in weights], 8)
    learned = (torch.randn(5) - 1).requires_grad_()
    steps = steps_of(numbers_of(learned))
    per_weight = [steps[:3].repeat_interleave(8).view(3, 8), steps[3:].repeat_interleave(8)[:13]]
    each = list(zip(weights, per_weight, strict=True))
    values = [((w / s).round() * s).detach() for w, s in each]
    upstream = [torch.randn_like(w) for w in weights]
    found = torch.autograd.grad(
        pass_steps(flat, learned, weights, values), [learned, *weights], upstream
    )
    errors = [(v - w).detach() * u for v, w, u in zip(values, weights, upstream, strict=True)]
    padded = torch.cat([errors[0].flatten(), errors[1], torch.zeros(3)]).view(5, 8)
    assert close(found[0], padded.sum(1) * math.log(2), SUMS)
    assert all(close(a, b) for a, b in zip(found[1:], upstream, strict=True))


def test_second_derivative_of_steps():
    """`create_graph=True` differentiates w + s * e once more: d2/dl2 is log(2) times the first."""
    torch.manual_seed(0)
    weight = torch.randn(2, 64, requires_grad=True)
    learned = torch.tensor([-1.0, -2.0], requires_grad=True)
    steps = steps_of(numbers_of(learned))[:, None]
    value = ((weight / steps).round() * steps).detach()
    (out,) = pass_steps(Flat([weight.shape], 64), learned, [weight], [value])
    (first,) = torch.autograd.grad(out.sum(), learned, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), learned)
    assert close(second, first.detach() * math.log(2), SUMS)


# The size.


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(-4, 6), st.integers(1, 4), st.integers(1, 90))
def test_size_is_the_entropy_of_the_levels(seed, octaves, rows, width):
    """The size of one tensor is the zeroth-order entropy of its levels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    steps = torch.full((rows,), 2.0**octaves)
    levels = (weight / steps[:, None]).round()
    bits, _ = code_lengths(Flat([weight.shape], width), [weight], steps)
    signed = _entropy(levels.int().numpy())
    # Signs are one bit each, as they are in training's size: a tensor of few levels may need less.
    magnitudes = _entropy(levels.abs().int().numpy()) + int((levels != 0).sum())
    assert math.isclose(bits.item(), magnitudes, rel_tol=1e-4, abs_tol=1e-2)
    assert bits.item() >= signed - 1e-2


def test_slopes_are_those_of_interpolated_lengths():
    """The gradient is that of lengths interpolated between levels, with the histogram constant."""
    torch.manual_seed(0)
    weight = torch.randn(4, 500)
    learned = torch.tensor([-1.0, 0.25, 1.0, -2.0], requires_grad=True)
    steps = torch.exp2(learned)
    ratio = weight.abs() / steps[:, None]
    counts = torch.bincount(ratio.detach().round().long().flatten(), minlength=128).float() + 0.3
    lengths = -torch.log2(counts / counts.sum())
    lengths[1:] += 1
    lengths = lengths.cummax(0).values
    growth = torch.cat([lengths.diff().clamp(max=8), torch.ones(1)])
    below = ratio.detach().floor().long()
    (lengths[below] + growth[below] * (ratio - below)).sum().backward()
    _, slopes = code_lengths(Flat([weight.shape], 500), [weight], steps.detach())
    assert close(slopes, learned.grad, SUMS)


def test_size_of_many_tensors():
    """Tensors of a batch have the sizes and slopes that each has alone."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 64), torch.randn(100), torch.randn(64) * 9, torch.zeros(2, 64)]
    steps = torch.exp2(torch.randn(8))
    flat = Flat([w.shape for w in weights], 64)
    bits, slopes = code_lengths(flat, weights, steps)
    ends = [0, 3, 5, 6, 8]
    for index, weight in enumerate(weights):
        own = steps[ends[index] : ends[index + 1]]
        alone = code_lengths(Flat([weight.shape], 64), [weight], own)
        assert close(bits[index : index + 1], alone.bits, SUMS)
        assert close(slopes[ends[index] : ends[index + 1]], alone.slopes, SUMS)


def test_sizes_agree():
    """The size in training, the stored size and the file agree, also below one bit a weight."""
    for octaves in (0.0, 2.0, 4.0):
        model, quantizer = _attached(300, 300)
        with torch.no_grad():
            model._diffq.learned.add_(octaves)
        learned, stored = quantizer.model_size().item(), quantizer.true_model_size()
        assert math.isclose(learned, stored, rel_tol=0.02, abs_tol=4e-4)
        assert 0.97 * stored < quantizer.compressed_model_size() < 1.03 * stored + 4e-4
        assert math.isclose(stored * 2**23, quantizer.mean_bits() * 90_000, rel_tol=0.02) or octaves


def test_price_moves_steps_alone():
    """The size has a gradient for steps, and none for weights; larger steps take fewer bits."""
    model, quantizer = _attached(4, 100)
    with quantizer.computing():
        model.weight.sum().backward()
    model.zero_grad()
    quantizer.model_size().backward()
    assert model.weight.grad is None
    assert (model._diffq.learned.grad < 0).all()


def test_size_without_noise_has_no_gradient():
    """The steps of a tensor that no training forward read get no gradient of the size."""
    torch.manual_seed(0)
    model = Holder({name: torch.randn(2, 100) for name in ("read", "unread")})
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    with quantizer.computing():
        model.read.sum().backward()
    model.zero_grad()
    quantizer.model_size().backward()
    assert (model._diffq.learned.grad != 0).tolist() == [True, True, False, False]


# Training to a size.


def _trained(model, steps=80, **plan):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    quantizer.setup_optimizer(optimizer, steps=steps, **plan)
    for index in range(steps):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        (model.train()(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
    return quantizer


def _net():
    return nn.Sequential(nn.Linear(24, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU())


@pytest.mark.parametrize("bits", [0.5, 2.0])
def test_less_than_a_bit_a_weight(bits):
    """A plan reaches sizes that no bitwidth can, and fixes the steps at them."""
    model = seeded(_net)
    weights = sum(p.numel() for p in model.parameters())
    target = (bits * weights / 8 + 1500) / 2**20
    quantizer = _trained(model, target_mb=target)
    assert 0.99 * target <= quantizer.compressed_model_size() <= target
    assert quantizer.mean_bits() < bits + 0.6
    before = model._diffq.learned.detach().clone()
    assert same_bits(before * 4, (before * 4).round())
    model(torch.randn(4, 24)).sum().backward()
    assert model._diffq.learned.grad is None or not model._diffq.learned.grad.any()


def test_steps_begin_with_trained_weights():
    """At the end of the float phase, steps are those of the weights as they are."""
    model = seeded(_net)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    quantizer.setup_optimizer(optimizer, steps=20, target_mb=0.012, float_share=0.5, lr=0.0)
    with torch.no_grad():
        model[0].weight.mul_(64)
    first = model._diffq.learned.detach().clone()
    for _ in range(10):
        model(torch.randn(4, 24)).sum().backward()
        optimizer.step()
    rows = quantizer._attachment.learned.spans[0][1].numel()
    assert close(model._diffq.learned.detach()[:rows], first[:rows] + 6)


def test_least_size():
    """A target below what zeros take is an error that names the least size."""
    model = seeded(_net)
    with pytest.raises(diffq.ConfigError, match="target_mb must be at least"):
        _trained(model, target_mb=0.0001)


def test_frozen_model_computes(tmp_path):
    """A model at 0.6 bits a weight computes from its file what it computed in training's eval."""
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 8)))
    quantizer = diffq.EntropyQuantizer(model, min_size=0, init_bits=1)
    path = tmp_path / "model.diffq"
    diffq.save(quantizer, path)
    fresh = nn.Sequential(nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 8))
    diffq.load(path, fresh)
    expected = quantizer.detach(quantized=True)
    assert all(
        same_bits(a.detach(), b.detach())
        for a, b in zip(fresh.parameters(), expected.parameters(), strict=True)
    )
    x = x16()
    assert close(fresh(x).detach(), expected(x).detach())


# Weights at the ends of what levels hold.


@pytest.mark.parametrize("keep", [0.1, 0.001])
def test_sparse_weights_start_unclipped(keep):
    """The first steps are coarse enough for the largest weight, whatever the mean magnitude."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * (torch.rand(64, 256) < keep)
    model = Holder({"weight": weight.clone()})
    value = diffq.EntropyQuantizer(model, min_size=0, init_bits=12).detach(quantized=True).weight
    assert (value - weight).abs().max() < 0.01 * weight.abs().max()


@pytest.mark.parametrize("keep", [0.1, 1.0])
def test_target_above_what_weights_take(keep):
    """A file of more bytes than the weights can take is as fine as it gets: no weight clips."""
    model = seeded(_net)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) < keep)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    quantizer.setup_optimizer(optimizer, steps=20, target_mb=0.2, float_share=0.5, lr=0.0)
    for _ in range(20):
        model(torch.randn(4, 24)).sum().backward()
        optimizer.step()
    plain = {
        name: p.detach().clone() for name, p in model.named_parameters() if "_diffq" not in name
    }
    quantized = dict(quantizer.detach(quantized=True).named_parameters())
    for name, weight in plain.items():
        error = (quantized[name].detach() - weight).abs().max()
        assert error <= 1e-3 * weight.abs().max()


@pytest.mark.parametrize("lam", [None, 1.0])
def test_steps_that_diverged(lam):
    """After a loss that was not finite, training goes on, and eval names the tensor."""
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 32)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    quantizer.setup_optimizer(optimizer, lam=lam)
    for factor in (float("nan"), 1.0):
        optimizer.zero_grad()
        (model(torch.randn(4, 16)).sum() * factor).backward()
        optimizer.step()
    with pytest.raises(diffq.WeightError, match=r"0\.(weight|bias)"):
        model.eval()(torch.randn(4, 16))


def test_zeros_count():
    """A tensor of zeros is in the mean and in the metrics, with next to no bits."""
    torch.manual_seed(0)
    model = Holder({"noise": torch.randn(64, 64), "zeros": torch.zeros(640, 64)})
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    assert quantizer.mean_bits() < 0.5
    assert quantizer.metrics()["diffq/bits/zeros"] < 0.01


def test_levels_are_measured_once_a_step(monkeypatch):
    """A step that reads the size and adds its price measures levels once; else none does."""
    counts, real = [], SteppedBatch.code_lengths

    def counted(batch, *args):
        counts[-1] += len(batch.quantizers)
        return real(batch, *args)

    monkeypatch.setattr(SteppedBatch, "code_lengths", counted)
    model = seeded(_net)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    quantizer = diffq.EntropyQuantizer(model, min_size=0)
    counts.append(0)
    quantizer.setup_optimizer(optimizer, steps=40, target_mb=0.012, float_share=0.25)
    for _ in range(38):
        model(torch.randn(4, 24)).square().sum().backward()
        counts.append(0)
        optimizer.step()
    tensors = len(list(model.parameters())) - 1
    # Steps 10 to 37 have a price, then the steps are fixed.
    assert set(counts[12:38]) == {tensors}
    model(torch.randn(4, 24)).square().sum().backward()
    counts.append(0)
    optimizer.step()
    assert counts[-1] == 0
