"""The two comparisons of tests: one for what is promised bit for bit, one for what is computed.

Weights, levels, files, resumed trainings and random numbers are promised bit for bit. Outputs and
gradients of matrix products are not, nor what is computed from them: processors, memory layouts
and numbers of threads round them differently. `tests/test_comparisons.py` holds tests to that.
"""

import torch

from tests.holder import bits_of


def same_bits(one, other):
    """Whether tensors, or dicts and sequences of them in the same order, are bit-equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return bits_of(one) == bits_of(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return same_bits(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return type(one) is type(other) and one == other


def close(one, other, roundings=64):
    """Whether tensors, or dicts and sequences of them, are equal up to the rounding of sums.

    A difference is measured against the largest value of its tensor: where large terms cancel,
    what is left is as wrong as they were.

    Args:
        one: what was computed.
        other: what it is compared with.
        roundings: by how many units in the last place of the largest value they may differ. The
            half types have few digits, which only the last rounding takes: there it is an eighth.
    """
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k], roundings) for k in one)
    if isinstance(other, list | tuple):
        pairs = list(zip(one, other, strict=True))
        return all(close(a, b, roundings) for a, b in pairs)
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.finfo(other.dtype).bits == 16:
        roundings /= 8
    largest = other.abs().max().item() if other.numel() else 0.0
    slack = roundings * torch.finfo(other.dtype).eps * largest
    return bool(((one - other).abs() <= slack).all())
