"""Classes of an attached model's modules: those of the plain model, by name and by isinstance."""

import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.models import MODELS, QUANTIZERS, attached, fingerprint, mlp, pairs, seeded
from tests.readers import COARSE, Reader, readers, reads_parameters, x16


@pytest.mark.parametrize(("kind", "name"), pairs(QUANTIZERS, MODELS))
def test_names_of_classes(kind, name):
    """Each module's class has the plain one's names and is a subclass of it, or is it."""
    make, _ = MODELS[name]
    model = seeded(make)
    before = [type(m) for m in model.modules()]
    QUANTIZERS[kind](model)
    for module, cls in zip(model.modules(), before, strict=False):
        found = type(module)
        assert isinstance(module, cls)
        assert module.__class__ is found
        assert (found.__name__, found.__qualname__) == (cls.__name__, cls.__qualname__)
        assert (found.__module__, found.__doc__) == (cls.__module__, cls.__doc__)


@pytest.mark.parametrize("kind", ["diffq", "qat", "product"])
@pytest.mark.parametrize("name", MODELS)
def test_detach_restores_classes_and_leaves_nothing(name, kind):
    """After forwards and backwards in both modes, detach() leaves each module as it was."""
    make, make_input = MODELS[name]
    model = seeded(make)
    before = fingerprint(model)
    quantizer = QUANTIZERS[kind](model)
    quantizer.no_optimizer()
    model(make_input()).sum().backward()
    model.eval()(make_input())
    model.train()
    model.zero_grad()
    quantizer.detach()
    assert fingerprint(model) == before


def test_modules_without_quantized_tensors_keep_their_class():
    """A module that holds none, and has none below it, is left alone."""
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.ReLU()), nn.Dropout())
    diffq.QATQuantizer(model, min_size=0)
    assert type(model[1]) is nn.Sequential
    assert type(model[1][0]) is nn.ReLU
    assert type(model[2]) is nn.Dropout


def test_signatures_and_sources():
    """The signature, annotations and source of a forward are the user's."""

    class Documented(nn.Linear):
        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            """Scales."""
            return super().forward(x) * scale

    plain, (model, _) = Documented(16, 16), attached(lambda: Documented(16, 16))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == "Scales."
    assert inspect.getsource(model.forward) == inspect.getsource(Documented.forward)
    assert inspect.getsource(type(model))
    assert close(model.eval()(torch.ones(1, 16), scale=2.0), 2 * model(torch.ones(1, 16)))


def test_attributes_of_the_users_class():
    """Properties, class and static methods, `super()` and private names work as before."""

    class Base(nn.Linear):
        kept = 3

        def __init__(self):
            super().__init__(16, 16)
            self.__hidden = 5

        def hidden(self):
            return self.__hidden

        @property
        def transposed(self):
            return self.weight.t()

        @classmethod
        def named(cls):
            return cls.__name__, cls.kept

        @staticmethod
        def double(x):
            return 2 * x

        def forward(self, x):
            return self.double(x @ self.transposed)

    class Derived(Base):
        def forward(self, x):
            return super().forward(x) + self.hidden()

    model, quantizer = attached(Derived, **COARSE)
    assert model.named() == ("Derived", 3)
    assert close(model.transposed.detach(), model._parameters["weight"].t().detach())
    assert not close(model(torch.ones(1, 16)), model(torch.ones(1, 16)))
    values = diffq.restore_quantized_state(Derived(), quantizer.get_quantized_state())
    assert close(model.eval()(torch.ones(1, 16)), values(torch.ones(1, 16)))


