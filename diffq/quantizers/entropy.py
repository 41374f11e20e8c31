"""Entropy-constrained quantization: a learned step for each row, priced by the levels' entropy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from diffq.attach.batch import Batch, CodedBatch, Run
from diffq.attach.plan import Overrides, Rules, TensorPlan, dtype_name
from diffq.attach.sample import Sample
from diffq.attach.weight import WeightQuantizer
from diffq.checks import check_number
from diffq.errors import WeightError
from diffq.format.records import Record, SteppedRecord
from diffq.numerics import scaled, stepped
from diffq.numerics.fineness import Fineness, StepFineness
from diffq.numerics.flat import Flat
from diffq.numerics.grid import from_groups, to_groups
from diffq.numerics.lengths import CodeLengths, code_lengths
from diffq.quantizers.base import BaseQuantizer
from diffq.quantizers.batches import samples_of, values_of
from diffq.quantizers.sizes import mean_bits, tensor_size
from diffq.torch_inside.graph import is_plain

if TYPE_CHECKING:
    from typing_extensions import Self

# A step in the file takes some 4 bits: with fewer weights for it, levels pay too much for them.
_LEAST_ROW = 64

# Entropy of a normal distribution in bits, with a step of its mean magnitude.
_NORMAL = 0.5 * math.log2(2 * math.pi * math.e) + 0.5 * math.log2(math.pi / 2)


@dataclass(frozen=True)
class EntropySettings:
    """How one tensor is quantized; see `EntropyQuantizer` for the meaning of each field."""

    init_bits: float

    def __post_init__(self) -> None:
        check_number(self.init_bits, "init_bits", 1, 12)


class Stage(IntEnum):
    """What training does with the steps."""

    LEARNED = 0
    FIXED = 1


class EntropyWeight(WeightQuantizer):
    """One tensor on levels around zero, with a step for each row.

    What is learned are binary logarithms of the steps, float32 [rows]. A row is what shares the
    first index, or several of them that have 64 weights together.

    Attributes:
        stage: a `Stage`.
    """

    method = "EntropyQuantizer"
    coded = True

    def __init__(self, plan: TensorPlan, settings: EntropySettings) -> None:
        super().__init__(plan)
        self.settings = settings
        row = plan.numel // plan.shape[0] if plan.shape else 1
        self.group_size = min(row * -(-_LEAST_ROW // row), plan.numel)
        self.rows = -(-plan.numel // self.group_size)
        self.stage = Stage.LEARNED
        self._fixed: Tensor | None = None

    def start(self, weight: Tensor) -> Tensor:
        """Steps with which normal weights take `init_bits`, [rows]."""
        mean = scaled.mean_magnitude(weight.detach().float())
        first = (torch.log2(mean) + (_NORMAL - self.settings.init_bits)).expand(self.rows)
        return torch.maximum(first, self._least(weight) / stepped.PER_OCTAVE)

    def restart(self, weight: Tensor) -> Tensor:
        """The steps of the weights as they are."""
        return self.start(weight)

    @property
    def alike(self) -> Hashable:
        """Tensors with rows of one length."""
        return self.group_size, self.stage

    @classmethod
    def batch(cls, quantizers: Sequence[Self]) -> Batch:
        """The nearest levels for all tensors together."""
        return SteppedBatch(quantizers)

    def draw(self, weight: Tensor, learned: Tensor | None) -> Sample:
        """The nearest level times the step."""
        (sample,) = SteppedBatch([self]).draw([weight], Run.of(learned))
        return sample

    def connect(self, weight: Tensor, sample: Sample, learned: Tensor | None) -> Tensor:
        """The gradients of `diffq.numerics.stepped`."""
        flat, steps = Flat([weight.shape], self.group_size), cast(Tensor, learned)
        (connected,) = stepped.pass_steps(flat, steps, [weight], [sample.value])
        return connected

    def quantize(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """The nearest level times the step, rounded to float32."""
        steps = stepped.steps_of(self._finite_numbers(learned))[:, None]
        values = self._levels(weight, steps) * steps
        return from_groups(values, weight.shape).to(weight.dtype)

    @torch.no_grad()
    def record(self, weight: Tensor, learned: Tensor | None) -> SteppedRecord:
        """Levels, counted from the lowest of their bitwidth, and steps."""
        numbers = self._finite_numbers(learned)
        steps = stepped.steps_of(numbers)[:, None]
        levels = self._levels(weight, steps).reshape(-1)[: weight.numel()]
        least, most = levels.aminmax()
        # Levels from -2**(bits-1) to 2**(bits-1) - 1.
        bits = max(int(-least) - 1, int(most)).bit_length() + 1
        return SteppedRecord(
            shape=tuple(weight.shape),
            dtype=dtype_name(weight.dtype),
            group_size=self.group_size,
            min_bits=bits,
            bits=np.full(self.rows, bits, np.uint8),
            levels=(levels + 2.0 ** (bits - 1)).to(torch.int16).cpu().numpy().view(np.uint16),
            steps=numbers.to(torch.int16).cpu().numpy(),
        )

    def finest(self, weight: Tensor) -> Tensor:
        """Steps with which the largest weight of each row has the last level, float64 [rows]."""
        return -self._least(weight).double().cpu()

    def _least(self, weight: Tensor) -> Tensor:
        rows = to_groups(weight.detach().float(), self.group_size)
        return stepped.least_numbers(rows.abs().amax(1))

    def numbers(self, learned: Tensor) -> Tensor:
        """Steps in quarter octaves, int64 [rows]."""
        if self._fixed is None:
            return stepped.numbers_of(learned)
        self._fixed = self._fixed.to(learned.device)
        return self._fixed

    def _finite_numbers(self, learned: Tensor | None) -> Tensor:
        steps = cast(Tensor, learned)
        if is_plain() and self.learning and not torch.isfinite(steps).all():
            raise WeightError(
                f"The steps of {self.plan.name} must be finite, got NaN: a loss that was not "
                "finite reached them. Go back to a checkpoint, and skip steps whose loss is not "
                "finite."
            )
        return self.numbers(steps)

    def size_bits(self) -> float:
        """Nothing but what `SteppedBatch.code_lengths` says."""
        return 0.0

    def stored_bits(self, record: Record) -> int:
        """The entropy of levels and steps, which no bitwidth bounds."""
        return math.ceil(record.entropy_bound_bits())

    @property
    def learning(self) -> bool:
        """Whether the steps are still learned."""
        return self.stage is Stage.LEARNED

    @property
    def fineness(self) -> Fineness:
        """The steps."""
        return StepFineness()

    def fix_size(self, learned: Tensor | None) -> None:
        """Fixes the steps."""
        self.set_stage(Stage.FIXED, learned, None)

    def settled(self) -> Tensor | None:
        """The logarithms of fixed steps, which optimizers may have moved on by momentum."""
        return None if self._fixed is None else self._fixed.float() / stepped.PER_OCTAVE

    def set_stage(self, stage: int, learned: Tensor | None, kept: Tensor | None) -> None:
        """Takes up the stage of a state dict; fixed steps are those of its logarithms."""
        self.stage = Stage(stage)
        fixed = self.stage is Stage.FIXED and learned is not None
        self._fixed = stepped.numbers_of(cast(Tensor, learned)) if fixed else None

    def _levels(self, weight: Tensor, steps: Tensor) -> Tensor:
        """The nearest levels with steps [rows, 1], float32 [rows, group_size]."""
        rows = to_groups(weight.detach().float(), self.group_size)
        if is_plain() and not torch.isfinite(rows).all():
            raise WeightError(
                f"The weights of {self.plan.name} must be finite, got NaN or Inf. "
                "Find the step that diverged, or exclude the tensor."
            )
        return stepped.LEVELS.nearest(rows / steps, steps, weight.dtype)


class SteppedBatch(CodedBatch):
    """Tensors with rows of one length, each row with its step."""

    def __init__(self, quantizers: Sequence[EntropyWeight]) -> None:
        super().__init__(quantizers)
        first = quantizers[0]
        self._learning = first.learning
        self._flat = Flat([q.plan.shape for q in quantizers], first.group_size)

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """The nearest levels times the steps."""
        return samples_of(weights, self._flat.split(self._rounded(weights, learned)))

    def quantize(self, weights: Sequence[Tensor], learned: Run) -> list[Tensor]:
        """The nearest levels times the steps, rounded to float32."""
        # The levels of one tensor are those of float32.
        narrow = weights[0].dtype != torch.float64
        if not (is_plain() and narrow and self._are_finite(weights, learned)):
            return super().quantize(weights, learned)
        return self._flat.split(self._rounded(weights, learned).to(weights[0].dtype))

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """The gradients of `diffq.numerics.stepped`."""
        steps = cast(Tensor, learned.flat)
        steps = steps if self._learning else steps.detach()
        return stepped.pass_steps(self._flat, steps, weights, values_of(samples))

    def code_lengths(self, weights: Sequence[Tensor], learned: Run) -> CodeLengths:
        """The entropy of the levels, and for each step the bits that tell apart its tensor's."""
        numbers = self._numbers(learned)
        found = code_lengths(self._flat, weights, stepped.steps_of(numbers))
        rows, highest = self._flat.rows, numbers.float()
        spread = rows.largest(highest) + rows.largest(-highest)
        steps = self._flat.constants.get("steps", rows.counts, torch.float32, spread.device)
        return CodeLengths(found.bits + steps * torch.log2(spread + 1), found.slopes)

    def _are_finite(self, weights: Sequence[Tensor], learned: Run) -> bool:
        """Whether no weight and no step is one that is refused."""
        largest = self._flat.largest(weights)
        return bool(torch.isfinite(largest) & torch.isfinite(cast(Tensor, learned.flat)).all())

    def _rounded(self, weights: Sequence[Tensor], learned: Run) -> Tensor:
        steps = stepped.steps_of(self._numbers(learned))
        return scaled.scale_all(self._flat, weights, steps, stepped.LEVELS)

    def _numbers(self, learned: Run) -> Tensor:
        """Steps in quarter octaves, int64 [rows]."""
        if self._learning:
            return stepped.numbers_of(cast(Tensor, learned.flat))
        each = zip(self.quantizers, learned.parts(), strict=True)
        return torch.cat([quantizer.numbers(part) for quantizer, part in each])


