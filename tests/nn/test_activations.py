"""ActivationQuantizer: calibration, emulation, noise, states, files, detaching."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffq
from diffq.errors import AttachError, CalibrationError, ConfigError, MismatchError
from diffq.nn.activations import fake_quantize
from diffq.numerics.ranges import keep_zero
from tests.compare import close, same_bits
from tests.models import MODELS, QUANTIZERS, SUMS, ConvNet, computed, mlp, seeded, snapshot_of, step

OBSERVERS = ["min-max", "histogram", "channel"]

#: How close outputs are where the rounding of one hidden value falls to the other side.
A_LEVEL = 2**18


def _calibrated(model, inputs, **options):
    activations = diffq.ActivationQuantizer(model, **options)
    with activations.calibrate():
        model(inputs)
    return activations


def _observed_inputs(model, x):
    """The input that each linear or convolutional layer gets, by name, through plain hooks."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            keep = partial(lambda name, _, args: seen.setdefault(name, args[0]), name)
            handles.append(module.register_forward_pre_hook(keep))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def _evaluate_alike(one, other, x):
    """Whether two models have the same weights and ranges, and round what they are given alike."""
    seen = [_observed_inputs(model.eval(), x)["0"] for model in (one, other)]
    same = same_bits(computed(one), computed(other)) and same_bits(*seen)
    return same and not same_bits(seen[0], x) and close(one(x), other(x), A_LEVEL)


# The grid


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2), elements=st.floats(-100, 100, width=32)),
    st.floats(-50, 0, width=32),
    st.floats(0, 50, width=32),
    st.integers(1, 8),
)
def test_fake_quantize_is_the_nearest_level(values, low, high, bits):
    """Within the range the error is at most half a step, outside the ends; zero stays zero."""
    ends = keep_zero(torch.tensor([low]), torch.tensor([high]), torch.tensor([float(bits)]))
    x = torch.from_numpy(values)
    result = fake_quantize(x, *ends, bits).double()
    step = (ends[1] - ends[0]).double() / (2**bits - 1)
    inside = x.double().clamp(ends[0], ends[1])
    assert ((result - inside).abs() <= step / 2 * (1 + 1e-5)).all()
    assert len(result.unique()) <= 2**bits
    assert fake_quantize(torch.zeros(3), *ends, bits).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fake_quantize_keeps_the_dtype(dtype):
    """Every floating dtype comes back as itself, NaN as NaN."""
    x = torch.tensor([0.3, torch.nan, 9.0], dtype=dtype)
    result = fake_quantize(x, torch.tensor([-1.0]), torch.tensor([1.0]), 8)
    assert result.dtype == dtype
    assert result.isnan().tolist() == [False, True, False]
    assert result[2] == 1


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("low", [-20000.0, -65504.0, -100.0, 0.0, -1e6])
def test_fake_quantize_is_finite_in_float16(low, bits):
    """Where a grid reaches beyond float16, it ends at the last level that is finite."""
    ends = keep_zero(torch.tensor([low]), torch.tensor([65504.0]), torch.tensor([float(bits)]))
    x = torch.linspace(-65504, 65504, 1001).half()
    wide, result = (fake_quantize(values, *ends, bits) for values in (x.float(), x))
    fits = wide.half().isfinite()
    assert same_bits(result[fits], wide.half()[fits])
    step = (ends[1] - ends[0]) / (2**bits - 1)
    last = torch.floor(65519.9 / step) * step
    assert same_bits(result[~fits], (wide[~fits].sign() * last).half() + 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_stops_at_the_ends(dtype):
    """The gradient is unchanged within the range, its ends included, and zero outside."""
    x = torch.tensor([-2.0, -1.0, 0.2, 1.0, 1.1, -torch.inf], dtype=dtype, requires_grad=True)
    grad = torch.tensor([3.0, 5.0, 7.0, -11.0, 13.0, 17.0], dtype=dtype)
    fake_quantize(x, torch.tensor([-1.0]), torch.tensor([1.0]), 4).backward(grad)
    assert close(x.grad, torch.tensor([0, 5, 7, -11, 0, 0], dtype=dtype))


def test_gradient_stops_at_the_ends_of_each_channel():
    """Each channel's own range says where its gradient passes; an empty range is one point."""
    x = torch.tensor([[0.0, 0.0, 0.5], [2.0, 0.1, 0.5], [3.0, -0.1, 0.6]], requires_grad=True)
    low, high = torch.tensor([[0.0], [0.0], [0.5]]), torch.tensor([[2.0], [0.0], [0.5]])
    fake_quantize(x, low.T, high.T, 8).sum().backward()
    assert close(x.grad, torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 0]]))


