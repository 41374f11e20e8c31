"""What all quantizers of a model learn: one flat parameter, in a module of its own.

The module is the last child of the root. So the order of a model's parameters stays that of the
plain model, followed by what is learned, also in wrappers such as averages: a parameter of the
root itself would come before those of its children.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diffq.attach.batch import Run, shaped
from diffq.attach.weight import WeightQuantizer
from diffq.errors import OptimizerError
from diffq.numerics.segments import joined_slices
from diffq.torch_inside.modules import parameters_in
from diffq.torch_inside.overrides import Overridable
from diffq.torch_inside.sharding import is_dtensor, local_part, local_start, whole

#: Where a schedule says which plan it follows; the first number says whether training is plain.
PLAN = slice(1, 5)


class Learned(Overridable):
    """The flat parameter of a model's quantizers, and where each has its part.

    One parameter costs an optimizer one update, whatever the number of tensors.

    Attributes:
        learned: the parameter, float32 [numbers]; None if nothing is learned.
        spans: by index of the quantizers, the first number and the shape of each part.
        schedule: where a plan of training stands, float64 (see `diffq.quantizers.course`); the
            first number tells whether training reads the plain weights. None without a plan.
        follows: whether a plan is followed.
        plain: what the first number says, while a plan is followed.
    """

    learned: nn.Parameter | None

    def __init__(self, quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.quantizers = quantizers
        self.spans: list[tuple[int, torch.Size] | None] = []
        starts, count = [], 0
        for quantizer, weight in zip(quantizers, weights, strict=True):
            start = quantizer.start(weight)
            self.spans.append(None if start is None else (count, start.shape))
            if start is not None:
                starts.append(start.reshape(-1))
                count += start.numel()
        device = starts[0].device if starts else None
        flat = torch.cat([start.to(device) for start in starts]) if starts else None
        self.register_parameter("learned", None if flat is None else nn.Parameter(flat))
        # What hooks of offloading have put in place, while a forward of the root runs.
        self._on_hand: Tensor | None = None
        self._was_meta = False
        self.schedule: Tensor | None = None
        self.plain = self.follows = False

    def forward(self, x: Any = None) -> Any:
        """The input, for code that calls all children; keeps what hooks of offloading brought."""
        learned = self.parameter
        self._on_hand = None if learned is None else learned.detach().clone()
        return x

    @property
    def parameter(self) -> Tensor | None:
        """The parameter as it is: whole, or this rank's shard; None if nothing is learned."""
        return parameters_in(self)["learned"]

    def flat(self) -> Tensor | None:
        """The whole parameter, to compute with."""
        parameter = self.parameter
        if parameter is None:
            return None
        if parameter.is_meta and self._on_hand is not None:
            return self._on_hand
        return whole(parameter)

    def parts(self, flat: Tensor | None = None) -> list[Tensor | None]:
        """Each quantizer's part, by index.

        Args:
            flat: the whole parameter, or one like it; by default the present one, of which
                these are differentiable views.
        """
        flat = self.flat() if flat is None else flat
        return Run(flat, tuple(map(self._shape, self.quantizers))).parts()

    def runs(self, batches: Sequence[Sequence[WeightQuantizer]]) -> list[Run]:
        """What the quantizers of each batch learn, differentiable.

        Neighbours are one slice, and all slices one node: the gradient is joined in one pass.
        """
        flat = self.flat()
        shapes = [tuple(self._shape(q) for q in quantizers) for quantizers in batches]
        if flat is None:
            return [Run(None, each) for each in shapes]
        slices = [self._slices(quantizers) for quantizers in batches]
        ends = {end for each in slices for piece in each for end in piece}
        cuts = sorted({0, flat.numel(), *ends})
        lengths = [end - start for start, end in pairwise(cuts)]
        pieces = dict(zip(cuts[:-1], torch.split(flat, lengths), strict=True))
        runs = []
        for each, shape in zip(slices, shapes, strict=True):
            found = [pieces[start] for start, _ in each]
            joined = found[0] if len(found) == 1 else torch.cat(found) if found else None
            runs.append(Run(joined, shape))
        return runs

    def _shape(self, quantizer: WeightQuantizer) -> torch.Size | None:
        span = self.spans[quantizer.index]
        return None if span is None else span[1]

    def _slices(self, quantizers: Sequence[WeightQuantizer]) -> list[tuple[int, int]]:
        spans = (self.spans[quantizer.index] for quantizer in quantizers)
        return joined_slices(
            (span[0], span[0] + span[1].numel()) for span in spans if span is not None
        )

    def place(self, flat: Tensor, quantizers: Sequence[WeightQuantizer], numbers: Tensor) -> None:
        """Sets what some quantizers have of a tensor like the flat parameter.

        Args:
            flat: [numbers].
            quantizers: in any order.
            numbers: theirs, one after the other.
        """
        slices = self._slices(quantizers)
        parts = torch.split(numbers, [end - start for start, end in slices])
        for (start, end), part in zip(slices, parts, strict=True):
            flat[start:end] = part

    def part(self, index: int) -> Tensor | None:
        """One quantizer's part."""
        span, flat = self.spans[index], self.flat()
        if span is None or flat is None:
            return None
        start, shape = span
        return shaped(flat.narrow(0, start, shape.numel()), shape)

    def counts(self) -> list[int]:
        """How many numbers each quantizer's part has, by index."""
        return [0 if span is None else span[1].numel() for span in self.spans]

    def refuse_training(self) -> None:
        """Raises OptimizerError if there are numbers that training should learn."""
        learns = any(quantizer.learning for quantizer in self.quantizers)
        if learns and self.learned is not None and self.learned.requires_grad:
            raise OptimizerError(
                "The quantizer learns parameters that no optimizer was given. "
                "Call quantizer.setup_optimizer(optimizer) before training; "
                "if they are meant to stay as they are, call quantizer.no_optimizer()."
            )

    def write(self, values: Sequence[Tensor | None]) -> None:
        """Sets some parts, by index; None leaves a part as it is."""
        parameter = self.parameter
        if parameter is None or all(value is None for value in values):
            return
        # Not in place to autograd: a state may be taken between a forward and its backward.
        held, first = parameter.data, 0
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

    def settle(self) -> None:
        """Sets what training no longer learns, which momentum may have moved on."""
        self.write([quantizer.settled() for quantizer in self.quantizers])
        if self.learned is not None and not any(q.learning for q in self.quantizers):
            self.learned.grad = None

    def follow(self, schedule: Tensor | None) -> None:
        """Follows a plan from where it stands; None ends that."""
        self.schedule, self.follows = schedule, schedule is not None
        self.plain = schedule is not None and bool(schedule[0])

    def take(self, schedule: Tensor) -> None:
        """Takes up the numbers of a state dict, or keeps them until a plan asks for them."""
        self.schedule = schedule.detach().to("cpu", torch.float64, copy=True)
        self.plain = self.follows and bool(schedule[0])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles follow no plan, until `setup_optimizer` is called for them."""
        return {**self.__dict__, "follows": False, "plain": False}

    def settings(self) -> dict[str, Any]:
        """The quantizers, as a state dict describes them.

        Returns:
            "tensors": for each name the stage, how many numbers are the tensor's in `learned` and
            in `kept`, and its method and settings.
        """
        tensors = {
            q.plan.name: [q.stage, count, _count(q.kept()), {"method": q.method, **q.meaning()}]
            for q, count in zip(self.quantizers, self.counts(), strict=True)
        }
        return {"tensors": tensors}

    @property
    def kept(self) -> Tensor:
        """Integers that methods hold besides, such as indices of blocks, int32."""
        found = [each.reshape(-1) for q in self.quantizers if (each := q.kept()) is not None]
        if not found:
            raise AttributeError("No quantizer of this model keeps integers.")
        return torch.cat(found)

    def get_extra_state(self) -> Tensor:
        """The settings as characters.

        They are numbers of at most 126, of one length from the first step to the last, so that
        averages of state dicts keep them.
        """
        return characters(self.settings())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the settings are checked before anything is loaded (`StateHooks`)."""

    def before_saving(self) -> None:
        """Settles what is learned."""
        self.settle()

    def saved_besides(self) -> dict[str, Tensor]:
        """The integers, where a method has some, and the state of a plan for the size."""
        has_some = any(quantizer.kept() is not None for quantizer in self.quantizers)
        besides = {"kept": self.kept} if has_some else {}
        if self.follows and self.schedule is not None:
            besides["schedule"] = self.schedule
        return besides

    def moving(self, move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Keeps the dtype."""
        self._was_meta = self.learned is not None and self.learned.is_meta

        def keep_dtype(tensor: Tensor) -> Tensor:
            # Bitwidths and scales in half precision would hardly learn: casts are for weights.
            moved = move(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return keep_dtype

    def after_moving(self) -> None:
        """Starts again after to_empty(), which gives memory without numbers, before a load."""
        if self._was_meta and self.learned is not None and not self.learned.is_meta:
            zero = self.learned.new_zeros(())
            self.write([q.start(zero.expand(q.plan.shape)) for q in self.quantizers])


def characters(settings: dict[str, Any]) -> Tensor:
    """Settings as the float32 characters that a state dict holds."""
    text = json.dumps(settings, separators=(",", ":"))
    return torch.tensor(list(text.encode("ascii")), dtype=torch.float32, device="cpu")


def _count(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()
