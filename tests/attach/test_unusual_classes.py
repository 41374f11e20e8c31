"""Classes of modules of many kinds: bases, metaclasses, methods that read, own copies."""

import abc
import copy
import functools
import warnings
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

import diffq
from tests.compare import close, same_bits
from tests.models import QUANTIZERS, SUMS, gradients, seeded, snapshot_of

T = TypeVar("T")
COARSE = {"min_size": 0, "bits": 2}


def _run_by_name(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)

    return run


class Reads(nn.Module):
    """Methods that read a tensor of their own in many ways."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return F.linear(x, self.w)

    @torch.no_grad()
    def without_gradient(self, x):
        return F.linear(x, self.w)

    @_run_by_name
    def decorated(self, x):
        return F.linear(x, self.w)

    def in_a_list(self, x):
        return sum([F.linear(part, self.w) for part in x[None]])

    def in_a_lambda(self, x):
        return (lambda part: F.linear(part, self.w))(x)

    def in_a_checkpoint(self, x):
        def part(x):
            return F.linear(x, self.w)

        return checkpoint(part, x, use_reentrant=False)

    @property
    def weight(self):
        return self.w

    def through_a_property(self, x):
        return F.linear(x, self.weight)

    def _weight(self):
        return self.w

    def through_a_method(self, x):
        return F.linear(x, self._weight())

    def of_a_dict(self, x):
        return F.linear((x if isinstance(x, dict) else {"x": x})["x"], self.w)


READERS = [name for name, member in vars(Reads).items() if name[0] != "_" and callable(member)]


@pytest.mark.parametrize("name", READERS)
def test_methods_that_read(name):
    """Each method that reads a tensor of its module computes with the quantized one."""
    model = seeded(Reads).eval()
    quantizer = diffq.QATQuantizer(model, **COARSE)
    x = torch.randn(3, 16)
    argument = {"x": x} if name == "of_a_dict" else x
    found = getattr(model, name)(argument)
    plain = diffq.restore_quantized_state(Reads(), quantizer.get_quantized_state())
    assert close(found, getattr(plain, name)(argument))
    quantizer.detach()
    assert not close(found, getattr(model, name)(argument))


class First(abc.ABC, nn.Linear):
    """An abstract base before the module's."""


class Sorted(Generic[T], nn.Linear):
    """A generic base before the module's."""


class Registry(type(nn.Module)):
    """Keeps classes by name, each once."""

    known: ClassVar[dict] = {}

    def __new__(cls, name, bases, members, *, tag):
        made = super().__new__(cls, name, bases, members)
        assert name not in cls.known
        cls.known[name] = made
        return made

    def __init__(cls, name, bases, members, *, tag):
        super().__init__(name, bases, members)


class Registered(nn.Linear, metaclass=Registry, tag="a"):
    """A class whose metaclass keeps it."""


class OwnCopies(nn.Linear):
    """A module that says itself how it is made."""

    def __reduce__(self):
        return OwnCopies, (16, 16), self.__dict__


@pytest.mark.parametrize("cls", [First, Sorted, Registered, OwnCopies])
@pytest.mark.parametrize("inside", [True, False])
def test_classes_that_are_attached(cls, inside):
    """A module of any class trains, evaluates quantized, is copied, and is plain after detach."""
    model = nn.Sequential(cls(16, 16)) if inside else cls(16, 16)
    quantizer = diffq.DiffQuantizer(model, min_size=0, init_bits=3)
    quantizer.no_optimizer()
    x = torch.randn(3, 16)
    assert not close(model(x), model(x))
    model(x).sum().backward()
    model.eval()
    assert close(copy.deepcopy(model)(x), model(x))
    layer = model[0] if inside else model
    assert not close(model(x), F.linear(x, layer.weight, layer.bias))
    quantizer.detach()
    assert type(layer) is cls
    assert Registry.known["Registered"] is Registered


class Outputs(nn.Module):
    """A checkpointed part, whose output is put into an object."""

    def __init__(self, wrap, reentrant):
        super().__init__()
        self.part, self.wrap, self.reentrant = nn.Linear(16, 16), wrap, reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.wrap(self.part(x).tanh())
        part = lambda x: self.part(x).tanh()  # noqa: E731
        return self.wrap(checkpoint(part, x, use_reentrant=self.reentrant))


