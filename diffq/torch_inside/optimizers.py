"""What optimizers of torch hold besides their groups and states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.optim import Optimizer


def has_step_hooks(optimizer: Any) -> bool:
    """Whether an optimizer calls hooks before its steps, as a wrapper may not."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


@contextmanager
def when_made(tell: Callable[[Optimizer], None]) -> Iterator[None]:
    """Tells of each optimizer that is made in the block, as soon as it has its groups.

    No scheduler can know the optimizer yet. The caller is alone in making optimizers meanwhile.
    """
    make = Optimizer.__init__

    @wraps(make)
    def make_and_tell(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        tell(self)

    Optimizer.__init__ = make_and_tell  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.__init__ = make  # type: ignore[method-assign]
