"""What all quantizers of a model learn: one flat parameter of the root."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffq.attach.plan import LEARNED
from diffq.attach.weight import WeightQuantizer
from diffq.torch_inside.sharding import is_dtensor, local_part, local_start, whole


class Learned:
    """The flat parameter of a model's quantizers, and where each has its part.

    One parameter costs an optimizer one update, whatever the number of tensors. It is found by
    its name in the root's parameters, because sharding, moves and loading may put others there.

    Attributes:
        home: the parameters of the root.
        spans: by index of the quantizers, the first number and the shape of each part.
    """

    def __init__(
        self, root: nn.Module, quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor]
    ) -> None:
        self.home = root._parameters
        self.spans: list[tuple[int, torch.Size] | None] = []
        starts, count = [], 0
        for quantizer, weight in zip(quantizers, weights, strict=True):
            start = quantizer.start(weight)
            self.spans.append(None if start is None else (count, start.shape))
            if start is not None:
                starts.append(start.reshape(-1))
                count += start.numel()
        self._start: nn.Parameter | None = None
        if starts:
            device = starts[0].device
            self._start = nn.Parameter(torch.cat([start.to(device) for start in starts]))

    def register(self) -> None:
        """Makes the parameter one of the root."""
        if self._start is not None:
            self.home[LEARNED], self._start = self._start, None

    def unregister(self) -> None:
        """Takes the parameter out of the root."""
        self.home.pop(LEARNED, None)

    @property
    def parameter(self) -> Tensor | None:
        """The parameter as it is: whole, or this rank's shard; None if nothing is learned."""
        return self.home.get(LEARNED)

    def parts(self, flat: Tensor | None = None) -> list[Tensor | None]:
        """Each quantizer's part, by index.

        Args:
            flat: the whole parameter, or one like it; by default the present one, of which
                these are differentiable views.
        """
        if flat is None:
            parameter = self.parameter
            flat = None if parameter is None else whole(parameter)
        if flat is None:
            return [None] * len(self.spans)
        spans = [span for span in self.spans if span is not None]
        pieces = iter(torch.split(flat, [shape.numel() for _, shape in spans]))
        # Only codebooks have two dimensions, and views cost time.
        return [None if span is None else _shaped(next(pieces), span[1]) for span in self.spans]

    def part(self, index: int) -> Tensor | None:
        """One quantizer's part."""
        span, parameter = self.spans[index], self.parameter
        if span is None or parameter is None:
            return None
        start, shape = span
        return _shaped(whole(parameter).narrow(0, start, shape.numel()), shape)

    def counts(self) -> list[int]:
        """How many numbers each quantizer's part has, by index."""
        return [0 if span is None else span[1].numel() for span in self.spans]

    def settle(self, values: Sequence[Tensor | None]) -> None:
        """Writes what some parts are known to be, by index, where optimizers moved them on."""
        parameter = self.parameter
        if parameter is None or all(value is None for value in values):
            return
        held, first = parameter.detach(), 0
        if is_dtensor(parameter):
            held, first = local_part(held), local_start(parameter)
        for span, value in zip(self.spans, values, strict=True):
            if span is None or value is None:
                continue
            start = max(span[0], first)
            end = min(span[0] + value.numel(), first + len(held))
            if start < end:
                part = value.reshape(-1)[start - span[0] : end - span[0]]
                held[start - first : end - first].copy_(part)

    def start_again(self, make: Callable[[], Sequence[Tensor | None]]) -> None:
        """Gives the parts their first values, where memory was just given to them."""
        parts = self.parts()
        with torch.no_grad():
            for part, start in zip(parts, make(), strict=True):
                if part is not None and start is not None:
                    part.copy_(start)


def _shaped(part: Tensor, shape: torch.Size) -> Tensor:
    return part if len(shape) == 1 else part.view(shape)
