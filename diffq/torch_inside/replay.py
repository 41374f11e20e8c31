"""Activation checkpointing: is a forward running for the first time, or again?"""

from __future__ import annotations

import sys

import torch
from torch.utils.checkpoint import CheckpointFunction


def in_backward() -> bool:
    """Whether a backward runs, in which checkpoints compute parts of a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
