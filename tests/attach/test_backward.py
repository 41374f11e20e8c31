"""Gradients: activation checkpointing, several forwards, eval and inference mode."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.compare import close
from tests.models import (
    SUMS,
    First,
    attached,
    gradients,
    mlp,
    restored,
)

RANDOM = ["diffq", "diffq-uniform"]


def _checkpointed(make, use_reentrant):
    """A root whose forward runs `make`'s module under activation checkpointing."""

    class _Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.body = make()

        def forward(self, x):
            x = self.first(x)
            if use_reentrant is None:
                return self.body(x)
            return checkpoint(self.body, x, use_reentrant=use_reentrant)

    return _Root


class _Attention(nn.Module):
    """Self-attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def _lstm():
    return nn.Sequential(nn.LSTM(16, 8, 2, batch_first=True), First(), nn.Linear(8, 4))


def _gru():
    return nn.Sequential(nn.GRU(16, 8, 2, batch_first=True), First(), nn.Linear(8, 4))


def _convolution():
    return nn.Sequential(nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(56, 3))


def _checkpointed_gradients(make, use_reentrant, kind, backward):
    model, _ = attached(_checkpointed(make, use_reentrant), kind)
    inputs = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    backward(model, inputs)
    return gradients(model)


def _one_forward(model, inputs):
    model(inputs).square().mean().backward()


def _accumulated(model, inputs):
    for part in (inputs, 2 * inputs):
        _one_forward(model, part)


def _evaluated_between(model, inputs):
    loss = model(inputs).square().mean()
    with torch.no_grad():
        model.eval()(inputs)
    model.train()
    loss.backward()


def _two_forwards(model, inputs):
    (model(inputs).square().mean() + model(2 * inputs).square().mean()).backward()


def _two_forwards_two_backwards(model, inputs):
    losses = [model(part).square().mean() for part in (inputs, 2 * inputs)]
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [mlp, _Attention, _convolution])
@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform", "diffq-rounding", "qat", "lsq"])
@pytest.mark.parametrize("backward", [_one_forward, _accumulated, _evaluated_between])
def test_activation_checkpointing(make, use_reentrant, kind, backward):
    """Gradients with activation checkpointing are those without: of the same noise."""
    plain = _checkpointed_gradients(make, None, kind, backward)
    assert all(grad is not None for grad in plain.values())
    assert close(_checkpointed_gradients(make, use_reentrant, kind, backward), plain, SUMS)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [mlp, _Attention, _gru])
@pytest.mark.parametrize("kind", [*RANDOM, "diffq-rounding"])
@pytest.mark.parametrize("backward", [_two_forwards, _two_forwards_two_backwards])
def test_activation_checkpointing_of_two_forwards(make, use_reentrant, kind, backward):
    """Two checkpointed forwards before a backward are each recomputed with their own noise."""
    plain = _checkpointed_gradients(make, None, kind, backward)
    recomputed = _checkpointed_gradients(make, use_reentrant, kind, backward)
    assert close(recomputed, plain, SUMS)


@pytest.mark.parametrize("make", [_lstm, _gru])
def test_activation_checkpointing_of_recurrent_layers(make):
    """Checkpointed recurrent layers have the gradients of the same noise, in either mode."""
    plain = _checkpointed_gradients(make, None, "diffq", _accumulated)
    for use_reentrant in (False, True):
        recomputed = _checkpointed_gradients(make, use_reentrant, "diffq", _accumulated)
        assert close(recomputed, plain, SUMS)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_root(use_reentrant):
    """A root that is itself called under checkpointing gives the gradients of the same noise."""
    grads = []
    for checkpointed in (False, True):
        model, _ = attached(mlp)
        inputs = torch.ones(3, 16, requires_grad=True)
        torch.manual_seed(2)
        if checkpointed:
            outputs = checkpoint(model, inputs, use_reentrant=use_reentrant)
        else:
            outputs = model(inputs)
        outputs.square().mean().backward()
        grads.append(gradients(model))
    assert close(*grads, SUMS)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_submodule_without_root(use_reentrant):
    """A checkpointed submodule called without its root gives the gradients of the same noise."""
    grads = []
    for checkpointed in (False, True):
        model, _ = attached(mlp)
        inputs = torch.ones(3, 16, requires_grad=True)
        model(inputs)
        torch.manual_seed(2)
        if checkpointed:
            outputs = checkpoint(model[0], inputs, use_reentrant=use_reentrant)
        else:
            outputs = model[0](inputs)
        outputs.square().mean().backward()
        grads.append(gradients(model))
    assert close(*grads, SUMS)


def test_two_forwards_before_one_backward():
    """The gradient of a sum of two losses is the sum of the gradients, each with its noise."""
    inputs = torch.randn(2, 3, 16)
    joint, _ = attached(mlp)
    torch.manual_seed(4)
    (joint(inputs[0]).square().sum() + joint(inputs[1]).square().sum()).backward()
    single, _ = attached(mlp)
    torch.manual_seed(4)
    for part in inputs:
        single(part).square().sum().backward()
    assert close(gradients(joint), gradients(single), SUMS)


@pytest.mark.parametrize("kind", ["diffq-rounding", "qat", "lsq"])
def test_accumulated_gradients_with_the_size_penalty(kind):
    """Over k backwards, losses and penalties divided by k give the gradient of the whole batch."""
    inputs, found = torch.randn(6, 16), []
    for parts in (1, 3):
        model, quantizer = attached(mlp, kind)
        for part in inputs.chunk(parts):
            loss = model(part).square().mean() + 0.3 * quantizer.model_size()
            (loss / parts).backward()
        found.append(gradients(model))
    assert close(*found, SUMS)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_gradient_in_eval_mode(kind):
    """In eval mode the gradient passes straight through to the weights, and to nothing else."""
    model, quantizer = attached(mlp, kind)
    fresh = restored(mlp, quantizer)
    inputs = torch.randn(3, 16)
    model.eval()(inputs).square().sum().backward()
    fresh(inputs).square().sum().backward()
    for name, parameter in fresh.named_parameters():
        assert close(model.get_parameter(name).grad, parameter.grad)
    assert all(parameter.grad is None for parameter in quantizer.learned_parameters())


def test_inference_mode_then_gradient():
    """After an evaluation under inference_mode, evaluation with gradients works, and vice versa."""
    model, _ = attached(mlp)
    inputs = torch.randn(3, 16)
    model.eval()
    with torch.inference_mode():
        first = model(inputs).clone()
    outputs = model(inputs)
    outputs.sum().backward()
    with torch.inference_mode():
        assert close(model(inputs), first)
    assert close(outputs, first)
    grads = gradients(model)
    assert all(grads[name] is not None for name in dict(mlp().named_parameters()))


def test_training_after_inference_mode_in_training_mode():
    """A training forward under inference_mode leaves nothing that breaks the next one."""
    model, _ = attached(mlp)
    with torch.inference_mode():
        model(torch.randn(3, 16))
    model(torch.randn(3, 16)).sum().backward()
    assert all(grad is not None for grad in gradients(model).values())
