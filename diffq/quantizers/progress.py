"""A line that tells how far a long task is."""

from __future__ import annotations

import sys
import time

_BAR_WIDTH = 24


class ProgressBar:
    """A line on stderr that tells how far a task is; nothing where stderr is no terminal.

    Args:
        task: what is being done.
        total: steps in all.
        delay: seconds before the line appears, so that short tasks print nothing.
    """

    def __init__(self, task: str, total: int, delay: float = 1.0) -> None:
        self.task = task
        self.total = total
        self.done = 0
        self._due = time.monotonic() + delay

    def advance(self, steps: int, what: str) -> None:
        """Counts steps; `what` is being worked on."""
        self.done += steps
        if sys.stderr.isatty() and time.monotonic() >= self._due:
            full = _BAR_WIDTH * self.done // max(self.total, 1)
            bar = "#" * full + "." * (_BAR_WIDTH - full)
            self._write(f"{self.task} [{bar}] {self.done / max(self.total, 1):.0%} {what}")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            self._write("")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
