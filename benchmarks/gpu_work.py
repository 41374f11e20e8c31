"""The work that a call gives to a GPU, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Work(NamedTuple):
    """Kernels, copies and fills on a GPU.

    Attributes:
        launches: their number.
        ms: milliseconds that they take, one after the other.
    """

    launches: int
    ms: float


def work_of(call: Callable[[], object]) -> Work:
    """The work of a call, and of nothing that was queued before it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return total(profiler.events() or ())


def total(events: Iterable[Any]) -> Work:
    """The sum of the profiler's events that ran on a GPU, without the names of ranges on it."""
    ran = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return Work(len(ran), sum(event.time_range.elapsed_us() for event in ran) / 1000)
