"""Batches: a step costs what it costs whatever the number of tensors; nothing else changes."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import diffq
from diffq.attach import batch as batches
from diffq.attach.attachment import attachment_of
from diffq.errors import WeightError
from diffq.numerics import draws, flat
from tests.compare import close
from tests.holder import Holder, bits_of, weight_quantizers
from tests.models import SUMS, gradients

#: Quantizers, and the operations that a batch takes in a step.
MADE = {
    "gaussian": (61, lambda model: diffq.DiffQuantizer(model, min_size=0)),
    "one bitwidth": (61, lambda model: diffq.DiffQuantizer(model, min_size=0, group_size=None)),
    "rounding": (74, lambda model: diffq.DiffQuantizer(model, min_size=0, noise="rounding")),
    "fixed": (29, lambda model: diffq.DiffQuantizer(model, min_size=0, bits=4)),
    "qat": (22, lambda model: diffq.QATQuantizer(model, min_size=0)),
    "quant-noise": (26, lambda model: diffq.QuantNoiseQuantizer(model, min_size=0)),
    "lsq": (37, lambda model: diffq.LSQQuantizer(model, min_size=0)),
    "entropy": (99, lambda model: diffq.EntropyQuantizer(model, min_size=0)),
}


class Operations(TorchDispatchMode):
    """Counts operations that compute, and not those that only look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.counts[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def _tensors(count):
    return Holder({f"weight{index}": torch.randn(6, 8) for index in range(count)})


def _read(model, quantizer):
    with quantizer.computing():
        return [getattr(model, name) for name in weight_quantizers(model)]


def _step(tensors, size=None):
    """A backward of tensors, and of a size if it is learned."""
    roots = [*tensors, size] if size is not None and size.requires_grad else [*tensors]
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


def _operations(kind, count):
    """Operations that a step takes beyond a plain one, after a first step."""
    model = _tensors(count)
    with Operations() as plain:
        _step(model.parameters())
    quantizer = MADE[kind][1](model)
    quantizer.no_optimizer()
    _step(_read(model, quantizer), quantizer.model_size())
    model.zero_grad()
    with Operations() as operations:
        _step(_read(model, quantizer), quantizer.model_size())
    return sum((operations.counts - plain.counts).values())


@pytest.mark.parametrize("kind", MADE)
def test_operations_do_not_grow_with_the_number_of_tensors(kind):
    """A step of 40 tensors takes as many operations as one of 4, and not more than they took."""
    few, many = (_operations(kind, count) for count in (4, 40))
    assert few == many <= MADE[kind][0]


def _evaluated(model, quantizer):
    """The quantized weights of a model in eval, computed again."""
    attachment_of(model).forget()
    with torch.no_grad():
        return _read(model, quantizer)


def _quantizing(kind, count):
    """Operations that the first eval forward after a step takes."""
    model = _tensors(count).eval()
    quantizer = MADE[kind][1](model)
    _evaluated(model, quantizer)
    with Operations() as operations:
        _evaluated(model, quantizer)
    return sum(operations.counts.values())


@pytest.mark.parametrize("kind", MADE)
def test_operations_of_eval_do_not_grow_with_the_number_of_tensors(kind):
    """Eval quantizes 40 tensors in as many operations as 4."""
    few, many = (_quantizing(kind, count) for count in (4, 40))
    assert few == many <= 35


def _unlike(dtype):
    """Tensors of many shapes and ranges: with zeros, constant, and of steps near the smallest."""
    tensors = {f"weight{n}": torch.randn(shape) for n, shape in enumerate([(9, 50), (5,), (1,)])}
    largest = min(torch.finfo(dtype).max, 1e37)
    tensors["zeros"], tensors["constant"] = torch.randn(8, 9), torch.zeros(9)
    tensors["zeros"][2] = 0
    tensors["positive"], tensors["large"] = torch.rand(130) + 1, torch.rand(40) * largest
    tensors["tiny"] = torch.randn(20, 3) * max(torch.finfo(dtype).tiny, 1e-40)
    tensors["both"] = (torch.rand(40) - 0.5) * largest
    tensors["both"][7] = 0
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MADE)
def test_eval_is_that_of_single_tensors(kind, dtype, monkeypatch):
    """Batches quantize to the same bits as tensors one by one, and see zeros that have come."""
    monkeypatch.setattr(flat, "_PIECE", 256)
    torch.manual_seed(0)
    model = Holder(_unlike(dtype)).eval()
    quantizer = MADE[kind][1](model)
    with torch.no_grad():
        if model._diffq.learned is not None:
            model._diffq.learned.mul_(torch.rand_like(model._diffq.learned) * 2)
        model.weight0[3] = 0
    read = _evaluated(model, quantizer)
    for value, (name, single) in zip(read, weight_quantizers(model).items(), strict=True):
        assert bits_of(value) == bits_of(single.quantized()), name
    assert not read[0][3].any()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", MADE)
def test_eval_names_the_tensor_that_is_not_finite(kind, number):
    """A batch with a tensor that is refused is an error that names it, and nothing else."""
    model = _tensors(3).eval()
    quantizer = MADE[kind][1](model)
    before = [bits_of(tensor) for tensor in _evaluated(model, quantizer)]
    kept = model.weight1[2, 3].item()
    for value in (number, kept):
        with torch.no_grad():
            model.weight1[2, 3] = value
        if value is not kept:
            with pytest.raises(WeightError, match="weight1"):
                _evaluated(model, quantizer)
    assert [bits_of(tensor) for tensor in _evaluated(model, quantizer)] == before


