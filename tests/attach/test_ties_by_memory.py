"""Tensors that share memory: the same view of it is a tie, an overlap is refused."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.models import (
    QUANTIZERS,
    SUMS,
    TiedModules,
    attached,
    fingerprint,
    refused,
    restored,
    seeded,
    step,
    tokens,
)
from tests.readers import computes_with_what_is_stored, reads_parameters, stored


class ByMemory(TiedModules):
    """An embedding and a head that are two Parameters of one memory."""

    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(torch.empty(0))
        self.head.weight.data = self.embed.weight.data


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_one_quantizer_for_one_memory(kind):
    """Bits, sizes, plan and stored values are those of the same model tied by one Parameter."""
    (_, tied), (model, quantizer) = attached(TiedModules, kind), attached(ByMemory, kind)
    assert model.head.weight is not model.embed.weight
    assert [p.names for p in quantizer.plan] == [p.names for p in tied.plan]
    assert same_bits(quantizer.bits(), tied.bits())
    assert quantizer.true_model_size() == tied.true_model_size()
    assert close(quantizer.model_size(), tied.model_size())
    assert same_bits(quantizer.get_quantized_state(), tied.get_quantized_state())


@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform", "quant-noise"])
def test_one_sample(kind):
    """Both modules compute with one noisy weight."""
    model, quantizer = attached(ByMemory, kind)
    with quantizer.computing():
        assert same_bits(model.embed.weight.detach(), model.head.weight.detach())
        assert not same_bits(model.embed.weight.detach(), model.embed._parameters["weight"])
    assert reads_parameters(model)


@pytest.mark.parametrize("kind", ["diffq-rounding", "qat", "lsq"])
def test_gradients_of_both(kind):
    """What both Parameters get adds up to the gradient of the one Parameter of a tie."""
    grads, inputs = [], tokens()
    for make in (TiedModules, ByMemory):
        model, quantizer = attached(make, kind)
        (model(inputs).square().sum() + quantizer.model_size()).backward()
        weights = {id(m.weight): m.weight.grad for m in (model.embed, model.head)}
        grads.append(sum(g for g in weights.values() if g is not None))
    assert close(*grads, SUMS)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq", "product"])
def test_training_stores_what_eval_computes(kind):
    """After steps that move both Parameters, eval, state and a restored model agree."""
    model, quantizer = attached(ByMemory, kind)
    optimizer, inputs = torch.optim.SGD(model.parameters(), 0.05), tokens()
    quantizer.setup_optimizer(optimizer, lr=0.1)
    for _ in range(3):
        step(model, optimizer, inputs, quantizer)
        assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    model.eval()
    with torch.no_grad():
        assert close(model(inputs), restored(ByMemory, quantizer)(inputs))
        assert close(model(inputs), restored(TiedModules, quantizer)(inputs))
    assert computes_with_what_is_stored(TiedModules, model, quantizer)


def test_detach_gives_both_parameters_back():
    """After detach() both Parameters are there, and share their memory."""
    model = seeded(ByMemory)
    before = fingerprint(model)
    diffq.QATQuantizer(model, min_size=0).detach()
    assert fingerprint(model) == before
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def _pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def _loaded(model):
    model.load_state_dict(copy.deepcopy(dict(model.state_dict())), assign=True)
    return model


@pytest.mark.parametrize(
    "change", [copy.deepcopy, _pickled, _loaded, nn.Module.double, nn.Module.bfloat16]
)
def test_changes_that_separate_memory(change):
    """Where torch gives the Parameters memory of their own, no value is wrong in silence."""
    model, _ = attached(ByMemory)
    changed = change(model)
    quantizer = diffq.quantizer_of(changed)
    changed.eval()
    try:
        with torch.no_grad():
            changed(tokens())
    except diffq.AttachError as error:
        assert "embed.weight" in str(error)  # noqa: PT017
    else:
        dtype = changed.embed.weight.dtype
        assert computes_with_what_is_stored(lambda: ByMemory().to(dtype), changed, quantizer)


def test_equal_values_and_empty_tensors_are_no_ties():
    """Tensors of equal values, and tensors without elements, which have no memory, are separate."""
    model = nn.ParameterList(
        [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))]
        + [nn.Parameter(torch.ones(0, 8)) for _ in range(2)]
    )
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    assert [p.names for p in quantizer.plan] == [(str(i),) for i in range(4)]
    assert list(quantizer.bits()) == ["0", "1"]


def test_tensors_on_meta_are_no_ties():
    """Parameters on meta, which have no address, are ties only if they are one object."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    quantizer = diffq.DiffQuantizer(model, min_size=0, exclude=["bias"])
    names = [p.names for p in quantizer.plan if p.quantized]
    assert names == [("0.weight", "2.weight"), ("1.weight",)]


