"""Containers of modules as the root: what is learned is none of their modules."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

from diffq.attach.learned import Learned
from diffq.attach.plan import LEARNED
from diffq.torch_inside.modules import children_in

#: Methods that change a container.
_CHANGES = (
    *("__setitem__", "__delitem__", "__iadd__", "__imul__", "add_module"),
    *("append", "extend", "insert", "pop", "update", "clear"),
)


class _Container:
    """A `Sequential` or a list that is the root: it holds the plain model's modules only."""

    _diffq_base: Any

    def __len__(self) -> int:
        return len(self._visible())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._visible().values())

    def __getitem__(self, index: Any) -> Any:
        container: Any = super()
        if not isinstance(index, slice):
            return container.__getitem__(index)
        modules = list(self._visible().items())[index]
        if isinstance(self, nn.Sequential):
            return self._diffq_base(OrderedDict(modules))
        return self._diffq_base([module for _, module in modules])

    def _visible(self) -> dict[str, Any]:
        return {
            k: module for k, module in children_in(self).items() if not isinstance(module, Learned)
        }


class _Mapping(_Container):
    """A `ModuleDict` that is the root."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self._visible())

    def __getitem__(self, key: str) -> Any:
        return children_in(self)[key]

    def keys(self) -> Any:
        """The names."""
        return self._visible().keys()

    def items(self) -> Any:
        """The names and modules."""
        return self._visible().items()

    def values(self) -> Any:
        """The modules."""
        return self._visible().values()


_CONTAINERS = {nn.Sequential: _Container, nn.ModuleList: _Container, nn.ModuleDict: _Mapping}


def mixins(base: type[nn.Module]) -> list[type]:
    """What reads a container; empty for other modules."""
    return [ours for kind, ours in _CONTAINERS.items() if issubclass(base, kind)]


def changes(base: type[nn.Module]) -> dict[str, Any]:
    """The methods that change a container; empty for other modules."""
    names = [name for name in _CHANGES if hasattr(base, name)] if mixins(base) else []
    return {name: _changing(getattr(base, name)) for name in names}


def _changing(method: Any) -> Any:
    """A method during which a container holds the plain model's modules only."""

    @functools.wraps(method)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Containers count and rename all modules that they hold.
        learned = children_in(self).pop(LEARNED, None)
        try:
            return method(self, *args, **kwargs)
        finally:
            if learned is not None:
                # The method may have made the dictionary anew.
                children_in(self)[LEARNED] = learned

    return change
