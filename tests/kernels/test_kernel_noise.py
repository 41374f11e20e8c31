"""Noise kernels: Equation 6 and its gradients, against the library's functions."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.compare import same_bits
from tests.kernels import backend

DEVICE = backend.device()

from diffq.kernels.noisy import Noisy  # noqa: E402
from diffq.numerics.flat import Flat  # noqa: E402
from diffq.numerics.grid import BitsLaw  # noqa: E402
from diffq.numerics.noise import Drawn, pass_noise  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["gaussian", "uniform", "rounding"]


class Batch:
    """Random tensors with their kernels, and what torch's operations make of them.

    Args:
        numels: sizes of the tensors.
        group_size: None if each tensor is one group.
        kind: of noise.
        dtype: of the weights.
        learned: whether bitwidths are learned.
    """

    def __init__(self, numels, group_size, kind, dtype=torch.float32, learned=True):
        self.law = BitsLaw(2, 8, kind == "rounding")
        law = self.law if learned else None
        self.sizes = [min(group_size or n, n) for n in numels]
        self.counts = [-(-n // size) for n, size in zip(numels, self.sizes, strict=True)]
        self.weights = [torch.randn(n, device=DEVICE).mul_(0.1).to(dtype) for n in numels]
        self.logits = torch.randn(sum(self.counts), device=DEVICE)
        self.given = self.logits if learned else self.law.bits(self.logits)
        rule = group_size, law, kind, 0.5
        self.noisy = Noisy([(n,) for n in numels], *rule, dtype, DEVICE)
        # Noise does not depend on the dtype, so float32 shows it before it is rounded.
        self.wide = Noisy([(n,) for n in numels], *rule, torch.float32, DEVICE)
        self.learned, self.group_size = learned, group_size

    def sample(self, **options):
        """What the kernels sample from one seed, and the same in float32."""
        torch.manual_seed(1)
        sampled = self.noisy.sample(self.weights, self.given, **options)
        torch.manual_seed(1)
        weights = [w.float() for w in self.weights]
        return sampled, self.wide.sample(weights, self.given, zeros=options.get("zeros")).values

    def gradients(self, values, grads):
        """Those of weights and logits by `pass_noise` in float64, from the values."""
        weights = [w.double().requires_grad_() for w in self.weights]
        logits = self.logits.double().requires_grad_()
        flat, values = (
            Flat([w.shape for w in weights], self.group_size),
            [v.double() for v in values],
        )
        drawn = Drawn.of(flat, weights, values)
        noisy = pass_noise(drawn, self.law, logits if self.learned else None, weights, values)
        used = [(n, g.double()) for n, g in zip(noisy, grads, strict=True) if g is not None]
        torch.autograd.backward(*zip(*used, strict=True))
        return [w.grad for w in weights], logits.grad


@settings(max_examples=6, phases=[Phase.generate])
@given(
    numels=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    group_size=st.sampled_from([None, 1, 3, 8, 12, 64]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    learned=st.booleans(),
)
def test_gradients(numels, group_size, kind, dtype, learned):
    """Gradients of weights, ranges and logits are those of `PseudoNoise`, rounded once."""
    batch = Batch(numels, group_size, kind, dtype, learned)
    sampled, wide = batch.sample()
    grads = [torch.randn(n, device=DEVICE).to(dtype) for n in numels]
    values = sampled.values if kind == "rounding" else wide
    weights, logits = batch.gradients(values, grads)
    found, for_logits = batch.noisy.gradients(sampled.state, batch.weights, batch.given, grads)
    for one, other in zip(found, weights, strict=True):
        assert one.dtype == dtype
        backend.gradients_close(one, other, dtype)
    assert (for_logits is not None) == learned
    if learned:
        backend.gradients_close(for_logits, logits, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_large_tensors(kind):
    """Sums over many programs are right, with the first of two equal extremes."""
    batch = Batch([10000, 4], None, kind)
    batch.weights[0][[50, 9000, 60, 9001]] = torch.tensor([1.0, 1.0, -1.0, -1.0], device=DEVICE)
    sampled, wide = batch.sample()
    grads = [torch.ones_like(w) for w in batch.weights]
    weights, logits = batch.gradients(wide, grads)
    found, for_logits = batch.noisy.gradients(sampled.state, batch.weights, batch.given, grads)
    backend.gradients_close(found[0], weights[0], torch.float32)
    assert (found[0] != 1).nonzero().flatten().tolist() == [50, 60]
    backend.gradients_close(for_logits, logits, torch.float32)


def test_values_not_used():
    """A value without a gradient gives its weight none, and its logits zeros."""
    batch = Batch([40, 24], 8, "gaussian")
    sampled, wide = batch.sample()
    grads = [torch.randn(40, device=DEVICE), None]
    weights, logits = batch.gradients(wide, grads)
    inputs = sampled.state, batch.weights, batch.given, grads
    found, for_logits = batch.noisy.gradients(*inputs)
    assert found[1] is None
    backend.gradients_close(found[0], weights[0], torch.float32)
    backend.gradients_close(for_logits, logits, torch.float32)
    none = sampled.state, batch.weights, batch.given, [None, None]
    assert not batch.noisy.gradients(*none)[1].any()


@pytest.mark.parametrize(
    ("kind", "dtype"), [*zip(KINDS, DTYPES, strict=True), ("rounding", torch.float32)]
)
def test_zeros(kind, dtype):
    """Zeros stay where they are to stay, and give no gradient to logits; others get noise."""
    batch = Batch([64, 64], 8, kind, dtype)
    for weight in batch.weights:
        weight[8:24] = 0
    sampled, wide = batch.sample(zeros=[True, False])
    assert (sampled.values[0][8:24] == 0).all()
    assert (sampled.values[1][8:24] != 0).any()
    grads = [torch.randn(64, device=DEVICE).to(dtype) for _ in range(2)]
    _, logits = batch.gradients(sampled.values if kind == "rounding" else wide, grads)
    _, found = batch.noisy.gradients(sampled.state, batch.weights, batch.given, grads)
    backend.gradients_close(found, logits, torch.float32)
    assert (found[1:3] == 0).all()


def test_float16_stays_finite():
    """Noise that would leave float16 ends at its largest number, and gradients know."""
    batch = Batch([200], 8, "gaussian", torch.float16)
    batch.weights[0].copy_(torch.linspace(-65504, 65504, 200))
    batch.given.fill_(-9.0)
    sampled, wide = batch.sample()
    value = sampled.values[0]
    assert value.isfinite().all()
    assert (value.abs() == 65504).any()
    grad = torch.randn(200, device=DEVICE).half()
    _, logits = batch.gradients([wide[0].clamp(-65504, 65504)], [grad])
    _, found = batch.noisy.gradients(sampled.state, batch.weights, batch.given, [grad])
    backend.gradients_close(found, logits, torch.float32)


def test_nan_and_constants():
    """One NaN makes a tensor NaN; a constant tensor gets no noise and no gradient of a range."""
    batch = Batch([40, 40, 40], 8, "gaussian")
    batch.weights[0][3] = torch.nan
    batch.weights[1].fill_(0.25)
    sampled, _ = batch.sample()
    assert sampled.values[0].isnan().all()
    assert same_bits(sampled.values[1], batch.weights[1])
    assert sampled.values[2].isfinite().all()
    grads = [torch.randn(40, device=DEVICE) for _ in range(3)]
    found, for_logits = batch.noisy.gradients(sampled.state, batch.weights, batch.given, grads)
    assert same_bits(found[1], grads[1])
    assert (for_logits[5:10] == 0).all()


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise(kind):
    """Unit noise has its distribution, is independent, and is drawn by torch's generator."""
    count = 16384
    noisy = Noisy([(count,)], None, None, kind, 0.5, torch.float32, DEVICE)
    weight = torch.linspace(-1, 1, count, device=DEVICE)
    bits = torch.ones(1, device=DEVICE)  # of the step 2
    first, again = (
        (torch.manual_seed(5), noisy.sample([weight], bits).values[0] - weight)[1] for _ in range(2)
    )
    other = noisy.sample([weight], bits).values[0] - weight
    assert same_bits(first, again)
    deviation = 1.0 if kind == "gaussian" else 3**-0.5
    unit = torch.stack([first, other]).double() / deviation
    limit = 5 / count**0.5
    assert unit.mean(1).abs().max() < limit
    assert (unit.square().mean(1) - 1).abs().max() < 1.5 * limit
    fourth = 3.0 if kind == "gaussian" else 1.8
    assert (unit.pow(4).mean(1) - fourth).abs().max() < 10 * limit
    assert (unit[0] * unit[1]).mean().abs() < limit
    for lag in (1, 64, 1024, 4096):
        assert (unit[0, lag:] * unit[0, :-lag]).mean().abs() < 2 * limit


def test_weights_that_moved():
    """Between forward and backward weights may move, as with a swapped storage."""
    batch = Batch([64, 40], 8, "rounding")
    sampled, _ = batch.sample()
    grads = [torch.randn(n, device=DEVICE) for n in (64, 40)]
    inputs = batch.given, grads
    found, logits = batch.noisy.gradients(sampled.state, batch.weights, *inputs)
    moved = [torch.cat([w[:1], w])[1:] for w in batch.weights]
    again, same = batch.noisy.gradients(sampled.state, moved, *inputs)
    assert same_bits([*found, logits], [*again, same])
