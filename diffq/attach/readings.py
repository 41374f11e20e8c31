"""Who has read a weight: bits learn from the size only where noise acts on the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffq.torch_inside.graph import in_reentrant_checkpoint


@dataclass
class Readings:
    """The readings of one weight, which replicas of its module share.

    A step is what lies between two steps of the optimizer of the learned parameters.

    Attributes:
        ever: a forward has read the weight.
        learned: training has read it with gradients in this step.
        without_grad: training has read it with gradients off in this step.
        last: what `learned` was at the end of the last step with a reading.
        before: what `learned` was at the end of the step before. True at first, so that a
            loop which asks for the size before its forward resumes as it went on.
    """

    ever: bool = False
    learned: bool = False
    without_grad: bool = False
    last: bool = False
    before: bool = True

    def note(self, training: bool) -> None:
        """Notes a reading in training or in eval."""
        self.ever = True
        if not training:
            return
        if torch.is_grad_enabled() or in_reentrant_checkpoint():
            self.learned = True
        else:
            self.without_grad = True

    @property
    def in_this_step(self) -> bool:
        """Whether training has read the weight in this step."""
        return self.learned or self.without_grad

    @property
    def learns(self) -> bool:
        """Whether noise acts on the loss of this step.

        Other libraries have checkpoints that read with gradients off first and with them on in
        backward. What the last step's reading turned out to be stands for that of this step.
        """
        return self.learned or (self.without_grad and self.last)

    def end_step(self) -> None:
        """Begins another step of the optimizer."""
        if self.in_this_step:
            self.last = self.learned
        self.before = self.learned
        self.learned = self.without_grad = False
