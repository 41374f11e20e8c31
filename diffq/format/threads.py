"""Work on several cores: NumPy, zstd and CRC-32 release the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

# Beyond this, memory rather than cores sets the pace, and each thread needs scratch space.
_MOST = 8


def in_threads(
    work: Callable[[_Task], _Result], tasks: Sequence[_Task], threads: int | None
) -> list[_Result]:
    """Results of `work` in the order of the tasks; raises the first task's error.

    Args:
        work: called with each task.
        tasks: what to work on.
        threads: number of threads; None for one a core, up to 8.
    """
    count = min(_cores() if threads is None else threads, len(tasks))
    if count <= 1:
        return [work(task) for task in tasks]
    # Imported here: a reader of headers does not need it, and it takes a while.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, tasks))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST)
    return min(os.cpu_count() or 1, _MOST)
