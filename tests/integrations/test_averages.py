"""Averages of weights: torch's AveragedModel, averages over state dicts, and through `.data`."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import diffq
from tests.compare import close, same_bits
from tests.integrations.tiny import KINDS, evaluates_as_shipped, extras, floats, prepared
from tests.models import QUANTIZERS, ConvNet, seeded, snapshot_of, step

DECAY = 0.8


def training(kind="diffq"):
    """A model with BatchNorm, and a function that makes one step of its training."""
    model = seeded(ConvNet)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    x = torch.randn(4, 3, 8, 8)
    return model, quantizer, x, lambda: step(model.train(), optimizer, x, quantizer, lam=100)


def parameters(model):
    """Name to a copy of each parameter, what is learned too."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def average(states):
    """The exponential moving average of states, in their order."""
    first, *rest = states
    for state in rest:
        first = {name: DECAY * first[name] + (1 - DECAY) * state[name] for name in first}
    return first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_model(buffers, kind):
    """Weights, logits and, if asked for, statistics are averaged each with its own."""
    model, quantizer, x, train = training(kind)
    copied = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=buffers)
    read = floats if buffers else parameters
    states = []
    for _ in range(4):
        train()
        copied.update_parameters(model)
        states.append(read(model))
    assert close(read(copied.module), average(states))
    # torch copies the statistics that it does not average.
    assert buffers or same_bits(copied.module.norm.running_mean, model.norm.running_mean)
    assert same_bits(
        extras(copied.module)["_diffq._extra_state"], extras(model)["_diffq._extra_state"]
    )
    assert diffq.quantizer_of(copied.module) is not quantizer
    assert evaluates_as_shipped(copied.module, ConvNet, x)


@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_model_across_a_freeze(buffers, rounding):
    """`freeze_bits()` moves no tensor to another's place: averages go on as before."""
    model, quantizer, x, train = training()
    copied = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=buffers)
    names = [name for name, _ in model.named_parameters()]
    states = []
    for index in range(4):
        train()
        if index == 1:
            quantizer.freeze_bits(rounding=rounding)
        copied.update_parameters(model)
        states.append(floats(model) if buffers else parameters(model))
    assert [name for name, _ in model.named_parameters()] == names
    read = floats if buffers else parameters
    assert close(read(copied.module), average(states))
    assert evaluates_as_shipped(copied.module, ConvNet, x)


def test_equal_average():
    """Without a function, AveragedModel gives the mean of the weights."""
    model, _, x, train = training()
    copied, states = AveragedModel(model), []
    for _ in range(3):
        train()
        copied.update_parameters(model)
        states.append(parameters(model))
    mean = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    assert close(parameters(copied.module), mean)
    assert evaluates_as_shipped(copied.module, ConvNet, x)


@torch.no_grad()
def all_values(copied, model):
    """The average of timm's ModelEmaV2: all values of the state dicts, whatever they are."""
    pairs = zip(copied.state_dict().values(), model.state_dict().values(), strict=True)
    for mine, other in pairs:
        mine.copy_(DECAY * mine + (1 - DECAY) * other)


@torch.no_grad()
def floating_values(copied, model):
    """The average of timm's ModelEmaV3 and of YOLO's trainers: floats by name, others copied."""
    state = model.state_dict()
    for name, mine in copied.state_dict().items():
        if mine.is_floating_point():
            mine.lerp_(state[name], 1 - DECAY)
        else:
            mine.copy_(state[name])


def through_data(copied, model):
    """The average of mean teachers, which leaves no trace in versions."""
    for mine, other in zip(copied.parameters(), model.parameters(), strict=True):
        mine.data.mul_(DECAY).add_(other.data, alpha=1 - DECAY)
    for mine, other in zip(copied.buffers(), model.buffers(), strict=True):
        if mine.is_floating_point():
            mine.data.mul_(DECAY).add_(other.data, alpha=1 - DECAY)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("update", [all_values, floating_values, through_data])
def test_teacher_in_eval(update, frozen):
    """A teacher in eval follows each average, bits that are frozen meanwhile or not."""
    model, quantizer, x, train = training()
    teacher = copy.deepcopy(model).eval()
    states = [floats(model)]
    for index in range(4):
        train()
        if frozen and index == 1:
            quantizer.freeze_bits()
        update(teacher, model)
        states.append(floats(model))
        assert close(floats(teacher), average(states))
        assert evaluates_as_shipped(teacher, ConvNet, x)


@pytest.mark.parametrize("update", [all_values, floating_values])
def test_state_of_an_average_loads(update):
    """The state dict of an average is one: a model with the same quantizer loads it."""
    model, _, x, train = training()
    teacher = copy.deepcopy(model)
    for _ in range(3):
        train()
        update(teacher, model)
    other, _ = prepared(ConvNet, seed=1)
    other.load_state_dict(teacher.state_dict())
    assert same_bits(snapshot_of(other), snapshot_of(teacher))
    assert evaluates_as_shipped(other, ConvNet, x)


def test_swapped_for_evaluation():
    """The pattern of swapping an average in and out leaves training as it was."""
    model, _, x, train = training()
    mean = copy.deepcopy(model)
    train()
    floating_values(mean, model)
    before = snapshot_of(model)
    model.load_state_dict(mean.state_dict())
    assert evaluates_as_shipped(model, ConvNet, x)
    model.load_state_dict(before)
    assert same_bits(snapshot_of(model), before)
    assert evaluates_as_shipped(model, ConvNet, x)
