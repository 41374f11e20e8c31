"""What optimizers of torch hold besides their groups and states."""

from __future__ import annotations

from typing import Any


def has_step_hooks(optimizer: Any) -> bool:
    """Whether an optimizer calls hooks before its steps, as a wrapper may not."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks")