class Mine(dict):
    """A kind of dict that torch does not know."""


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda y: Categorical(logits=y), lambda output: output.logits),
        (lambda y: Mine(y=y), lambda output: output["y"]),
        (lambda y: [Mine(y=(y,))], lambda output: output[0]["y"][0]),
    ],
    ids=["distribution", "mapping", "nested"],
)
def test_outputs_of_any_class_are_checkpointed(wrap, unwrap, reentrant):
    """The backward of each of two forwards sees its own noise, whatever holds the outputs."""
    found = []
    for mode in (None, reentrant):
        model = seeded(lambda mode=mode: Outputs(wrap, mode))
        QUANTIZERS["diffq"](model).no_optimizer()
        torch.manual_seed(1)
        inputs = torch.randn(2, 4, 16, requires_grad=True)
        outputs = [unwrap(model(x)) for x in inputs]
        sum((y * y).sum() for y in outputs).backward()
        found.append(gradients(model))
    assert close(*found, SUMS)


@pytest.mark.parametrize("reentrant", [None, False])
def test_gradients_of_gradients(reentrant):
    """A penalty on gradients, through a checkpointed part, sees the noise of its forward."""
    found = []
    for mode in (None, reentrant):
        model = seeded(lambda mode=mode: Outputs(lambda y: y, mode))
        QUANTIZERS["qat"](model)
        torch.manual_seed(1)
        x = torch.randn(4, 16, requires_grad=True)
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append(model.part.weight.grad)
    assert close(*found, SUMS)


class Heads(nn.Module):
    """A body, and heads by name."""

    def __init__(self, *heads, classes=8):
        super().__init__()
        self.body = nn.Linear(16, 16)
        for name in heads:
            setattr(self, name, nn.Linear(16, classes))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Heads("a"), Heads("a", "b")),
        (Heads("a", "b"), Heads("a")),
        (Heads("a"), Heads("b")),
        (Heads("a"), Heads("a", classes=5)),
    ],
    ids=["more", "fewer", "other", "resized"],
)
@pytest.mark.parametrize("group_size", [4, None])
def test_a_checkpoint_for_another_head(source, target, group_size):
    """With strict=False, the body takes its weights and bits, and a new head keeps its own."""
    source, target = copy.deepcopy((source, target))
    trained, quantizer = (
        diffq.DiffQuantizer(m, min_size=0, group_size=group_size) for m in (source, target)
    )
    (learned,) = trained.learned_parameters()
    with torch.no_grad():
        learned.sub_(1.0)
    before = quantizer.bits()
    shapes = {name: p.shape for name, p in target.named_parameters()}
    state = {
        name: value
        for name, value in source.state_dict().items()
        if name.startswith("_diffq") or value.shape == shapes.get(name, value.shape)
    }
    target.load_state_dict(state, strict=False)
    assert same_bits(target.body.weight, source.body.weight)
    bits, wanted = quantizer.bits(), trained.bits()
    for name in bits:
        taken = name in wanted and name in state
        assert same_bits(bits[name], wanted[name] if taken else before[name])


def test_a_forward_of_its_own_is_warned_of():
    """A model whose forward was set on the model itself is warned of, and left as it was."""
    model = nn.Linear(16, 16)
    run = model.forward
    model.forward = lambda x: run(x)
    before = snapshot_of(model)
    with pytest.warns(diffq.DiffqWarning, match="forward was set on the model itself"):
        quantizer = diffq.QATQuantizer(model, min_size=0)
    quantizer.detach()
    assert same_bits(snapshot_of(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffq.QATQuantizer(nn.Linear(16, 16), min_size=0)


class Told:
    """Hears of its subclasses."""

    def __init_subclass__(cls, **options):
        assert "told" in options


class Late(abc.ABC, Told, nn.Linear, told=True):
    """A class that can be given no other first base, and may not be told of one."""


def test_classes_that_cannot_be_attached():
    """Where Python allows no class for a module, the error says how to list its bases."""
    model = nn.Sequential(nn.Linear(16, 16), Late(16, 16))
    before = [type(module) for module in model.modules()]
    with pytest.raises(diffq.AttachError, match=r"Late cannot .* before its other bases"):
        diffq.QATQuantizer(model, min_size=0)
    assert [type(module) for module in model.modules()] == before
    assert not any("_diffq" in name for module in model.modules() for name in vars(module))
