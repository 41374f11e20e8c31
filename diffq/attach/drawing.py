"""What training forwards compute with: drawn, and connected with its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffq.attach.batch import Batches
from diffq.attach.learned import Learned
from diffq.attach.sample import Sample, separate_versions
from diffq.attach.weight import WeightQuantizer
from diffq.torch_inside.graph import Tied, is_plain
from diffq.torch_inside.sharding import is_distributed


class Drawing:
    """Draws the samples of a model.

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
                each = zip(batch.quantizers, samples, connected, run.parts(), strict=True)
                for quantizer, sample, value, part in each:
                    sample.connected = _tied(quantizer, value, part)
            yield from zip(batch.quantizers, samples, strict=True)

    def connect(self, quantizer: WeightQuantizer, base: Tensor, sample: Sample) -> Tensor:
        """A value with a node of its own."""
        learned = beside(base, self._learned.part(quantizer.index))
        connected = base if sample.is_weight else quantizer.connect(base, sample, learned)
        return _tied(quantizer, connected, learned)


def beside(weight: Tensor, learned: Tensor | None) -> Tensor | None:
    """What is learned on the device of its weight."""
    if learned is None or learned.device == weight.device:
        return learned
    return learned.to(weight.device, non_blocking=True)


def _tied(quantizer: WeightQuantizer, value: Tensor, learned: Tensor | None) -> Tensor:
    """A value with what its quantizer learned in its graph, also when it learns no more."""
    if learned is None or quantizer.learning or not is_distributed():
        return value
    # DistributedDataParallel waits for the gradient of every parameter.
    tied: Tensor = Tied.apply(value, learned)  # type: ignore[no-untyped-call]
    return tied
