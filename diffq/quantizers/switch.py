"""Computing outside of a forward, and quantized weights whatever the mode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from diffq.attach.attachment import Attachment


class QuantizeSwitch:
    """Adds `computing`, and the earlier package's `quantize`, `unquantize`, `enter_quantize`.

    A model in eval mode computes with quantized weights by itself. These serve code that
    wants them in training mode too, or reads `module.weight` outside of a forward.
    """

    @property
    @abstractmethod
    def _attachment(self) -> Attachment:
        """What is on the model."""

    def quantize(self) -> None:
        """Makes the model compute with its quantized weights, until `unquantize()`.

        The weights that are trained stay as they are, and gradients pass straight
        through. A later `model.train()` ends it too.
        """
        self._attachment.forwards.always_quantized = True

    def unquantize(self) -> None:
        """Ends `quantize()`: each weight follows the mode of its module again."""
        self._attachment.forwards.always_quantized = False

    @contextmanager
    def enter_quantize(self) -> Iterator[None]:
        """`quantize()` for the length of a `with` block, which may be nested.

        In the block, `module.weight` is the quantized weight outside of forwards too.
        """
        forwards = self._attachment.forwards
        before, forwards.always_quantized = forwards.always_quantized, True
        try:
            with self._attachment.computing():
                yield
        finally:
            forwards.always_quantized = before

    def computing(self) -> AbstractContextManager[None]:
        """A block in which the model computes, for code that is no `forward`.

        Outside of a forward, `module.weight` is the Parameter. In the block it is what a forward
        computes with: a noisy weight in training, the quantized one in eval. Forwards in the
        block share its samples, until a weight changes.

            with quantizer.computing():
                logits = features @ model.head.weight.T
        """
        return self._attachment.computing()