def test_classes_with_their_own_access_to_attributes():
    """A class with `__getattr__` and `__setattr__` of its own goes on using them."""

    class Passing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.gain = nn.Parameter(torch.randn(16))
            self.written = []

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def __setattr__(self, name, value):
            if name == "note":
                self.written.append(value)
            super().__setattr__(name, value)

        def forward(self, x):
            self.note = self.weight.detach().clone()
            return self.inner(x * self.gain)

    model, _ = attached(lambda: Passing(Reader()))
    model(x16())
    assert same_bits(model.written[0], model.inner.seen[0])
    assert model.weight is model.inner.weight
    assert model.gain is model._parameters["gain"]
    with pytest.raises(AttributeError, match="absent"):
        _ = model.absent


def test_classes_that_register_their_subclasses():
    """A base class that is told of its subclasses, and wants arguments, hears of no new one."""

    known = []

    class Registered(nn.Module):
        def __init_subclass__(cls, name, **kwargs):
            super().__init_subclass__(**kwargs)
            known.append(name)

    class Mine(Registered, name="mine"):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(x)

    model, quantizer = attached(Mine)
    model(x16()).sum().backward()
    quantizer.detach()
    assert known == ["mine"]
    assert type(model) is Mine


def test_classes_with_a_metaclass():
    """A class whose metaclass is its own, such as ABCMeta, can be attached."""
    from abc import ABC, abstractmethod

    class Abstract(nn.Linear, ABC):
        @abstractmethod
        def name(self):
            """A name."""

    class Concrete(Abstract):
        def name(self):
            return "concrete"

    model, quantizer = attached(lambda: Concrete(16, 16))
    assert isinstance(model, Abstract)
    assert type(type(model)) is type(Concrete)
    assert model.name() == "concrete"
    model(x16())
    quantizer.detach()
    assert type(model) is Concrete


def test_classes_with_slots():
    """A class with slots keeps their values."""

    class Slotted(nn.Linear):
        __slots__ = ("note",)

    def make():
        model = Slotted(16, 16)
        model.note = 7
        return model

    model, quantizer = attached(make)
    assert model.note == 7
    model(x16())
    quantizer.detach()
    assert (type(model), model.note) == (Slotted, 7)


def test_new_instances_of_an_attached_class():
    """`type(module)(...)` makes a plain module, which can be copied, pickled and attached."""
    model, _ = attached(lambda: nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 8)), **COARSE)
    twin = nn.Sequential(type(model[0])(16, 16), type(model[1])(16, 8))
    inputs = x16()
    assert close(twin(inputs)[0], twin(inputs)[0])
    assert reads_parameters(twin)
    again = pickle.loads(pickle.dumps(twin))  # noqa: S301
    assert close(again(inputs)[0], twin(inputs)[0])
    diffq.DiffQuantizer(twin, min_size=0, **COARSE).no_optimizer()
    assert not close(twin(inputs)[0], twin(inputs)[0])


def test_subclasses_of_an_attached_class():
    """A class made of an attached module's class behaves as one made of the plain class."""
    model, _ = attached(mlp)
    derived = type("Derived", (type(model[0]),), {})(16, 16)
    assert isinstance(derived, nn.Linear)
    assert close(derived(torch.ones(1, 16)), derived(torch.ones(1, 16)))


def test_models_and_their_classes_are_freed():
    """Nothing keeps an attached model, or a class of its own, alive after a step."""

    def make():
        cls = type("Own", (nn.Linear,), {})
        return cls(16, 16)

    model, quantizer = attached(make)
    model(x16()).sum().backward()
    model.eval()(x16())
    seen = [weakref.ref(each) for each in (model, type(model), quantizer)]
    del model, quantizer
    gc.collect()
    assert all(each() is None for each in seen)


def test_a_forward_of_the_instance():
    """A `forward` that code sets on the instance, as offloading does, is called and can go."""
    model, quantizer = attached(readers, **COARSE)
    inner = model[0].forward
    model[0].forward = lambda x: 2 * inner(x)
    model(x16())
    model(x16())
    assert not same_bits(*model[0][0].seen)
    model.eval()(x16())
    assert reads_parameters(model)
    del model[0].forward
    quantizer.detach()
    assert type(model[0]) is nn.Sequential
