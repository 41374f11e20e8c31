"""What forwards compute with: drawn and connected with its gradients, or quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from diffq.attach.batch import Batches
from diffq.attach.learned import Learned
from diffq.attach.sample import Sample, separate_versions
from diffq.attach.weight import WeightQuantizer
from diffq.torch_inside.graph import Tied, is_plain
from diffq.torch_inside.sharding import is_distributed


class Drawing:
    """Draws the samples of a model, and quantizes its weights.

    Args:
        learned: what its quantizers learn.
    """

    def __init__(self, learned: Learned) -> None:
        self._learned = learned
        self._batches = Batches()

    def draw(
        self, tensors: Sequence[tuple[WeightQuantizer, Tensor]]
    ) -> Iterator[tuple[WeightQuantizer, Sample]]:
        """Samples of some weights, connected where gradients are on."""
        batches = self._batches.of(tensors)
        runs = self._learned.runs([batch.quantizers for batch, _ in batches])
        for (batch, bases), run in zip(batches, runs, strict=True):
            run = run.beside(bases[0])
            with torch.no_grad():
                samples = batch.draw(bases, run.detach())
            if is_plain():
                separate_versions(samples)
            if torch.is_grad_enabled():
                connected = batch.connect(bases, samples, run)
                for quantizer, sample, value in zip(
                    batch.quantizers, samples, connected, strict=True
                ):
                    sample.connected = value if quantizer.learning else _tied(value, run.flat)
            yield from zip(batch.quantizers, samples, strict=True)

    def quantize(self, tensors: Sequence[tuple[WeightQuantizer, Tensor]]) -> dict[int, Tensor]:
        """True quantized weights, by the index of their quantizer.

        Raises:
            WeightError: a weight or a bitwidth is not finite.
        """
        batches = self._batches.of([(quantizer, base.detach()) for quantizer, base in tensors])
        runs = self._learned.runs([batch.quantizers for batch, _ in batches])
        found: dict[int, Tensor] = {}
        for (batch, bases), run in zip(batches, runs, strict=True):
            learned = run.beside(bases[0]).detach()
            if not is_plain():
                # A block without gradients around others is one too many for exporters.
                values = batch.quantize(bases, learned)
            else:
                # Values that inference mode made would be of no use to a later backward.
                leave = not bases[0].is_inference()
                with torch.inference_mode(False) if leave else nullcontext(), torch.no_grad():
                    # Slices of one buffer share their version.
                    values = [value.data for value in batch.quantize(bases, learned)]
            indices = (quantizer.index for quantizer in batch.quantizers)
            found.update(zip(indices, values, strict=True))
        return found

    def connect(self, quantizer: WeightQuantizer, base: Tensor, sample: Sample) -> Tensor:
        """A value with a node of its own."""
        learned = beside(base, self._learned.part(quantizer.index))
        connected = base if sample.is_weight else quantizer.connect(base, sample, learned)
        return connected if quantizer.learning else _tied(connected, learned)

    def plain(self, quantizer: WeightQuantizer, base: Tensor) -> Tensor:
        """A tensor as it is, in the float phase of a plan for the size."""
        return base if quantizer.index else _tied(base, self._learned.parameter)


def beside(weight: Tensor, learned: Tensor | None) -> Tensor | None:
    """What is learned on the device of its weight."""
    if learned is None or learned.device == weight.device:
        return learned
    return learned.to(weight.device, non_blocking=True)


def _tied(value: Tensor, learned: Tensor | None) -> Tensor:
    """A value with what is learned in its graph, which training leaves alone."""
    if learned is None or not is_distributed():
        return value
    # DistributedDataParallel waits for the gradient of every parameter.
    tied: Tensor = Tied.apply(value, learned)  # type: ignore[no-untyped-call]
    return tied
