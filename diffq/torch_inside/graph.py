"""Where autograd stands: tracing, transforms, a backward that runs, tensors of an output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._guards import detect_fake_mode
from torch.nn import Module
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from diffq.torch_inside.tensors import version_of

T = TypeVar("T")
P = ParamSpec("P")

_KNOWS_EXPORTS = hasattr(torch.compiler, "is_exporting")


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs, whose tensors hold no numbers of their own."""
    return torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether `torch.jit.trace` runs."""
    tracing: Any = torch.jit
    return bool(tracing.is_tracing())


def _is_exported_by_2_6() -> bool:
    """Whether `torch.export` runs in torch 2.6, where that does not count as compiling."""
    if _KNOWS_EXPORTS or torch.compiler.is_dynamo_compiling():
        return False
    return detect_fake_mode() is not None


def is_exported() -> bool:
    """Whether `torch.export` runs."""
    return torch.compiler.is_exporting() if _KNOWS_EXPORTS else _is_exported_by_2_6()


def untraced(call: Callable[[], T]) -> T:
    """The result of a function as a constant to `torch.jit.trace`, which follows one thread."""
    grad = torch.is_grad_enabled()

    def work() -> T:
        with torch.set_grad_enabled(grad):
            return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def uncompiled(call: Callable[P, T]) -> Callable[P, T]:
    """A function that compiled code calls as it is. Imports the compiler no earlier than torch."""
    disabled: Callable[P, T] = _disable_dynamo(call)
    return disabled


def is_plain() -> bool:
    """Whether operations run at once, on tensors that hold their own numbers.

    Not while `torch.compile` or `torch.export` trace, nor in transforms of `torch.func`.
    """
    return not (torch.compiler.is_compiling() or is_transformed() or _is_exported_by_2_6())


def in_backward() -> bool:
    """Whether a backward runs, in which checkpoints compute parts of a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Kept:
    """Tensors that a node holds for several backwards, of parts of its outputs.

    `save_for_backward` lets go of all tensors after the first one.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors = tensors
        self._versions = [_version(tensor) for tensor in tensors]

    def tensors(self) -> Sequence[Tensor | None]:
        """The tensors.

        Raises:
            RuntimeError: one was written to, so that gradients would be wrong.
        """
        if [_version(tensor) for tensor in self._tensors] != self._versions:
            raise RuntimeError(
                "One of the variables needed for gradient computation has been modified by an "
                "inplace operation: a quantized weight, or what its quantizer learns, was written "
                "to between a forward and its backward."
            )
        return self._tensors


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or not is_plain() else version_of(tensor)


def in_reentrant_checkpoint() -> bool:
    """Whether a reentrant checkpoint runs its part of a forward, with gradients off.

    Its backward runs the part again, with gradients on. Nothing but the stack tells it from
    `torch.no_grad()`.
    """
    if torch.compiler.is_compiling():
        return False
    wanted, frame = CheckpointFunction.forward.__code__, sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not wanted:
        frame = frame.f_back
    return frame.f_code is wanted


def call_after_backward(call: Callable[[], None]) -> None:
    """Calls a function once the backward that runs has ended without an error."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def output_tensors(output: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in what a forward returns.

    Args:
        output: a tensor, a container, or an object with tensors in its attributes.
        depth: how many containers and objects that torch does not know may be in each other.
    """
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and isinstance(leaf, Mapping):
            yield from output_tensors(list(leaf.values()), depth - 1)
        elif depth and isinstance(leaf, list | tuple | set | frozenset):
            yield from output_tensors(list(leaf), depth - 1)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, type | Module):
            yield from output_tensors(list(vars(leaf).values()), depth - 1)


class Tied(torch.autograd.Function):
    """A tensor with another one in its graph, in name only."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        """The value."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of the value; none for the other."""
        return grad, None
