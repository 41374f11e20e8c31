"""Where autograd stands: what each function tells, inside and outside of what it tells of."""

import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffq.torch_inside.graph import (
    Tied,
    call_after_backward,
    in_backward,
    in_reentrant_checkpoint,
    is_exported,
    is_plain,
    is_traced,
    is_transformed,
    output_tensors,
    untraced,
)


class Telling(nn.Module):
    """Keeps what a function tells while the forward runs, if it tells something."""

    def __init__(self, tell):
        super().__init__()
        self.tell, self.told = tell, []

    def forward(self, x):
        told = self.tell()
        if told is not None:
            self.told.append(told)
        return x * 2


def _in_grad(telling):
    torch.func.grad(lambda x: telling(x).sum())(torch.ones(2))


def _in_vmap(telling):
    torch.func.vmap(telling)(torch.ones(2, 2))


def _in_jvp(telling):
    torch.func.jvp(telling, (torch.ones(2),), (torch.ones(2),))


def _in_trace(telling):
    torch.jit.trace(telling, torch.ones(2), check_trace=False)


def _in_export(telling):
    torch.export.export(telling, (torch.ones(2),), strict=False)


def _in_backward(telling):
    x = torch.ones(2, requires_grad=True)
    x.register_hook(telling)
    x.sum().backward()


def _in_no_grad(telling):
    with torch.no_grad():
        telling(torch.ones(2))


@pytest.mark.parametrize("run", [_in_grad, _in_vmap, _in_jvp])
def test_transformed(run):
    """A transform of `torch.func` is told while it runs, and not after it."""
    telling = Telling(is_transformed)
    run(telling)
    assert telling.told == [True]
    assert not is_transformed()


@pytest.mark.parametrize("run", [_in_no_grad, _in_backward, _in_trace])
def test_not_transformed(run):
    """What computes with tensors of their own numbers is no transform."""
    telling = Telling(is_transformed)
    run(telling)
    assert telling.told == [False]


def test_traced():
    """`torch.jit.trace` is told while it runs, and nothing else is."""
    telling = Telling(is_traced)
    _in_trace(telling)
    _in_no_grad(telling)
    _in_grad(telling)
    assert telling.told == [True, False, False]


def test_exported():
    """`torch.export` is told while it runs."""
    told = []
    # Not kept by the module: export takes back what a forward changes in one.
    telling = Telling(lambda: told.append((is_exported(), is_plain())))
    _in_no_grad(telling)
    _in_trace(telling)
    assert told == [(False, True), (False, True)]
    _in_export(telling)
    assert set(told[2:]) == {(True, False)}
    assert not is_exported()


def test_plain():
    """Operations run at once outside of transforms, and of what torch.compile traces."""
    telling = Telling(is_plain)
    _in_no_grad(telling)
    _in_vmap(telling)
    assert telling.told == [True, False]
    compiled = torch.compile(lambda x: x if is_plain() else x + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(1)), torch.full((1,), 2.0))


def test_untraced():
    """What a function gives is a constant of a trace, computed with gradients on or off as here."""
    traced = torch.jit.trace(lambda x: untraced(lambda: x * 2) + x, torch.ones(1))
    torch.testing.assert_close(traced(torch.tensor([5.0])), torch.tensor([7.0]))
    x = torch.ones(1, requires_grad=True)
    assert untraced(lambda: x * 2).requires_grad
    with torch.no_grad():
        assert not untraced(lambda: x * 2).requires_grad


def test_untraced_error():
    """An error of the function reaches the caller."""
    with pytest.raises(ZeroDivisionError):
        untraced(lambda: 1 // 0)


def test_backward():
    """A backward is told while it runs, in this thread, and not before or after it."""
    telling = Telling(in_backward)
    _in_no_grad(telling)
    _in_backward(telling)
    assert telling.told == [False, True]
    assert not in_backward()


def test_backward_of_another_thread():
    """A backward that another thread runs is not this one's."""
    started, told = threading.Event(), threading.Event()

    def hook(_):
        started.set()
        told.wait(30)

    x = torch.ones(2, requires_grad=True)
    x.register_hook(hook)
    thread = threading.Thread(target=x.sum().backward)
    thread.start()
    assert started.wait(30)
    telling = in_backward()
    told.set()
    thread.join()
    assert not telling


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_of_a_checkpoint(reentrant):
    """Checkpoints of both kinds compute a part of a forward again in the backward."""
    telling = Telling(in_backward)
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: telling(x).exp(), x, use_reentrant=reentrant).sum().backward()
    assert telling.told == [False, True]


def test_reentrant_checkpoint():
    """A reentrant checkpoint is told in its first run, and not when it runs again."""
    telling = Telling(in_reentrant_checkpoint)
    x = torch.ones(2, requires_grad=True)
    checkpoint(telling, x, use_reentrant=True).sum().backward()
    assert telling.told == [True, False]
    assert not in_reentrant_checkpoint()


def test_no_reentrant_checkpoint():
    """Neither the other kind of checkpoint nor `torch.no_grad()` is a reentrant one."""
    telling = Telling(in_reentrant_checkpoint)
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: telling(x).exp(), x, use_reentrant=False).sum().backward()
    _in_no_grad(telling)
    assert telling.told == [False, False, False]


def _calling():
    """A parameter, a loss whose backward asks for a call, and what happens in turn."""
    happened = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: call_after_backward(lambda: happened.append("call")))
    x.register_hook(lambda _: happened.append("gradient"))
    return x, y.sum(), happened


def test_call_after_backward():
    """The call comes once, after the last gradient, and not in the next backward."""
    x, loss, happened = _calling()
    loss.backward()
    assert happened == ["gradient", "call"]
    (x * 2).sum().backward()
    assert happened == ["gradient", "call", "gradient"]


def test_no_call_after_an_error():
    """A backward that fails does not call, nor does the next one."""
    x, loss, happened = _calling()
    x.register_hook(lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    torch.ones(2, requires_grad=True).sum().backward()
    assert happened == ["gradient"]


Pair = namedtuple("Pair", "one other")


@dataclass
class Output:
    """What a model may return."""

    one: Any
    other: Any = None
    unset: Any = field(init=False)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, [b]),
        lambda a, b: {"a": a, "b": {"c": b}},
        lambda a, b: OrderedDict(a=a, b=b),
        lambda a, b: Pair(a, b),
        lambda a, b: Output(a, b),
        lambda a, b: Output([a, Output(b)], "text"),
        lambda a, b: [Output({"a": a}), (None, 3, Output(None, b))],
    ],
    ids=["tuple", "dict", "ordered", "named", "dataclass", "nested", "in containers"],
)
def test_output_tensors(wrap):
    """The tensors of containers and dataclasses are found in order, however nested."""
    a, b = torch.ones(1), torch.zeros(2)
    found = list(output_tensors(wrap(a, b)))
    assert len(found) == 2
    assert found[0] is a
    assert found[1] is b


def test_output_without_tensors():
    """Other objects hold none; a class of dataclasses is not an output of it."""
    for output in (None, 3, "text", object(), Output, Output(1)):
        assert list(output_tensors(output)) == []


def test_tied():
    """A tied tensor is a view of its value, with its gradient; the other is in its graph."""
    value, other = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    tied = Tied.apply(value, other)
    assert tied.data_ptr() == value.data_ptr()
    tied.mul(3).sum().backward()
    torch.testing.assert_close(value.grad, torch.full((2,), 3.0))
    assert other.grad is None
    assert len([node for node, _ in tied.grad_fn.next_functions if node is not None]) == 2