# Calibration


@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_come_from_the_inputs(observer):
    """Ranges are the minimum and maximum of all batches, per channel or not, with zero in them."""
    model = seeded(ConvNet).eval()
    batches = torch.randn(3, 4, 3, 8, 8) + 0.3
    seen = _observed_inputs(model, batches.flatten(0, 1))
    activations = diffq.ActivationQuantizer(model, observer=observer)
    with activations.calibrate():
        for batch in batches:
            model(batch)
    ranges = activations.ranges()
    assert list(ranges) == ["down", "up", "head"]
    for name, x in seen.items():
        rows = x.movedim(1, 0).flatten(1) if observer == "channel" else x.reshape(1, -1)
        full = torch.stack([rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)])
        step = (full[1] - full[0]).max() / 255
        if observer == "histogram":
            assert (ranges[name][0] >= full[0] - step).all()
            assert (ranges[name][1] <= full[1] + step).all()
        else:
            assert ((ranges[name] - full).abs() <= step).all()


def test_histogram_has_less_error():
    """With rare large inputs, the fitted range gives less squared error than min-max."""
    layer = nn.Linear(64, 4)
    x = torch.randn(256, 64)
    x[0, 0] = 20.0
    errors = {}
    for observer in ("min-max", "histogram"):
        activations = _calibrated(layer, x, bits=4, observer=observer)
        low, high = activations.ranges()[""]
        errors[observer] = (fake_quantize(x, low, high, 4) - x).square().sum()
        activations.detach()
    assert errors["histogram"] < errors["min-max"] / 2


def test_calibrating_again_replaces_the_ranges():
    """Ranges are those of the last calibration alone; layers that it does not reach keep theirs."""
    model = mlp().eval()
    activations = _calibrated(model, 100 * torch.randn(5, 16))
    before = activations.ranges()
    with activations.calibrate():
        model[0](torch.randn(5, 16))
    after = activations.ranges()
    assert after["0"][1] < before["0"][1] / 10
    assert same_bits(after["2"], before["2"])


def test_failed_calibration_changes_nothing():
    """If the block raises, or numbers are not finite, all ranges stay and eval goes on."""
    model = mlp().eval()
    x = torch.randn(5, 16)
    activations = _calibrated(model, x)
    before, output = activations.ranges(), model(x)
    with pytest.raises(RuntimeError, match="shapes"), activations.calibrate():
        model(torch.randn(5, 16) * 9), model(torch.randn(5, 17))
    with pytest.raises(CalibrationError, match="input of 0 holds NaN"), activations.calibrate():
        model(x * torch.nan)
    assert same_bits(activations.ranges(), before)
    assert close(model(x), output, A_LEVEL)


def test_calibration_needs_data():
    """A block in which no layer runs, or only on empty batches, is an error."""
    model = mlp().eval()
    activations = diffq.ActivationQuantizer(model)
    with pytest.raises(CalibrationError, match="no layer saw any"), activations.calibrate():
        pass
    with pytest.raises(CalibrationError, match="no layer saw any"), activations.calibrate():
        model(torch.randn(0, 16))


def test_evaluation_needs_calibration():
    """Evaluating before is an error that names the layer and shows what to do."""
    model = mlp()
    diffq.ActivationQuantizer(model)
    model(torch.randn(2, 16))
    with pytest.raises(CalibrationError, match=r"input of 0 has no range.*\n.*calibrate") as error:
        model.eval()(torch.randn(2, 16))
    assert isinstance(error.value, RuntimeError)


