"""Which methods of a class read a quantized tensor, and so compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import getattr_static, unwrap
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from diffq.torch_inside.graph import output_tensors


def methods_that_read(base: type[nn.Module], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The methods of a class, not of torch's, that read one of its quantized tensors."""
    own = [cls for cls in base.__mro__ if cls.__module__.split(".")[0] != "torch"]
    used: dict[str, set[str]] = {}
    for cls in own:
        for name, member in vars(cls).items():
            used.setdefault(name, set()).update(_names_in(member))
    # What calls a method that reads, or takes a property that does, reads too.
    found, before = set(names), -1
    while before != len(found):
        before = len(found)
        found |= {n for n, u in used.items() if not u.isdisjoint(found) and not _is_special(n)}
    for name in used:
        method = getattr_static(base, name, None)
        if name in found and name != "forward" and isinstance(method, FunctionType):
            yield name, method


def has_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a tensor is among the arguments of a call."""
    return next(output_tensors([*args, *kwargs.values()]), None) is not None


def _is_special(name: str) -> bool:
    return name.startswith("__") and name != "__call__"


def _names_in(member: Any) -> set[str]:
    """The names that a method or a property uses, in the functions in it too."""
    function = member.fget if isinstance(member, property) else member
    codes = [getattr(unwrap(function), "__code__", None)] if callable(function) else []
    names: set[str] = set()
    for code in codes:
        if code is not None:
            names.update(code.co_names)
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return names
