"""Reads of quantized tensors inside of forwards: one sample in training, stored values in eval."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from tests.compare import close, same_bits
from tests.models import QUANTIZERS, attached, mlp, restored, seeded
from tests.readers import (
    COARSE,
    LEARNED,
    Reader,
    learned_in,
    readers,
    reads_parameters,
    seen_by,
    stored,
    x16,
)

#: Kinds that draw noise in each training forward.
RANDOM = ["diffq", "diffq-uniform", "diffq-fixed", "quant-noise"]


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_eval_reads_what_is_stored(kind):
    """Each layer computes with the stored values, bit for bit, with gradients and without."""
    model, quantizer = attached(readers, kind)
    model.eval()
    with torch.no_grad():
        model(x16())
    model(x16())
    with torch.inference_mode():
        model(x16())
    values = stored(readers, quantizer)
    for seen, name in zip(seen_by(model), ["0.0.weight", "0.1.weight", "2.weight"], strict=True):
        assert all(same_bits(weight, values[name].detach()) for weight in seen)
        assert len(seen) == 3


@pytest.mark.parametrize("kind", ["qat", "qat-channel", "diffq-rounding", "lsq"])
def test_training_reads_what_is_stored_where_nothing_is_random(kind):
    """Training on rounded weights computes with the stored values, up to the sign of zeros."""
    model, quantizer = attached(readers, kind)
    model(x16())
    values = stored(readers, quantizer)
    names = ["0.0.weight", "0.1.weight", "2.weight"]
    for (weight,), name in zip(seen_by(model), names, strict=True):
        assert same_bits(weight + 0.0, values[name].detach() + 0.0)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("kind", RANDOM)
def test_each_training_forward_has_its_own_noise(kind, grad_mode):
    """The weights of a training forward are noisy and new, with gradients and without."""
    model, _ = attached(readers, kind)
    with torch.set_grad_enabled(grad_mode):
        model(x16())
        model(x16())
    for layer in (module for module in model.modules() if isinstance(module, Reader)):
        one, two = layer.seen
        assert not same_bits(one, two)
        assert not same_bits(one, layer.weight.detach())


@pytest.mark.parametrize("call", [lambda part, x: part(x), lambda part, x: part.forward(x)])
@pytest.mark.parametrize("part", ["", "0", "0.0"])
def test_forwards_of_parts(part, call):
    """The root, a block and a layer give noisy and quantized weights, also by `forward` itself."""
    model, quantizer = attached(readers, **COARSE)
    layer = model[0][0]
    for _ in range(2):
        call(model.get_submodule(part), x16())
    one, two = layer.seen
    assert not same_bits(one, two)
    assert not same_bits(one, layer.weight.detach())
    model.eval()
    call(model.get_submodule(part), x16())
    assert same_bits(layer.seen[-1], stored(readers, quantizer)["0.0.weight"].detach())
    assert reads_parameters(model)


class Looking(nn.Module):
    """A root that reads its layer's weight before, between and after two calls of the layer."""

    def __init__(self):
        super().__init__()
        self.layer = Reader()
        self.seen = []

    def look(self):
        self.seen.append(self.layer.weight.detach().clone())

    def forward(self, x):
        self.look()
        x = self.layer(x)
        self.look()
        x = self.layer(x)
        self.look()
        return x


@pytest.mark.parametrize("kind", [*RANDOM, "qat"])
def test_all_reads_of_a_forward_are_alike(kind):
    """However often and from wherever a forward reads a weight, it is one sample."""
    model, _ = attached(Looking, kind)
    for training in (True, False):
        model.train(training)
        model(x16())
        seen = [*model.seen, *model.layer.seen]
        assert len(seen) == 5
        assert all(same_bits(weight, seen[0]) for weight in seen)
        model.seen.clear()
        model.layer.seen.clear()


def test_reads_in_hooks_of_parts():
    """Hooks of a layer that run in the root's forward see the layer's weight of this forward."""
    model, _ = attached(readers)
    seen = []
    model[0][0].register_forward_pre_hook(lambda m, _: seen.append(m.weight.detach().clone()))
    model[0][0].register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    model(x16())
    assert all(same_bits(weight, model[0][0].seen[0]) for weight in seen)


def test_a_part_in_another_mode():
    """In a training forward, a part in eval mode reads stored values and others read noise."""
    model, quantizer = attached(readers, **COARSE)
    model[0].eval()
    for _ in range(2):
        model(x16())
    one, two = model[0][0].seen
    assert same_bits(one, two)
    assert same_bits(one, stored(readers, quantizer)["0.0.weight"].detach())
    assert not same_bits(*model[2].seen)


