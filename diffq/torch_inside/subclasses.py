"""Subclasses of the classes of a user's modules, made without a word to those classes."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from functools import partial
from typing import Any


class Quiet:
    """Keeps classes that register their subclasses from seeing ours."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Tells the other bases nothing."""


def maker(base: type) -> Callable[..., Any]:
    """Makes classes like a class does, without what its own metaclass does besides."""
    metaclass = type(base)
    kind = ABCMeta if issubclass(metaclass, ABCMeta) else type
    return partial(kind.__new__, metaclass)


def tells_subclasses(base: type) -> bool:
    """Whether a class, or one of its bases, runs code of its own for each subclass."""
    own = (cls for cls in base.__mro__ if cls.__module__ not in ("builtins", "typing"))
    return any("__init_subclass__" in vars(cls) for cls in own)
