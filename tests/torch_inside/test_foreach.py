"""Operations on lists of tensors: what each computes."""

import math

import pytest
import torch

from diffq.torch_inside import foreach

VALUES = [[1.0, 2.5], [-3.0, 0.0, 8.0]]
NUMBERS = [2.0, 4.0]

#: Operation: its second argument, and what it makes of an element and that tensor's number.
NEW = {
    "div": (NUMBERS, lambda x, number: x / number),
    "mul": (NUMBERS, lambda x, number: x * number),
    "sub": (3.0, lambda x, _: x - 3),
}
IN_PLACE = {
    "add_": (NUMBERS, lambda x, number: x + number),
    "exp_": (None, lambda x, _: math.exp(x)),
    "mul_": (NUMBERS, lambda x, number: x * number),
    "round_": (None, lambda x, _: round(x)),
    "sub_": (1.0, lambda x, _: x - 1),
}


def _tensors(values=VALUES):
    return [torch.tensor(each) for each in values]


def _expected(function):
    pairs = zip(VALUES, NUMBERS, strict=True)
    return _tensors([[float(function(x, number)) for x in values] for values, number in pairs])


def test_every_operation_is_tested():
    """No operation is without a right value here."""
    public = {name for name, value in vars(foreach).items() if callable(value)}
    assert public == {*NEW, *IN_PLACE, "sigmoid", "addcmul"}


@pytest.mark.parametrize("name", NEW)
def test_new_tensors(name):
    """An operation gives new tensors of the right values, and leaves its arguments alone."""
    argument, function = NEW[name]
    tensors = _tensors()
    results = getattr(foreach, name)(tensors, argument)
    torch.testing.assert_close(list(results), _expected(function))
    assert [tensor.tolist() for tensor in tensors] == VALUES


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    """An operation whose name ends in an underscore writes the right values to its tensors."""
    argument, function = IN_PLACE[name]
    tensors = _tensors()
    getattr(foreach, name)(tensors, *([] if argument is None else [argument]))
    torch.testing.assert_close(tensors, _expected(function))


def test_sigmoid():
    """`sigmoid` gives 1 / (1 + exp(-x))."""
    expected = _expected(lambda x, _: 1 / (1 + math.exp(-x)))
    torch.testing.assert_close(list(foreach.sigmoid(_tensors())), expected)


def test_addcmul():
    """`addcmul` adds the products of two lists, times a value, to the first."""
    results = foreach.addcmul(_tensors(), _tensors(), _tensors(), value=-1)
    torch.testing.assert_close(list(results), _expected(lambda x, _: x - x * x))


def test_tensors_as_arguments():
    """`mul_` takes one 0-dim tensor for all, and `div` a tensor for each."""
    tensors = _tensors()
    foreach.mul_(tensors, torch.tensor(2.0))
    torch.testing.assert_close(tensors, _expected(lambda x, _: x * 2))
    halves = foreach.div(tensors, _tensors([[number] for number in NUMBERS]))
    torch.testing.assert_close(list(halves), _expected(lambda x, number: x * 2 / number))


def test_gradients():
    """The operations that the slope of the bits is made of are differentiable."""

    def slopes(*logits):
        shares = foreach.sigmoid(logits)
        results = list(foreach.addcmul(shares, shares, shares, value=-1))
        foreach.mul_(results, NUMBERS)
        return tuple(results)

    logits = [tensor.double().requires_grad_() for tensor in _tensors()]
    assert torch.autograd.gradcheck(slopes, logits)


def test_compiled():
    """torch.compile traces the operations without a break in the graph."""

    def work(tensors):
        results = foreach.mul(tensors, NUMBERS)
        foreach.sub_(results, 1)
        return list(results)

    compiled = torch.compile(work, backend="eager", fullgraph=True)
    expected = _expected(lambda x, number: x * number - 1)
    torch.testing.assert_close(compiled(_tensors()), expected)
