"""What batches of weight quantizers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from diffq.attach.sample import Sample
from diffq.numerics.noise import Drawn


def samples_of(drawn: Drawn, weights: Sequence[Tensor]) -> list[Sample]:
    """A sample of each weight of a batch."""
    each = enumerate(zip(weights, drawn.flat.split(drawn.values), strict=True))
    return [Sample(weight, value, drawn, place) for place, (weight, value) in each]


def drawn_of(samples: Sequence[Sample]) -> tuple[Drawn, list[Tensor]]:
    """What the samples of a batch were drawn with, and the value of each."""
    return cast(Drawn, samples[0].drawn), [sample.value for sample in samples]


def only_of(sample: Sample) -> tuple[Drawn, list[Tensor]]:
    """The same of one of the samples, for a node of its own."""
    return cast(Drawn, sample.drawn).only(sample.place), [sample.value]
