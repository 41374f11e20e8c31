"""Autocast, gradient scaling, and models cast to another dtype."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import diffq
from diffq import errors
from diffq.attach.plan import Rules
from diffq.ptq.budget import quantize_to_size
from diffq.ptq.state import Settings, quantize_state
from tests.compare import same_bits
from tests.holder import weight_quantizers
from tests.models import (
    QUANTIZERS,
    attached,
    computed,
    computed_weight,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    snapshot_of,
    step,
)

# Autocast and gradient scaling


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_autocast(kind):
    """Under bf16 autocast the master weights stay float32, train, and evaluate as restored."""
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    inputs = torch.randn(4, 16)
    before = snapshot_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
            loss = outputs.float().square().mean() + quantizer.model_size()
        assert outputs.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
    after = snapshot_of(model)
    changed = [name for name in before if not same_bits(before[name], after[name])]
    assert changed == [name for name, _ in model.named_parameters()]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert evaluate_alike(model, restored(mlp, quantizer), inputs)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "lsq"])
def test_size_under_autocast(kind):
    """model_size() is the same float32 number under autocast."""
    _, quantizer = attached(mlp, kind)
    size = quantizer.model_size()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(quantizer.model_size(), size)


def test_skipped_steps_change_nothing():
    """A step that GradScaler skips for an infinite gradient changes no weight, bit or moment."""
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    inputs = torch.randn(4, 16)

    def _step(factor):
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * factor + quantizer.model_size()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    _step(1.0)
    before, bits = snapshot_of(model), quantizer.bits()
    moments = [m.clone() for s in optimizer.state.values() for m in s.values()]
    _step(float("inf"))
    assert same_bits(snapshot_of(model), before)
    assert all(same_bits(bits[name], widths) for name, widths in quantizer.bits().items())
    after = [m for s in optimizer.state.values() for m in s.values()]
    assert all(same_bits(a, b) for a, b in zip(moments, after, strict=True))
    _step(1.0)
    assert not same_bits(snapshot_of(model), before)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_skipped_steps_leave_evaluation(kind):
    """Weights in eval, bits and sizes are the same after a skipped step, and follow the next.

    The weights of eval are cached: neither may a skipped step spoil them, nor a real one
    leave them behind.
    """
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    inputs = torch.randn(4, 16)

    def _step_and_look(factor):
        optimizer.zero_grad()
        loss = model.train()(inputs).square().mean() * factor + quantizer.model_size()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert evaluate_alike(model, restored(mlp, quantizer), inputs)
        return computed(model), quantizer.bits(), quantizer.true_model_size()

    first, skipped, second = (_step_and_look(factor) for factor in (1.0, float("inf"), 1.0))
    assert scaler.get_scale() == 4.0
    assert same_bits(first, skipped)
    assert not same_bits(second[0], skipped[0])


# Casts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_cast_after_attaching(kind, dtype):
    """A model cast after attaching trains in its dtype, and eval equals the restored model."""
    model = seeded(mlp)
    inputs = torch.randn(5, 16, dtype=dtype)
    quantizer = QUANTIZERS[kind](model)
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, inputs, quantizer)
    assert model(inputs).dtype == dtype
    assert model[0].weight.dtype == dtype
    assert evaluate_alike(model, restored(lambda: mlp().to(dtype), quantizer), inputs)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "lsq"])
def test_extras_stay_in_float32(kind, cast):
    """A cast of the model leaves what is learned in float32, bit for bit, and it still learns."""
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=1e-3)
    before = {name: q.learned.clone() for name, q in weight_quantizers(model).items()}
    getattr(model, cast)()
    kept = {name: q.learned for name, q in weight_quantizers(model).items()}
    assert same_bits(kept, before)
    assert {p.dtype for p in quantizer.learned_parameters()} == {torch.float32}
    inputs = torch.randn(5, 16).to(model[0].weight)
    step(model, optimizer, inputs, quantizer)
    # Steps as small as these are lost on logits or scales in half precision.
    assert not any(same_bits(kept[name], part) for name, part in before.items())


def test_extras_follow_the_device():
    """A move with a cast moves what is learned, and casts the weights alone."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    model.to("meta", torch.bfloat16)
    (extras,) = quantizer.learned_parameters()
    assert (model[0].weight.device.type, model[0].weight.dtype) == ("meta", torch.bfloat16)
    assert (extras.device.type, extras.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [diffq.DiffQuantizer, diffq.QATQuantizer, diffq.LSQQuantizer])
def test_cast_keeps_every_bitwidth_exact(make, dtype):
    """At each bitwidth, a model cast after attaching evaluates to what is stored, bit for bit."""
    wrong = []
    for bits in range(2 if make is diffq.LSQQuantizer else 1, 16):
        model = seeded(lambda: nn.Linear(64, 32))
        quantizer = make(model, bits=bits, min_size=0)
        model.to(dtype).eval()
        try:
            fresh = restored(lambda: nn.Linear(64, 32, dtype=dtype), quantizer)
            exact = same_bits(computed_weight(model, "weight").detach(), fresh.weight.detach())
        except diffq.DiffqError:
            exact = False
        wrong += [] if exact else [bits]
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_cast_before_attaching(kind, dtype):
    """A model in another dtype trains in it, and eval equals the restored model."""
    make = lambda: mlp().to(dtype)  # noqa: E731
    model, inputs = seeded(make), torch.randn(5, 16, dtype=dtype)
    quantizer = QUANTIZERS[kind](model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, inputs, quantizer)
    assert model(inputs).dtype == dtype
    assert evaluate_alike(model, restored(make, quantizer), inputs)