def test_noise_needs_calibration():
    """Training with noise before calibration is an error; without noise it is none."""
    model = mlp()
    diffq.ActivationQuantizer(model, p=0.5)
    with pytest.raises(CalibrationError, match="no range"):
        model(torch.randn(2, 16))


def test_calibration_computes_no_gradient_and_rounds_nothing():
    """In the block, outputs are those of the plain model, without a graph."""
    model = mlp().eval()
    x = torch.randn(5, 16)
    wanted = model(x)
    activations = _calibrated(model, x, bits=2)
    with activations.calibrate():
        output = model(x)
    assert close(output, wanted)
    assert not output.requires_grad


# Emulation


@pytest.mark.parametrize("observer", OBSERVERS)
def test_eval_rounds_the_inputs(observer):
    """Eval computes each layer on its input rounded to the fixed range."""
    model = mlp().eval()
    x = torch.randn(50, 16)
    plain = copy.deepcopy(model)
    activations = _calibrated(model, x, bits=4, observer=observer)
    y = 2 * torch.randn(5, 16)
    first, second = activations.ranges().values()
    hidden = torch.relu(plain[0](fake_quantize(y, *first, 4)))
    assert close(model(y), plain[2](fake_quantize(hidden, *second, 4)))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("observer", OBSERVERS)
def test_all_models(name, observer):
    """Every kind of model evaluates near its plain self at 8 bits, and comes back on detach."""
    make, inputs = MODELS[name]
    model, x = make().eval(), inputs()
    before = snapshot_of(model)
    with torch.no_grad():
        plain = model(x)
        activations = _calibrated(model, x, observer=observer)
        output = model(x)
        # Eight bits: a quarter of a percent of the range at each layer.
        assert (output - plain).abs().max() < 0.1 * plain.abs().max()
        activations.detach()
        assert close(model(x), plain)
    assert same_bits(before, snapshot_of(model))


def test_attention_in_eval_is_emulated():
    """In a transformer encoder the linear layers are rounded: no fast path goes around them."""
    make, inputs = MODELS["encoder"]
    model, x = make().eval(), inputs()
    with torch.no_grad():
        plain = model(x)
        activations = _calibrated(model, x, bits=2)
        assert not any("out_proj" in name for name in activations.ranges())
        assert (model(x) - plain).abs().max() > 0.01


def test_inputs_by_keyword():
    """A layer that is called with `input=` is rounded like any other."""
    layer = nn.Linear(16, 4).eval()
    x = torch.randn(9, 16)
    _calibrated(layer, x, bits=2)
    assert close(layer(input=x), layer(x))


def test_unbatched_and_empty_inputs():
    """Per-channel ranges fit inputs without a batch dimension, and empty batches pass."""
    conv = nn.Conv2d(3, 4, 3).eval()
    x = torch.randn(2, 3, 8, 8)
    _calibrated(conv, x, observer="channel", bits=3)
    torch.testing.assert_close(conv(x[0]), conv(x)[0])
    layer = nn.Linear(16, 4).eval()
    _calibrated(layer, torch.randn(16), observer="channel")
    assert layer(torch.randn(0, 16)).shape == (0, 4)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_levels_fit_the_bits(bits):
    """No layer sees more than 2**bits different numbers, zero among them where ReLU made some."""
    model = mlp().eval()
    x = torch.randn(200, 16)
    activations = _calibrated(model, x, bits=bits)
    seen = []
    # Registered later, so it sees what the layer sees.
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    assert len(seen[0].unique()) <= 2**bits
    assert (seen[0] == 0).any()
    assert activations.ranges()["2"].shape == (2, 1)


# Training


