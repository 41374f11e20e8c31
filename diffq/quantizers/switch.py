"""Quantized weights on demand, whatever the mode: the earlier package's three calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from diffq.attach.attachment import Attachment


class QuantizeSwitch:
    """Adds `quantize`, `unquantize` and `enter_quantize` to a quantizer.

    A model in eval mode computes with quantized weights by itself. These serve code that
    wants them in training mode too, or reads `module.weight` while it trains.
    """

    @property
    @abstractmethod
    def _attachment(self) -> Attachment:
        """What is on the model."""

    def quantize(self) -> None:
        """Makes the model compute with its quantized weights, until `unquantize()`.

        The weights that are trained stay as they are, and gradients pass straight
        through. A later `model.train()` ends it too.

        Raises:
            AttachError: the quantizer was detached.
        """
        for quantizer in self._attachment.quantizers:
            quantizer.eval()

    def unquantize(self) -> None:
        """Ends `quantize()`: each weight follows the mode of its module again.

        Raises:
            AttachError: the quantizer was detached.
        """
        attachment = self._attachment
        for quantizer in attachment.quantizers:
            quantizer.train(quantizer.plan.sites[0].owner(attachment.model).training)

    @contextmanager
    def enter_quantize(self) -> Iterator[None]:
        """`quantize()` for the length of a `with` block, which may be nested.

        Raises:
            AttachError: the quantizer was detached.
        """
        attachment = self._attachment
        switched = any(
            not quantizer.training and quantizer.plan.sites[0].owner(attachment.model).training
            for quantizer in attachment.quantizers
        )
        self.quantize()
        try:
            yield
        finally:
            if not switched:
                self.unquantize()
