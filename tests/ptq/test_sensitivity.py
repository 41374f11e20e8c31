"""`sensitivity`: what it measures, and that the model is afterwards as before, whatever happens."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffq
from tests.compare import same_bits

OPTIONS = {"min_size": 0, "bits": (2, 8)}


class Net(nn.Module):
    """Two layers, a norm and dropout; hooks for what forwards of users do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(16, 4)
        self.register_buffer("calls", torch.tensor(0))
        self.forwards = 0
        self.fails_at = math.inf
        self.error = None

    def forward(self, x):
        self.calls += 1
        self.forwards += 1
        if self.forwards >= self.fails_at:
            raise self.error
        return self.second(self.drop(F.relu(self.norm(self.first(x)))))


def net():
    """The same model each time."""
    torch.manual_seed(0)
    return Net()


def batches(count=2):
    """Batches of inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(count)
    ]


def loss_of(model, batch):
    """The usual loss of a pair."""
    inputs, classes = batch
    return F.cross_entropy(model(inputs), classes)


def copies(model):
    """All tensors of a model, with the identity, version and mode of each part."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [(id(t), t.data_ptr()) for t in (*model.parameters(), *model.buffers())]
    return state, places, [module.training for module in model.modules()]


def assert_as_before(model, before):
    """The tensors are the same ones, bit for bit, and each module is in its mode."""
    state, places, modes = before
    now, now_places, now_modes = copies(model)
    assert now.keys() == state.keys()
    assert all(same_bits(now[name], tensor) for name, tensor in state.items())
    assert (now_places, now_modes) == (places, modes)


def test_losses_are_those_of_quantized_models():
    """Each loss is that of the model with this one tensor as QATQuantizer rounds it."""
    model = net()
    measured = diffq.sensitivity(model, batches(), loss_of, **OPTIONS)

    def mean(model):
        with torch.no_grad():
            return sum(loss_of(model.eval(), batch).item() for batch in batches()) / 2

    assert measured.loss == pytest.approx(mean(net()), rel=1e-5)
    assert measured.bits == (2, 8)
    for name in ("first.weight", "second.bias"):
        for bits in (2, 8):
            wanted = net()
            diffq.QATQuantizer(wanted, bits=bits, min_size=0, include=[name])
            assert measured.tensors[name].losses[bits] == pytest.approx(mean(wanted), rel=1e-5)
            increase = mean(wanted) - mean(net())
            assert measured.increase(name, bits) == pytest.approx(increase, abs=1e-5)


def test_errors_are_those_of_rounding():
    """The squared error of each tensor and bitwidth is that of its quantized values."""
    model = net()
    measured = diffq.sensitivity(model, batches(), loss_of, **OPTIONS)
    for bits in (2, 8):
        state = diffq.quantize_checkpoint(net().state_dict(), bits=bits, min_size=0).state_dict()
        for name, tensor in measured.tensors.items():
            error = (state[name].double() - net().state_dict()[name].double()).square().sum()
            assert tensor.errors[bits] == pytest.approx(error.item())