def _two(one, two):
    return nn.ParameterDict({"one": nn.Parameter(one), "two": nn.Parameter(two)})


BASE = torch.arange(64.0)
OVERLAPS = {
    "transpose": lambda b: (b.view(8, 8), b.view(8, 8).t()),
    "rows": lambda b: (b.view(8, 8), b.view(8, 8)[:4]),
    "columns": lambda b: (b.view(8, 8), b.view(8, 8)[:, 2:]),
    "shape": lambda b: (b.view(8, 8), b.view(4, 16)),
    "offset": lambda b: (b[:40], b[24:]),
    "every other": lambda b: (b, b[::2]),
}


@pytest.mark.parametrize("quantize", [diffq.DiffQuantizer, diffq.QATQuantizer])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_overlaps_are_refused(overlap, quantize):
    """Another view of a quantized tensor's memory is an error that names both, in any order."""
    for order in (1, -1):
        model = _two(*OVERLAPS[overlap](BASE.clone())[::order])
        refused(model, diffq.AttachError, lambda m: quantize(m, min_size=0), "one", "two")


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_overlaps_that_are_left_out(overlap):
    """Tensors that overlap may stay as they are, beside others that are quantized."""
    model = _two(*OVERLAPS[overlap](BASE.clone()))
    model["three"] = nn.Parameter(torch.randn(8, 8))
    quantizer = diffq.DiffQuantizer(model, min_size=0, exclude=["one", "two"])
    assert list(quantizer.bits()) == ["three"]


DISJOINT = {
    "halves": lambda b: (b[:32].view(4, 8), b[32:].view(4, 8)),
    "columns": lambda b: (b.view(8, 8)[:, :4], b.view(8, 8)[:, 4:]),
    "even and odd": lambda b: (b[::2], b[1::2]),
}


@pytest.mark.parametrize("views", DISJOINT)
def test_parts_of_one_buffer(views):
    """Views of one storage that share no element are tensors like any others."""
    model = _two(*DISJOINT[views](BASE.clone()))
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    assert [p.names for p in quantizer.plan] == [("one",), ("two",)]
    assert list(quantizer.bits()) == ["one", "two"]


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 6), st.integers(1, 6))
def test_slices(start, other, length, size):
    """Two slices are a tie if they are the same, an error if they overlap, or else separate."""
    base = torch.randn(16)
    model = _two(base[start : start + length], base[other : other + size])
    common = {*range(start, start + length)} & {*range(other, other + size)}
    if (start, length) == (other, size):
        quantizer = diffq.QATQuantizer(model, min_size=0)
        assert [p.names for p in quantizer.plan] == [("one", "two")]
    elif common:
        with pytest.raises(diffq.AttachError, match="one"):
            diffq.QATQuantizer(model, min_size=0)
    else:
        quantizer = diffq.QATQuantizer(model, min_size=0)
        assert [p.names for p in quantizer.plan] == [("one",), ("two",)]


def test_ties_that_are_made_after_attaching():
    """Tying two quantized tensors of an attached model is an error, or they are one from there."""
    model = seeded(TiedModules)
    model.head.weight = nn.Parameter(torch.randn(24, 16))
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    model.head.weight = model.embed.weight
    try:
        model.eval()(tokens())
    except diffq.AttachError as error:
        assert "head.weight" in str(error)  # noqa: PT017
    else:
        values = stored(TiedModules, quantizer)
        assert same_bits(values["head.weight"].detach(), values["embed.weight"].detach())
        assert computes_with_what_is_stored(TiedModules, model, quantizer)


def test_ties_that_are_broken_after_attaching():
    """Where one of two tied names gets a Parameter of its own, a forward names both."""
    model, _ = attached(TiedModules)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    for training in (True, False):
        with pytest.raises(diffq.AttachError, match=r"embed\.weight.*head\.weight"):
            model.train(training)(tokens())
        assert reads_parameters(model)
    model.head.weight = model.embed.weight
    model.train()(tokens()).sum().backward()