def test_sizes_follow_a_cast():
    """After a cast, the sizes count tensors without levels at their new width."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["bias"])
    before = quantizer.true_model_size()
    model.half()
    assert round((before - quantizer.true_model_size()) * 2**23) == 40 * 16
    assert round((before - quantizer.model_size().item()) * 2**23) == 40 * 16


def test_cast_after_evaluation_is_noticed():
    """A cast after an evaluation gives weights of the new dtype."""
    model, inputs = mlp().eval(), torch.randn(2, 16)
    diffq.QATQuantizer(model, min_size=0)
    model(inputs)
    assert model.double()(inputs.double()).dtype == torch.float64


# Weights near the ends of a half type

LARGE = {
    "gaussian": partial(diffq.DiffQuantizer, group_size=4),
    "uniform": partial(diffq.DiffQuantizer, group_size=5, noise="uniform"),
    "rounding": partial(diffq.DiffQuantizer, group_size=4, noise="rounding", init_bits=3),
    "qat-1": partial(diffq.QATQuantizer, bits=1),
    "qat-2": partial(diffq.QATQuantizer, bits=2),
    "qat-8": partial(diffq.QATQuantizer, bits=8),
    "qat-channel": partial(diffq.QATQuantizer, bits=3, per_channel=True),
    "quant-noise-fit": partial(diffq.QuantNoiseQuantizer, bits=3, observer="histogram"),
    "lsq-2": partial(diffq.LSQQuantizer, bits=2),
    "lsq-4": partial(diffq.LSQQuantizer, bits=4),
}


def near_the_ends(zeros, seed):
    """A float16 layer with weights at and near the largest magnitudes, and maybe some zeros."""
    model = seeded(partial(nn.Linear, 4, 4, bias=False), seed).half()
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 4) * 50000).clamp_(-65504, 65504)
        model.weight[0] = torch.tensor([-65504, 0 if zeros else 3, 60000, 1])
    return model


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", LARGE)
def test_float16_weights_stay_finite(kind, zeros, tmp_path):
    """No level stands for more than float16 holds: in training, eval, state and file."""
    for seed in range(10):
        model = near_the_ends(zeros, seed)
        quantizer = LARGE[kind](model, min_size=0)
        quantizer.no_optimizer()
        assert computed_weight(model, "weight").isfinite().all()
        weight = computed_weight(model.eval(), "weight").detach().clone()
        assert weight.isfinite().all()
        assert (weight[0, 1] == 0) or not zeros
        (record,) = quantizer.snapshot().records.values()
        assert same_bits(torch.from_numpy(record.values()).half(), weight)
        diffq.save(quantizer, tmp_path / "model.diffq")
        make = partial(near_the_ends, zeros, seed + 1)
        assert same_bits(diffq.load(tmp_path / "model.diffq", make()).weight.detach(), weight)
        assert same_bits(restored(make, quantizer).weight.detach(), weight)


@pytest.mark.parametrize("options", [{}, {"group_size": 5}, {"per_channel": True}])
def test_float16_state_dicts_stay_finite(options):
    """Post-training quantization chooses no level that float16 cannot hold."""
    settings = Settings(rules=Rules(min_size=0), **options)
    for seed in range(10):
        state = near_the_ends(True, seed).state_dict()
        fitted = quantize_to_size(state, 400, settings).snapshot
        for snapshot in (fitted, *(quantize_state(state, bits, settings) for bits in range(1, 9))):
            assert np.abs(snapshot.records["weight"].values()).max() < 65520


# Weights near the ends of float32

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("bits", [2, 3, 8, 15])
@pytest.mark.parametrize("size", [1.0, 1e30, 1e37, 1e38, 3.3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_large_weights(dtype, size, bits):
    """LSQ starts at 2 * mean|w| / sqrt(highest level), or at the largest scale if that is less."""
    model = seeded(partial(nn.Linear, 64, 64, bias=False)).to(dtype)
    with torch.no_grad():
        model.weight.uniform_(-1, 1).mul_(size)
    weight = model.weight.detach().double()
    quantizer = diffq.LSQQuantizer(model, bits=bits, min_size=0)
    quantizer.no_optimizer()
    scale = weight_quantizers(model)["weight"].scale.item()
    wanted = 2 * weight.abs().mean().item() / (2 ** (bits - 1) - 1) ** 0.5
    most = float(np.finfo(np.float32).max) / 2 ** (bits - 1)
    assert scale == pytest.approx(min(wanted, most), rel=1e-4)
    for training in (True, False):
        values = computed_weight(model.train(training), "weight").detach()
        assert values.isfinite().all()
        inside = weight.abs() <= scale * (2 ** (bits - 1) - 1)
        rounding = 2 * torch.finfo(dtype).eps * weight.abs()
        error = (values.double() - weight).abs() - rounding
        assert (error[inside] <= scale * (0.5 + 1e-4)).all()
    (record,) = quantizer.snapshot().records.values()
    assert same_bits(torch.from_numpy(record.values()).to(dtype), values)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_weights_that_no_grid_holds(kind):
    """Attaching refuses weights that no stored grid could hold, and changes nothing."""
    wide = torch.tensor([[-3e38, 3e38], [0.0, 1.0]])
    huge = torch.tensor([[1e300, 1.0], [0.0, 1.0]], dtype=torch.float64)
    for weight in (huge,) if kind == "lsq" else (wide, huge):
        model = nn.Linear(2, 2, bias=False, dtype=weight.dtype)
        model.weight.data.copy_(weight)
        with pytest.raises(errors.WeightError, match=r"of weight must be finite"):
            QUANTIZERS[kind](model, min_size=0)
        assert same_bits(model.weight.detach(), weight)
        assert type(model) is nn.Linear
        with pytest.raises(errors.AttachError, match="has no quantizer"):
            diffq.quantizer_of(model)