def test_quantized_weights_have_versions_of_their_own():
    """A write to one quantized weight is none to another of its batch."""
    model = _tensors(2).eval()
    one, other = _evaluated(model, MADE["qat"][1](model))
    version = other._version
    one.add_(1)
    assert other._version == version


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "quant-noise"])
def test_tensors_of_a_batch_are_those_of_batches_of_one(kind, monkeypatch):
    """Values and gradients do not depend on what else is in the batch, noise apart."""
    shapes = [(6, 8), (5,), (3, 3, 7), (1,), (130,)]
    values, slopes = [], []
    for most in (2**23, 1):
        monkeypatch.setitem(batches._MOST, "cpu", most)
        # Numbers of one draw, whatever is drawn together.
        monkeypatch.setattr(draws, "source", lambda *args: lambda sample: sample.fill_(0.75))
        torch.manual_seed(0)
        model = Holder({f"weight{n}": torch.randn(shape) for n, shape in enumerate(shapes)})
        quantizer = MADE[kind][1](model)
        quantizer.no_optimizer()
        read = _read(model, quantizer)
        _step([tensor.sin() for tensor in read], quantizer.model_size())
        values.append([bits_of(tensor) for tensor in read])
        slopes.append(gradients(model))
    assert values[0] == values[1]
    assert close(*slopes, SUMS)


@pytest.mark.parametrize("kind", MADE)
def test_backwards_in_parts(kind):
    """Losses of some tensors may have backwards of their own, without retain_graph."""
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = _tensors(4)
        quantizer = MADE[kind][1](model)
        quantizer.no_optimizer()
        torch.manual_seed(1)
        read = [tensor.square().sum() for tensor in _read(model, quantizer)]
        for part in range(parts):
            sum(read[part::parts]).backward()
        results.append(gradients(model))
    assert close(*results, SUMS)


@pytest.mark.parametrize("kind", ["gaussian", "rounding", "lsq"])
def test_writes_before_the_backward(kind):
    """A weight that is written to between forward and backward is torch's error, not a gradient."""
    model = _tensors(2)
    quantizer = MADE[kind][1](model)
    quantizer.no_optimizer()
    loss = sum(tensor.sum() for tensor in _read(model, quantizer))
    with torch.no_grad():
        model.weight1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unread_tensors_have_no_gradient():
    """A tensor that a loss does not read has no gradient, and its bits get zeros."""
    model = _tensors(3)
    diffq.DiffQuantizer(model, min_size=0, group_size=None).no_optimizer()
    with diffq.quantizer_of(model).computing():
        loss = model.weight0.sin().sum() + model.weight2.sin().sum()
    loss.backward()
    assert model.weight1.grad is None
    assert (model._diffq.learned.grad != 0).tolist() == [True, False, True]


def test_large_models_have_several_batches(monkeypatch):
    """A batch ends after some megabytes, so that its gradients are there before the others'."""
    monkeypatch.setitem(batches._MOST, "cpu", 100)
    model = _tensors(6)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    nodes = {tensor.grad_fn for tensor in _read(model, quantizer)}
    assert len(nodes) == 3


def test_kinds_that_differ_are_batches_of_their_own():
    """Group sizes, dtypes and laws in one model: each tensor is quantized by its own."""
    tensors = {"a": (6, 8), "b": (8,), "c": (9,), "d": (4,)}
    model = Holder({name: torch.randn(shape) for name, shape in tensors.items()})
    model.c.data = model.c.data.double()
    overrides = {"b": {"group_size": 4}, "d": {"max_bits": 9}}
    quantizer = diffq.DiffQuantizer(model, min_size=0, noise="rounding", overrides=overrides)
    quantizer.no_optimizer()
    trained = [bits_of(tensor) for tensor in _read(model, quantizer)]
    model.eval()
    assert [bits_of(tensor) for tensor in _read(model, quantizer)] == trained


@pytest.mark.parametrize("kind", ["gaussian", "one bitwidth"])
def test_many_numbers_are_drawn_the_fast_way(kind, monkeypatch):
    """On a CPU, all noise of a large batch comes from 16 bits a number."""
    drawn, codes = [], draws._codes
    monkeypatch.setattr(draws, "_codes", lambda *args: drawn.append(args[1]) or codes(*args))
    model = Holder({f"weight{index}": torch.randn(200, 320) for index in range(3)})
    quantizer = MADE[kind][1](model)
    quantizer.no_optimizer()
    _read(model, quantizer)
    assert sum(drawn) == 3 * 200 * 320


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_that_come_in_are_left_alone(kind, count):
    """A backward does not write to the gradients of its values, which others may hold."""
    model = _tensors(count)
    quantizer = MADE[kind][1](model)
    quantizer.no_optimizer()
    read = _read(model, quantizer)
    upstream = [torch.randn(6, 8) for _ in read]
    before = [bits_of(gradient) for gradient in upstream]
    torch.autograd.backward(read, upstream)
    assert [bits_of(gradient) for gradient in upstream] == before


@pytest.mark.parametrize("kind", MADE)
def test_computed_tensors_are_batches_of_their_own(kind):
    """A backward of one tensor does not go through what another one is computed from."""
    model = nn.Sequential(
        nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 4))
    )
    quantizer = MADE[kind][1](model)
    quantizer.no_optimizer()
    with quantizer.computing():
        losses = [layer.weight.sin().sum() for layer in model]
    # Each frees its own graph.
    for loss in losses:
        loss.backward()
    assert model[0].weight.grad.any()
    for layer in model[1:]:
        assert layer.parametrizations.weight.original1.grad.any()