class EntropyQuantizer(BaseQuantizer[EntropySettings]):
    """Learns how coarse each row of a weight may be, priced by what an entropy coder stores.

    Levels around zero are whole multiples of a step, and each row of a weight (what shares the
    first index) learns its step. No bitwidth is learned: the size is the entropy of the levels,
    which falls below one bit a weight as most levels become zero. Training computes with rounded
    weights and passes gradients straight through. The price of size moves the steps only. See
    `diffq.numerics.stepped` and `diffq.numerics.lengths` for the equations.

    Below some 2 bits a weight it takes fewer bytes than a `DiffQuantizer` at equal quality. Name
    the size, so that the price begins once weights have learned something: units that a price
    removes from random weights never come back.

    Examples:
        >>> quantizer = EntropyQuantizer(model)
        >>> quantizer.setup_optimizer(opt, target_mb=0.5, steps=10_000)

    Args:
        model: a plain model, changed in place until `detach()`.
        init_bits: bits a weight at the start, 1 to 12, where weights are normal.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        include: name patterns; if given, only matching parameters are quantized.
        exclude: name patterns of parameters to leave alone.
        overrides: name pattern to a dict of `init_bits` for the parameters that match.
        float16: store the parameters that are not quantized as float16.
        small_bits: bitwidth, 4 to 15, of the parameters that are too small to be quantized,
            with one scale each; None stores them as they are.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf, or exceeds float32.
    """

    _weight_quantizer = EntropyWeight

    def __init__(
        self,
        model: nn.Module,
        *,
        init_bits: float = 4,
        min_size: float = 0.01,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Overrides | None = None,
        float16: bool = False,
        small_bits: int | None = None,
    ) -> None:
        rules = Rules(min_size, include, exclude, overrides, float16, small_bits)
        super().__init__(model, EntropySettings(init_bits), rules)

    def mean_bits(self) -> float:
        """Entropy of the levels for each quantized weight, in bits; NaN if there are none.

        A collective if the model is sharded.

        Raises:
            WeightError: a weight is not finite.
            AttachError: a quantized tensor was removed or replaced.
        """
        return mean_bits(self._attachment.each_weight(tensor_size))
