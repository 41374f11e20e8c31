"""Hand-written autograd functions, which are called for each tensor in each step."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction


def is_plain() -> bool:
    """Whether operations run at once, on tensors that hold their own numbers.

    Not while `torch.compile` traces, nor in transforms of `torch.func`.
    """
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def call(function: type[Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)`, without what torch does there for functions in general.

    It reads the signature of `forward` at each call, for default values of arguments, which
    takes longer than many a small layer computes.

    Args:
        function: has `setup_context`; its `forward` has no default values.
        *inputs: all arguments of `forward`.
    """
    if not is_plain():
        return function.apply(*inputs)  # type: ignore[no-untyped-call]
    # mypy knows no super() of a class that is a value.
    return super(Function, function).apply(*inputs)  # type: ignore[misc]


class Held(Protocol):
    """Something that is held for a function's output."""

    def release(self) -> None:
        """Lets go of it."""


def release_after(output: Tensor, held: Held) -> None:
    """Has something released once the gradient of a function's output is complete.

    A hook of the output could do it too, at several times the cost.

    Args:
        output: of a function whose backward begins with `release`.
        held: is not kept alive for it.
    """
    if isinstance(output.grad_fn, BackwardCFunction):
        node: Any = output.grad_fn
        node.held = weakref.ref(held)


def release(ctx: Any) -> None:
    """Releases what is held for the output of this function."""
    there = getattr(ctx, "held", None)
    held = there() if there is not None else None
    if held is not None:
        held.release()