def test_a_forward_that_switches_modes():
    """A forward that sets a part to eval on its way reads that part's stored values from there."""

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Reader()

        def forward(self, x):
            x = self.layer(x)
            self.layer.eval()
            x = self.layer(x)
            self.layer.train()
            return self.layer(x)

    model, quantizer = attached(Switching, **COARSE)
    model(x16()).sum().backward()
    noisy, quantized, again = model.layer.seen
    assert same_bits(quantized, stored(Switching, quantizer)["layer.weight"].detach())
    assert not same_bits(noisy, quantized)
    assert same_bits(noisy, again)
    assert reads_parameters(model)


def test_a_forward_that_calls_itself():
    """A recursion of the root is one forward, with one sample, until the outermost call ends."""

    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Reader()

        def forward(self, x, depth=2):
            x = self.layer(x)
            return self(x, depth - 1) + self.layer(x) if depth else x

    model, _ = attached(Recursive)
    model(x16())
    seen = model.layer.seen
    assert len(seen) == 5
    assert all(same_bits(weight, seen[0]) for weight in seen)
    model(x16())
    assert not same_bits(seen[-1], seen[0])


def test_a_student_and_a_teacher():
    """Two attached models in one unattached one each follow their own mode and settings."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = Reader(), Reader()

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return (self.student(x) - target).square().mean()

    both = seeded(Both)
    student = QUANTIZERS["diffq"](both.student, **COARSE)
    teacher = QUANTIZERS["qat"](both.teacher)
    student.no_optimizer()
    both.teacher.eval()
    for _ in range(2):
        both(x16()).backward()
    assert not same_bits(*both.student.seen)
    assert same_bits(*both.teacher.seen)
    assert same_bits(both.teacher.seen[0], stored(Reader, teacher)["weight"].detach())
    assert learned_in(both.student).grad.any()
    assert both.teacher.weight.grad is None
    names = [f"student.{name}" for name in ("weight", "bias", LEARNED)]
    assert list(both.state_dict())[:3] == names
    assert reads_parameters(both)


class Lists(nn.Module):
    """Parameters in lists and dicts, read by iteration, slice, key and value."""

    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList(nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3))
        self.named = nn.ParameterDict({"k": nn.Parameter(torch.randn(16, 16) / 4)})

    def reads(self):
        one = [*self.ws], [self.ws[i] for i in range(3)], [*self.ws[:2], self.ws[-1]]
        two = self.named["k"], *self.named.values(), next(iter(self.named.items()))[1]
        return [each for group in zip(*one, strict=True) for each in group], list(two)

    def forward(self, x):
        self.seen = [[w.detach().clone() for w in ws] for ws in self.reads()]
        for w in self.ws:
            x = F.linear(x, w).tanh()
        return F.linear(x, self.named["k"])


def test_lists_and_dicts_of_parameters():
    """Iterated, sliced or by key, a list's parameters are quantized in the root's forward only."""
    model, quantizer = attached(Lists, **COARSE)
    model.eval()
    with torch.no_grad():
        model(x16())
    values = stored(Lists, quantizer)
    listed, named = model.seen
    wanted = [values[f"ws.{i}"] for i in range(3) for _ in range(3)]
    assert same_bits(listed, [w.detach() for w in wanted])
    assert same_bits(named, [values["named.k"].detach()] * 3)
    parameters = dict(model.named_parameters())
    listed, named = model.reads()
    assert all(w is parameters[f"ws.{i // 3}"] for i, w in enumerate(listed))
    assert all(w is parameters["named.k"] for w in named)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_functional_call_in_training(kind):
    """Tensors given to functional_call get the gradients, and the model's own get none."""
    model, _ = attached(mlp, kind)
    given = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    functional_call(model, given, (x16(),)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in given.values())
    assert all(p.grad is None for p in model.parameters())
    assert reads_parameters(model)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_each_sample(training):
    """vmap of grad gives each sample its gradient, which sum up to that of the batch."""
    model, _ = attached(mlp, "diffq-rounding")
    model.train(training)
    given, inputs = {n: p.detach() for n, p in model.named_parameters()}, x16(4)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    each = vmap(grad(loss), (None, 0))(given, inputs)
    whole = grad(loss)(given, inputs)
    assert each["0.weight"].shape == (4, 32, 16)
    assert close(each["0.weight"].sum(0), whole["0.weight"])
    assert reads_parameters(model)


def test_a_recurrent_layer_by_its_list_of_weights():
    """A recurrent layer that is asked for its weights gives Parameters, and evaluates quantized."""

    def make():
        return nn.LSTM(16, 8, num_layers=2, batch_first=True)

    model, quantizer = attached(make, **COARSE)
    inputs = torch.randn(2, 5, 16)
    model(inputs)[0].sum().backward()
    listed = [weight for layer in model.all_weights for weight in layer]
    assert all(a is b for a, b in zip(listed, model._parameters.values(), strict=False))
    model.flatten_parameters()
    model.eval()
    with torch.no_grad():
        assert close(model(inputs), restored(make, quantizer)(inputs))
    assert reads_parameters(model)
