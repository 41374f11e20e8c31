"""The two comparisons of tests: one for what is promised bit for bit, one for what is computed.

Weights, levels, files, resumed trainings and random numbers are promised bit for bit. Outputs and
gradients of matrix products are not, nor what is computed from them: processors, memory layouts
and numbers of threads round them differently. `tests/test_comparisons.py` holds tests to that.
"""

import torch
from torch.utils._pytree import tree_flatten

from tests.holder import bits_of

#: How many roundings, in units of the last place, the sums of small models add up.
FEW = 64


def same_bits(one, other):
    """Whether tensors, or dicts and sequences of them in the same order, are bit-equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return bits_of(one) == bits_of(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return same_bits(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return type(one) is type(other) and one == other


def close(one, other, roundings=FEW):
    """Whether tensors, or dicts and sequences of them, are equal up to the rounding of sums.

    A difference is measured against the largest value of its tensor, because where large terms
    cancel, what is left is as wrong as they were. What cancels to nothing, such as the gradient of
    a bias that a norm takes away again, is measured against the largest of all values.

    Args:
        one: what was computed.
        other: what it is compared with.
        roundings: by how many units in the last place of the largest value they may differ. The
            half types have few digits, which only the last rounding takes: there it is an eighth.
    """
    (ones, structure), (others, wanted) = tree_flatten(one), tree_flatten(other)
    largest = max(map(_largest, others), default=0.0)
    return structure == wanted and all(
        _near(a, b, max(roundings * _largest(b), FEW * largest))
        for a, b in zip(ones, others, strict=True)
    )


def _largest(tensor):
    return 0.0 if tensor is None or not tensor.numel() else tensor.abs().max().item()


def _near(one, other, roundings):
    """Whether two tensors differ by no more than so many units in the last place of 1."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    kind = torch.finfo(other.dtype)
    slack = roundings * kind.eps / (8 if kind.bits == 16 else 1)
    return bool(((one - other).abs() <= slack).all())