def test_training_without_noise_is_plain():
    """With p=0, training steps are those of the plain model."""
    results = []
    for attach in (False, True):
        model = seeded(mlp)
        if attach:
            diffq.ActivationQuantizer(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(1)
        results.append([step(model, optimizer, torch.randn(5, 16)).item() for _ in range(3)])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_noise_rounds_a_share():
    """With p, about that share of the elements is rounded, anew in each forward."""
    layer = nn.Linear(64, 2)
    x = torch.randn(100, 64)
    _calibrated(layer, x, bits=3, p=0.25)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.eval()(x)
    layer.train()(x)
    layer(x)
    rounded, *noisy = seen
    for inputs in noisy:
        assert ((inputs == x) | (inputs == rounded)).all()
        # 6400 draws: the share is known to 0.0054.
        assert abs((inputs != x).double().mean() - 0.25) < 0.03
    assert not same_bits(*noisy)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_noise_under_checkpointing(use_reentrant):
    """Activation checkpointing replays the noise: gradients are those without it."""
    model = mlp()
    x = torch.randn(5, 16)
    _calibrated(model, x, bits=2, p=0.5)
    results = []
    for run in (model, partial(checkpoint, model, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        run(inputs).square().sum().backward()
        results.append([inputs.grad, *(p.grad.clone() for p in model.parameters())])
    assert close(*results, SUMS)


# With weight quantizers, states and files


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_with_every_weight_quantizer(name, tmp_path):
    """Weights and activations together: file and state give back both, and the same rounding."""
    model = mlp()
    activations = diffq.ActivationQuantizer(model, bits=6)
    quantizer = QUANTIZERS[name](model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, torch.randn(5, 16), quantizer)
    model.eval()
    x = torch.randn(5, 16)
    with activations.calibrate():
        model(x)
    diffq.save(quantizer, tmp_path / "model.diffq")
    fresh = mlp()
    diffq.ActivationQuantizer(fresh, bits=6)
    diffq.load(tmp_path / "model.diffq", fresh)
    assert _evaluate_alike(fresh, model, x)
    restored = mlp()
    diffq.ActivationQuantizer(restored, bits=6)
    diffq.restore_quantized_state(restored, quantizer.get_quantized_state())
    assert _evaluate_alike(restored, model, x)


def test_ranges_count():
    """The true size includes the ranges, at eight bytes for each."""
    plain = diffq.QATQuantizer(mlp(), min_size=0).true_model_size()
    model = mlp()
    diffq.ActivationQuantizer(model, observer="channel")
    size = diffq.QATQuantizer(model, min_size=0).true_model_size()
    assert (size - plain) * 2**20 == pytest.approx(8 * (16 + 32))


def test_files_need_the_activation_quantizer(tmp_path):
    """A plain model refuses a file with ranges and names them; without a model they are read."""
    model = mlp()
    _calibrated(model, torch.randn(5, 16))
    diffq.save(diffq.QATQuantizer(model, min_size=0), tmp_path / "model.diffq")
    with pytest.raises(MismatchError, match=r"not in the model: 0\.activation_range"):
        diffq.load(tmp_path / "model.diffq", mlp())
    loaded = diffq.load(tmp_path / "model.diffq")
    assert same_bits(loaded["0.activation_range"], model[0].activation_range)


def test_resume():
    """The state dict holds the ranges: a loaded model evaluates at once."""
    model, fresh = mlp().eval(), mlp().eval()
    x = torch.randn(5, 16)
    _calibrated(model, x, bits=3)
    diffq.ActivationQuantizer(fresh, bits=3)
    fresh.load_state_dict(model.state_dict())
    assert _evaluate_alike(fresh, model, x)


def test_uncalibrated_state_is_noticed():
    """Loading a state without calibration over ranges makes eval an error again."""
    model = mlp().eval()
    diffq.ActivationQuantizer(model)
    state = snapshot_of(model)
    other = mlp().eval()
    _calibrated(other, torch.randn(5, 16))
    other(torch.randn(2, 16))
    other.load_state_dict(state)
    with pytest.raises(CalibrationError, match="no range"):
        other(torch.randn(2, 16))


def test_plain_checkpoints_load():
    """A checkpoint without ranges loads strictly, and the ranges stay."""
    model = mlp().eval()
    activations = _calibrated(model, torch.randn(5, 16))
    before = activations.ranges()
    plain = mlp()
    model.load_state_dict(plain.state_dict())
    assert same_bits(model[0].weight, plain[0].weight)
    assert same_bits(activations.ranges()["0"], before["0"])


def test_copies():
    """A deep copy rounds with ranges of its own."""
    model = mlp().eval()
    x = torch.randn(5, 16)
    activations = _calibrated(model, x, bits=3)
    twin = copy.deepcopy(model)
    wanted = model(x)
    with activations.calibrate():
        model(9 * x)
    assert close(twin(x), wanted)
    assert not close(model(x), wanted, A_LEVEL)


def test_compiled():
    """A compiled model rounds as well, without a break in the graph."""
    model = mlp().eval()
    x = torch.randn(5, 16)
    _calibrated(model, x, bits=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(x), model(x))


# Attaching


def test_detach_leaves_no_trace():
    """After detach: same modules, parameters, buffers, hooks and names as before."""
    model = ConvNet().eval()
    before = snapshot_of(model)
    hooks = [dict(vars(m)) for m in model.modules()]
    activations = _calibrated(model, torch.randn(4, 3, 8, 8))
    activations.detach()
    assert list(model.state_dict()) == list(before)
    for module, old in zip(model.modules(), hooks, strict=True):
        assert vars(module).keys() == old.keys()
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks
        assert "activation_range" not in module._buffers
    with pytest.raises(AttachError, match="was detached"):
        activations.detach()
    with pytest.raises(AttachError, match="was detached"), activations.calibrate():
        pass
    diffq.ActivationQuantizer(model)


def test_include_and_exclude():
    """Patterns choose layers by their full name or its last part."""

    def names(**options):
        return list(diffq.ActivationQuantizer(ConvNet(), **options).ranges())

    assert names(include=["up", "h*"]) == ["up", "head"]
    assert names(exclude=["head"]) == ["down", "up"]
    with pytest.raises(ConfigError, match="'tail' matches no linear"):
        names(include=["tail"])


def test_model_without_layers():
    """A model with nothing to round is left as it is, and evaluates without calibration."""
    model = nn.Sequential(nn.ReLU()).eval()
    activations = diffq.ActivationQuantizer(model)
    with activations.calibrate():
        model(torch.randn(3))
    assert activations.ranges() == {}
    activations.detach()


def test_weights_come_second():
    """Attaching after a weight quantizer is refused with the order that works."""
    model = mlp()
    diffq.QATQuantizer(model, min_size=0)
    with pytest.raises(AttachError, match="before weights"):
        diffq.ActivationQuantizer(model)


def test_models_that_cannot_take_it():
    """Wrapped and lazy models, a second one, and things that are no model, are refused."""
    model = mlp()
    with pytest.raises(AttachError, match=r"torch\.nn\.Module, got int"):
        diffq.ActivationQuantizer(3)
    with pytest.raises(AttachError, match="has no shape yet"):
        diffq.ActivationQuantizer(nn.Sequential(nn.LazyLinear(3)))
    diffq.ActivationQuantizer(model)
    with pytest.raises(AttachError, match="has an ActivationQuantizer already"):
        diffq.ActivationQuantizer(model)
    with pytest.raises(AttachError, match="before DataParallel wraps it"):
        diffq.ActivationQuantizer(nn.DataParallel(mlp()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits must be a whole number from 1 to 8, got 9"),
        ({"bits": 0}, "bits must be a whole number"),
        ({"observer": "mean"}, "observer must be one of"),
        ({"p": -0.1}, "p must be a number, from 0 to 1"),
        ({"include": "head"}, "include must be a list"),
    ],
)
def test_wrong_settings(options, message):
    """A setting out of range is refused, and the model stays plain."""
    model = mlp()
    with pytest.raises(ConfigError, match=message):
        diffq.ActivationQuantizer(model, **options)
    assert not model[0]._forward_pre_hooks