def test_the_selection_is_that_of_quantize_checkpoint():
    """The same options select the same tensors, buffers of statistics left out."""
    options = {"min_size": 0, "exclude": ["*.bias"]}
    measured = diffq.sensitivity(net(), batches(), loss_of, bits=[2], **options)
    quantized = diffq.quantize_checkpoint(net().state_dict(), bits=2, **options)
    chosen = {name for name, record in quantized.model.records.items() if hasattr(record, "bits")}
    assert set(measured.tensors) == chosen == {"first.weight", "second.weight", "norm.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(training):
    """Tensors, buffers that forwards write to, modes, gradients and graphs survive."""
    model = net().train(training)
    model.norm.eval()
    waiting = loss_of(model, batches()[0])
    before = copies(model)
    diffq.sensitivity(model, batches(), loss_of, **OPTIONS)
    assert_as_before(model, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    waiting.backward()  # fails if a saved tensor was written to


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("forward", [1, 2, 3, 6])
def test_errors_leave_the_model_as_before(error, forward):
    """So do errors and Ctrl-C in the pass of the plain model, and in later ones."""
    model = net().train()
    before = copies(model)
    model.fails_at, model.error = forward, error
    with pytest.raises(error):
        diffq.sensitivity(model, batches(), loss_of, **OPTIONS)
    assert_as_before(model, before)


def test_one_interrupt_cannot_keep_the_values_from_coming_back(monkeypatch):
    """Ctrl-C as the values are about to be restored does not leave the quantized ones."""
    from diffq.ptq import sensitivity as module

    model = net()
    before = copies(model)
    restore, calls = module._Sweep._restore, []

    def interrupted(sweep):
        calls.append(sweep)
        if len(calls) == 2:
            raise KeyboardInterrupt
        restore(sweep)

    monkeypatch.setattr(module._Sweep, "_restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diffq.sensitivity(model, batches(), loss_of, **OPTIONS)
    assert_as_before(model, before)


def test_random_numbers_are_kept():
    """Losses that draw leave the generators of torch, NumPy and Python as they were."""

    def noisy(model, batch):
        torch.rand(3), np.random.rand(3), random.random()
        return loss_of(model, batch)

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    draws = []
    for measure in (False, True):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        model = net()
        if measure:
            diffq.sensitivity(model, batches(), noisy, **OPTIONS)
        draws.append(draw())
    assert draws[0] == draws[1]


def test_each_pass_draws_the_same():
    """Batches that are drawn anew in each pass, as crops are, are the same in all of them."""

    class Crops:
        def __iter__(self):
            return iter([(torch.randn(6, 8), torch.randint(4, (6,))) for _ in range(2)])

    measured = diffq.sensitivity(net(), Crops(), loss_of, bits=[15], min_size=0)
    assert measured.loss > 0
    for tensor in measured.tensors.values():
        assert tensor.losses[15] == pytest.approx(measured.loss, rel=1e-3)


def test_a_shuffled_loader():
    """A DataLoader that shuffles and leaves out the rest gives each pass the same batches."""
    inputs, classes = torch.randn(10, 8), torch.randint(4, (10,))
    loader = DataLoader(TensorDataset(inputs, classes), batch_size=4, shuffle=True, drop_last=True)
    measured = diffq.sensitivity(net(), loader, loss_of, bits=[15], min_size=0)
    for tensor in measured.tensors.values():
        assert tensor.losses[15] == pytest.approx(measured.loss, rel=1e-3)


class Answering(nn.Module):
    """As models of transformers: keyword arguments in, an output with a loss out."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, inputs, labels=None):
        class Output:
            logits = self.net(inputs)
            loss = None if labels is None else F.cross_entropy(logits, labels)

        return Output()


def test_a_model_that_computes_its_loss():
    """Without a loss, batches are keyword arguments and the output has the loss."""
    given = [{"inputs": inputs, "labels": classes} for inputs, classes in batches()]
    own = diffq.sensitivity(Answering(), given, min_size=0, bits=[2])
    other = diffq.sensitivity(net(), batches(), loss_of, min_size=0, bits=[2])
    assert own.loss == pytest.approx(other.loss, rel=1e-5)
    assert [f"net.{name}" for name in other.tensors] == list(own.tensors)


def test_a_model_without_a_loss_of_its_own():
    """Without labels, and for pairs, the error shows a loss to pass."""
    with pytest.raises(diffq.ConfigError, match="output must have one"):
        diffq.sensitivity(Answering(), [{"inputs": torch.randn(6, 8)}], min_size=0)
    with pytest.raises(diffq.ConfigError, match=r"type tuple.*loss=lambda model, batch"):
        diffq.sensitivity(net(), batches(), min_size=0)


def test_tied_tensors_count_once():
    """Names of one tensor are one row, and both change together."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    seen = []

    def loss(model, batch):
        seen.append(same_bits(model[0].weight, model[1].weight))
        return model(batch).square().mean()

    measured = diffq.sensitivity(model, [torch.randn(3, 8)], loss, include=["*.weight"], **OPTIONS)
    assert list(measured.tensors) == ["0.weight"]
    assert measured.tensors["0.weight"].names == ("0.weight", "1.weight")
    assert len(seen) == 3
    assert all(seen)


def test_the_table():
    """Rows fall by the loss at the fewest bits, numbers have their sign, columns line up."""
    measured = diffq.sensitivity(net(), batches(), loss_of, **OPTIONS)
    title, header, rule, *rows = str(measured).splitlines()
    assert title == f"loss {measured.loss:.6g}, and what one quantized tensor adds to it"
    assert header.split() == ["tensor", "shape", "2", "bits", "8", "bits"]
    assert {len(row) for row in (header, *rows)} == {len(rule)}
    assert [row.split()[0] for row in rows] == list(measured.tensors)
    losses = [tensor.losses[2] for tensor in measured.tensors.values()]
    assert losses == sorted(losses, reverse=True)
    assert all(row.split()[2][0] in "+-" for row in rows)
    assert repr(measured) == str(measured) == measured.table()


def test_a_loss_that_quantization_makes_infinite_comes_first():
    """NaN at few bits is a result and no error: the tensor is the most sensitive one."""

    def loss(model, batch):
        changed = not same_bits(model.second.weight, net().second.weight)
        return math.nan if changed else loss_of(model, batch)

    measured = diffq.sensitivity(net(), batches(), loss, **OPTIONS)
    assert next(iter(measured.tensors)) == "second.weight"
    assert math.isnan(measured.tensors["second.weight"].losses[2])


def test_quantize_checkpoint_takes_the_result():
    """The tensor that the loss depends on gets more bits than the one that it does not."""
    model = net()

    def loss(model, batch):
        return model.first.weight.square().sum() + 1e-6 * model.second.weight.square().sum()

    measured = diffq.sensitivity(model, batches(), loss, min_size=0, include=["*.weight"])
    options = {"min_size": 0, "include": ["first.weight", "second.weight"]}
    state = model.state_dict()
    most = diffq.quantize_checkpoint(state, bits=5, **options).size_mb
    quantized = diffq.quantize_checkpoint(state, most, sensitivity=measured, **options)
    records = quantized.model.records
    assert records["first.weight"].bits.min() > records["second.weight"].bits.max()


class UsedUp:
    """Looks as if it could be gone through again, and cannot."""

    def __init__(self, given):
        self.rest = iter(given)

    def __iter__(self):
        return self.rest


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "got none"),
        (iter(batches()), r"Pass list\(batches\)"),
        ((batch for batch in batches()), "a generator, which ends"),
        (UsedUp(batches()), "got 2 in the first and 0 in a later one"),
        (batches()[0][0], r"Pass \[batch\]"),
        ({"inputs": 1}, r"Pass \[batch\]"),
        (3, r"Pass \[batch\]"),
    ],
)
def test_batches_that_cannot_be_measured_on(given, message):
    """No batches, those that end after a pass, and single ones are ConfigErrors."""
    model = net()
    before = copies(model)
    with pytest.raises(diffq.ConfigError, match=message):
        diffq.sensitivity(model, given, loss_of, **OPTIONS)
    assert_as_before(model, before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "finite before anything is quantized, got nan"),
        (torch.tensor(math.inf), "finite before anything is quantized, got inf"),
        (torch.zeros(6), r"one number for each batch, got a tensor of shape \[6\]"),
        (None, "one number for each batch, got None"),
    ],
)
def test_losses_that_are_no_finite_number(value, message):
    """A loss of the plain model must be one finite number."""
    with pytest.raises(diffq.ConfigError, match=message):
        diffq.sensitivity(net(), batches(), lambda model, batch: value, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, r"such as \[2, 4, 8\]"),
        ({"bits": []}, r"such as \[2, 4, 8\]"),
        ({"bits": [4, 16]}, "Each of bits must be a whole number from 1 to 15"),
        ({"include": ["third"]}, "'third' matches no parameter"),
        ({}, "Nothing is quantized"),
    ],
)
def test_options_that_break_a_rule(options, message):
    """Bits out of range, unknown names and models of small tensors are ConfigErrors."""
    with pytest.raises(diffq.ConfigError, match=message):
        diffq.sensitivity(net(), batches(), loss_of, **options)


def test_models_that_cannot_be_measured():
    """An attached model is refused, and what is no model."""
    model = net()
    quantizer = diffq.QATQuantizer(model, min_size=0)
    with pytest.raises(diffq.AttachError, match="detach"):
        diffq.sensitivity(model, batches(), loss_of, **OPTIONS)
    quantizer.detach()
    with pytest.raises(diffq.ConfigError, match="got OrderedDict"):
        diffq.sensitivity(model.state_dict(), batches(), loss_of, **OPTIONS)


def test_a_state_dict_of_copies():
    """A model whose state dict has copies of its tensors would seem to be insensitive."""

    class Copying(Net):
        def state_dict(self, *args, **options):
            return {n: t.clone() for n, t in super().state_dict(*args, **options).items()}

    with pytest.raises(diffq.ConfigError, match=r"'first.weight' is a copy"):
        diffq.sensitivity(Copying(), batches(), loss_of, **OPTIONS)
