"""The classes of an attached model's modules: a property for each quantized tensor.

A module that holds a quantized tensor, and each module above one, gets a subclass of its class,
of the same name. The methods that compute are wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from diffq.attach import containers
from diffq.attach.forward import Forwards
from diffq.attach.methods import has_tensor, methods_that_read
from diffq.attach.place import Place
from diffq.attach.properties import QuantizedTensor
from diffq.errors import AttachError
from diffq.torch_inside.overrides import after_loads, before_moves
from diffq.torch_inside.recurrent import ReadsWeights, keep_weights
from diffq.torch_inside.sharding import is_managed
from diffq.torch_inside.subclasses import Quiet, maker, tells_subclasses

#: The attribute of a module that holds its `Cover`.
COVER = "_diffq_cover"

_BASE, _KEY = "_diffq_base", "_diffq_key"

_NOT_COPIED = ("__dict__", "__weakref__")


class Cover:
    """What a module of an attached model knows: of its own tensors, and of those below it.

    It refers to nothing above the module, so that a part of a model can be copied.

    Attributes:
        forwards: what all modules of the model share.
        own: the module's quantized tensors, by name.
        below: the same, and those of all modules below.
        attachment: what is attached; None in all modules but the root.
    """

    def __init__(
        self, forwards: Forwards, own: Mapping[str, Place], below: Sequence[Place]
    ) -> None:
        self.forwards = forwards
        self.own = own
        self.below = below
        self.attachment: Any = None

    def call(self, module: nn.Module, method: Any, args: Any, kwargs: Any) -> Any:
        """Calls a method of the module during which the model computes."""
        forwards = self.forwards
        stack = forwards.running()
        forward = stack[-1] if stack else forwards.current()
        # A checkpoint around an outermost call runs all of it again, its samples too.
        if forward is not None and (stack or forward.entry is not module):
            if self.own and is_managed(module):
                forwards.enter_part(forward, self.own.values())
            return method(module, *args, **kwargs)
        if self.attachment is not None:
            self.attachment.check_links()
        forward = forwards.enter(self.below, module)
        try:
            stack.append(forward)
            forwards.marks.append(forward)
            output = method(module, *args, **kwargs)
        finally:
            # No call of Python's, at which Ctrl-C could come in.
            del stack[:]
            if forwards.marks:
                forwards.marks.pop()
            for quantizer in forwards.quantizers:
                quantizer.slot = None
        forwards.leave(forward, output)
        return output


def cover_of(module: nn.Module) -> Cover | None:
    """The cover of a module; None if it has none."""
    cover: Cover | None = module.__dict__.get(COVER)
    return cover


def put_on(module: nn.Module, cover: Cover) -> None:
    """Gives a module its cover, and the class that reads it."""
    # The class may be ours already, as of an instance that was made of an attached one's class.
    plain, is_root = _without(type(module)), cover.attachment is not None
    try:
        module.__class__ = _covered(plain, tuple(cover.own), is_root)
    except TypeError as error:
        raise AttachError(
            f"{plain.__name__} cannot be given a class of its own: {error}. List torch.nn.Module "
            "before its other bases, as in class Encoder(nn.Module, ABC)."
        ) from error
    module.__dict__[COVER] = cover


def take_off(module: nn.Module) -> None:
    """Gives a module its class back, and removes its cover."""
    module.__class__ = _without(type(module))
    if module.__dict__.pop(COVER, None) is not None and isinstance(module, nn.RNNBase):
        keep_weights(module)


class _Recurrent(ReadsWeights, Quiet):
    """A recurrent layer with quantized weights."""

    def _computes(self) -> bool:
        cover = self.__dict__.get(COVER)
        return cover is not None and cover.forwards.current() is not None


def _covered(base: type[nn.Module], names: tuple[str, ...], is_root: bool) -> type[nn.Module]:
    """The subclass for a module; modules of one class share it, and it goes when unused."""
    key = base, names, is_root
    for known in base.__subclasses__():
        if vars(known).get(_KEY) == key:
            return known
    parametrized = any(isinstance(vars(base).get(name), property) for name in names)
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        COVER: None,
        _BASE: base,
        _KEY: key,
    }
    members.update((name, QuantizedTensor(name, vars(base).get(name))) for name in names)
    members["train"] = _watched(base.train)
    if is_root:
        members.update(before_moves(base, _forget))
    if names:
        members.update(after_loads(base, _look))
    make = maker(base)
    if parametrized:
        # torch deletes the properties of a parametrized class, and then takes its first base.
        own = {k: v for k, v in vars(base).items() if k not in _NOT_COPIED}
        first, *others = base.__bases__
        below = _covered(first, (), is_root)
        upper: type[nn.Module] = make(base.__name__, (below, *others), {**own, **members})
        return upper
    members["forward"] = _counted(base.forward)
    members.update(
        (n, _counted(method, of_tensors=True)) for n, method in methods_that_read(base, names)
    )
    # Only where they are needed: after some bases, such as ABC, Python takes no other first one.
    mixins: list[type] = []
    if is_root:
        members.update(containers.changes(base))
        mixins += containers.mixins(base)
    if issubclass(base, nn.RNNBase):
        mixins.append(_Recurrent)
    elif tells_subclasses(base):
        mixins.append(Quiet)
    covered: type[nn.Module] = make(base.__name__, (*mixins, base), members)
    return covered


def _without(cls: type[nn.Module]) -> type[nn.Module]:
    """A class without ours in it."""
    if _BASE in vars(cls):
        base: type[nn.Module] = vars(cls)[_BASE]
        return base
    if not hasattr(cls, _BASE):
        return cls
    members = {k: v for k, v in vars(cls).items() if k not in _NOT_COPIED}
    bases = tuple(_without(base) if issubclass(base, nn.Module) else base for base in cls.__bases__)
    plain: type[nn.Module] = maker(cls)(cls.__name__, bases, members)
    return plain


def _counted(method: Any, of_tensors: bool = False) -> Any:
    """A method during which the model computes.

    Args:
        method: of a class.
        of_tensors: only where one of its arguments is a tensor.
    """

    @functools.wraps(method)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Wrappers that were made while it was attached may outlive a quantizer.
        cover: Cover | None = getattr(self, COVER, None)
        if cover is None:
            return method(self, *args, **kwargs)
        if not is_compiling():
            # Almost all calls are in a forward that has all tensors.
            stack = cover.forwards.stacks.get(get_ident())
            if stack and not is_managed(self):
                return method(self, *args, **kwargs)
        if not cover.forwards.attached or (of_tensors and not has_tensor(args, kwargs)):
            return method(self, *args, **kwargs)
        if not is_compiling():
            return cover.call(self, method, args, kwargs)
        forwards = cover.forwards
        # Checkpoints allow no side effects on what is outside of them.
        if forwards.marks:
            return method(self, *args, **kwargs)
        forwards.marks.append(forwards.enter(cover.below, self))
        try:
            return method(self, *args, **kwargs)
        finally:
            forwards.marks.pop()
            for quantizer in forwards.quantizers:
                quantizer.slot = None

    # Compiled code is kept by code object, and only so much of it: each class needs its own.
    wrapper: Any = counted
    wrapper.__code__ = wrapper.__code__.replace(co_name=method.__name__)
    return wrapper


def _watched(method: Any) -> Any:
    """`train`, after which the quantized weights of the module are computed anew."""

    @functools.wraps(method)
    def train(self: Any, mode: bool = True) -> Any:
        cover: Cover | None = getattr(self, COVER, None)
        if cover is not None:
            if cover.attachment is not None:
                cover.forwards.always_quantized = False
            for place in cover.own.values():
                cover.forwards.switch(place, mode)
        return method(self, mode)

    return train


def _forget(module: Any) -> None:
    # A cast or move may end at the same address, so that the weight looks unchanged.
    cover = cover_of(module)
    if cover is not None:
        cover.forwards.forget()


def _look(module: Any) -> None:
    """Looks for zeros, which a load of the module, alone or in its model, may have brought."""
    cover = cover_of(module)
    if cover is not None:
        for place in cover.own.values():
            cover.forwards.look(place)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles and copies by the plain class, because ours cannot be found by its name."""
    ours: Any = next(cls for cls in type(self).__mro__ if _BASE in vars(cls))
    function, args, *rest = super(ours, self).__reduce_ex__(protocol)
    key = vars(ours)[_KEY]
    if function.__name__ == "__newobj__" and _BASE in vars(args[0]):
        return (_rebuild, vars(args[0])[_KEY], *rest)
    return (_rebuild_by, (key, function, args), *rest)


def _rebuild(*key: Any) -> Any:
    cls: Any = _covered(*key)
    return cls.__new__(cls)


def _rebuild_by(key: Any, function: Any, args: Any) -> Any:
    """A module of a class that says itself how it is made."""
    module = function(*args)
    if type(module) is key[0]:
        module.__class__ = _covered(*key)
    return module
