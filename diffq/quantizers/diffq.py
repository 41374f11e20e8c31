"""DiffQ: learned bitwidths through pseudo quantization noise (arXiv:2104.09987)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from diffq.attach.batch import Batch, Run
from diffq.attach.plan import Overrides, Rules, TensorPlan
from diffq.attach.sample import Sample
from diffq.attach.weight import WeightQuantizer
from diffq.checks import (
    MAX_BITS,
    check_bits,
    check_choice,
    check_flag,
    check_group_size,
    check_number,
)
from diffq.errors import ConfigError
from diffq.kernels.launched import Launched
from diffq.numerics import noise
from diffq.numerics.fineness import BitsFineness, Fineness
from diffq.numerics.flat import Flat
from diffq.numerics.grid import BitsLaw
from diffq.numerics.noise import DEFAULT_SCALE, NOISES, Drawn, Noise
from diffq.numerics.rounding import round_all
from diffq.numerics.size import Grouping, total_bits
from diffq.quantizers.base import FOR_ALL, BaseQuantizer
from diffq.quantizers.batches import GridBatch, Kernels, samples_of, values_of
from diffq.quantizers.grid import GridQuantizer

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DiffQSettings:
    """How one tensor is quantized; see `DiffQuantizer` for the meaning of each field."""

    group_size: int | None
    min_bits: int
    max_bits: int
    init_bits: float
    bits: int | None
    noise: Noise = field(metadata=FOR_ALL)
    noise_scale: float = field(metadata=FOR_ALL)

    def __post_init__(self) -> None:
        check_bits(self.min_bits, "min_bits")
        check_bits(self.max_bits, "max_bits")
        if self.bits is not None:
            check_bits(self.bits)
        if self.min_bits >= self.max_bits:
            raise ConfigError(
                f"min_bits must be below max_bits, got {self.min_bits} and {self.max_bits}. "
                "For one bitwidth that is not learned, pass bits=."
            )
        check_number(self.init_bits, "init_bits", self.min_bits, self.max_bits)
        check_group_size(self.group_size)
        check_choice(self.noise, "noise", NOISES)
        check_number(self.noise_scale, "noise_scale", 0)


class Stage(IntEnum):
    """What training does with the bitwidths."""

    LEARNED = 0
    FROZEN = 1
    FROZEN_ROUNDING = 2


class DiffQWeight(GridQuantizer):
    """One tensor with a logit per group for its bitwidth, and noise in training.

    What is learned are the logits, float32 [groups], mapped to bitwidths by Equation 11.
    With `bits` in the settings, nothing is.

    Attributes:
        stage: a `Stage`.
        frozen_bits: rounded bitwidths, float32 [groups], once they are frozen.
    """

    method = "DiffQuantizer"

    def __init__(self, plan: TensorPlan, settings: DiffQSettings) -> None:
        fixed = settings.bits
        group_size = plan.numel if fixed else min(settings.group_size or plan.numel, plan.numel)
        super().__init__(plan, group_size, fixed or settings.min_bits)
        self.settings = settings
        self.law = BitsLaw(settings.min_bits, settings.max_bits, settings.noise == "rounding")
        self.stage = Stage.LEARNED if fixed is None else Stage.FROZEN
        self.frozen_bits: Tensor | None = None
        self._grouping = Grouping(self.law, self.group_size, plan.numel)
        self._frozen_size: Tensor | None = None

    def start(self, weight: Tensor) -> Tensor | None:
        """The logits of `init_bits`, [groups]."""
        if self.settings.bits is not None:
            return None
        init = self.law.logit(self.settings.init_bits)
        return weight.new_full((self.groups,), init, dtype=torch.float32)

    @property
    def fineness(self) -> Fineness | None:
        """The bitwidths; None where they are fixed by the settings."""
        return BitsFineness(self.law) if self.settings.bits is None else None

    @property
    def learning(self) -> bool:
        """Whether the bitwidths are still learned."""
        return self.stage is Stage.LEARNED

    @torch.no_grad()
    def bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Bitwidths that training uses, float32 [groups]: real ones while they are learned."""
        if self.settings.bits is not None:
            return weight.new_full((self.groups,), self.settings.bits, dtype=torch.float32)
        if self.frozen_bits is not None:
            if learned is not None and self.frozen_bits.device != learned.device:
                self.frozen_bits = self.frozen_bits.to(learned.device)
            return self.frozen_bits
        return self.law.bits(cast(Tensor, learned)).float()

    def whole_bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Rounded bitwidths, float32 [groups]."""
        return torch.round(self.bits(weight, learned))

    @property
    def alike(self) -> Hashable:
        """Tensors of one law and stage, whose noise is drawn together."""
        scale, fixed = self.settings.noise_scale, self.settings.bits
        return self.noise, scale, self.law, self.row_size, self.stage, fixed

    @property
    def row_size(self) -> int | None:
        """Weights of a group; None if the tensor is one."""
        return None if self.groups == 1 else self.group_size

    @classmethod
    def batch(cls, quantizers: Sequence[Self]) -> Batch:
        """Equation 6 for all tensors together."""
        return NoisyBatch(quantizers)

    def draw(self, weight: Tensor, learned: Tensor | None) -> Sample:
        """Equation 6: the weight plus noise in proportion to the step, or its rounding."""
        (sample,) = NoisyBatch([self]).draw([weight], Run.of(learned))
        return sample

    def connect(self, weight: Tensor, sample: Sample, learned: Tensor | None) -> Tensor:
        """The gradient of Equation 6 to the weight, its range and the bitwidths."""
        drawn = Drawn.of(Flat([weight.shape], self.row_size), [weight], [sample.value])
        logits = learned if self.learning else None
        (connected,) = noise.pass_noise(drawn, self.law, logits, [weight], [sample.value])
        return connected

    def size_bits(self) -> Tensor | float:
        """Equation 12 where bits are fixed, or once they are frozen."""
        if self.settings.bits is not None:
            return float(self.plan.numel * self.settings.bits + self.overhead_bits)
        return 0.0 if self._frozen_size is None else self._frozen_size

    @property
    def grouping(self) -> Grouping | None:
        """What the size of the learned bitwidths depends on, until they are frozen."""
        return self._grouping if self.learning else None

    def meaning(self) -> dict[str, Any]:
        """What makes bitwidths of logits."""
        if self.settings.bits is not None:
            return {"bits": self.settings.bits}
        limits = {"min_bits": self.settings.min_bits, "max_bits": self.settings.max_bits}
        return {"group_size": self.settings.group_size or 0, **limits}

    def freeze(self, rounding: bool, learned: Tensor | None) -> None:
        """Ends the learning of the bitwidths; see `DiffQuantizer.freeze_bits`."""
        bits = self.frozen_bits
        if bits is None and learned is not None:
            bits = self.whole_bits(learned, learned)
        self._set_bits(Stage.FROZEN_ROUNDING if rounding else Stage.FROZEN, bits)

    def fix_size(self, learned: Tensor | None) -> None:
        """Fixes the bitwidths at those of logits, and rounds in training from here on."""
        self.set_stage(Stage.FROZEN_ROUNDING, learned, None)

    def settled(self) -> Tensor | None:
        """The logits of frozen bits, which optimizers may have moved on by momentum."""
        return None if self.frozen_bits is None else self.law.logits(self.frozen_bits)

    def set_stage(self, stage: int, learned: Tensor | None, kept: Tensor | None) -> None:
        """Takes up the stage of a state dict; frozen bits are those of its logits."""
        bits = None
        if stage != Stage.LEARNED and learned is not None:
            bits = torch.round(self.law.bits(learned.detach()).float())
        self._set_bits(Stage(stage), bits)

    def read_earlier(
        self, entries: Mapping[str, Tensor], learned: Tensor | None
    ) -> tuple[int, Tensor | None]:
        """Reads the stage and the frozen bits, and the logits."""
        stage, *bits = entries["_extra_state"].tolist() if "_extra_state" in entries else [0]
        super().read_earlier(entries, learned)
        if bits and learned is not None:
            learned.copy_(self.law.logits(learned.new_tensor(bits)).expand_as(learned))
        return stage, None

    @property
    def noise(self) -> Noise:
        """The kind of noise in this stage."""
        return "rounding" if self.stage is Stage.FROZEN_ROUNDING else self.settings.noise

    def _set_bits(self, stage: Stage, frozen: Tensor | None) -> None:
        self.stage, self.frozen_bits = stage, frozen
        # Kept, because it is asked for in each step.
        self._frozen_size = None if frozen is None else total_bits(frozen, self._grouping)


class NoisyBatch(GridBatch):
    """DiffQ's tensors of one law, group size, kind of noise and stage of the bitwidths."""

    def __init__(self, quantizers: Sequence[DiffQWeight]) -> None:
        self._first, self._all = quantizers[0], tuple(quantizers)
        super().__init__(quantizers, self._first.row_size)
        self._kernels = Kernels(self._flat, self._make_kernels)

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """Equation 6 of the DiffQ paper."""
        zeros, kernels = self.may_have_zeros(), self._kernels.of(weights)
        if kernels is not None:
            logits = learned.flat if self._first.learning else None
            given = self._bits(weights[0], learned.flat) if logits is None else logits
            sampled = kernels.sample(weights, given, zeros=zeros)
            launched = Launched(self._flat, kernels, sampled.state, given)
            return samples_of(weights, sampled.values, launched)
        if self._first.noise == "rounding":
            points = self._flat.zeros(weights, zeros) if any(zeros) else None
            bits = self.whole_bits(weights[0], learned.flat)
            drawn = round_all(self._flat, weights, bits, points)
        else:
            bits, scale = self._bits(weights[0], learned.flat), self._first.settings.noise_scale
            drawn = noise.perturb(self._flat, weights, bits, self._first.noise, scale, zeros)
        return samples_of(weights, self._flat.split(drawn.values), drawn)

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """The gradient of Equation 6 to the weights, their ranges and bitwidths."""
        drawn, values = samples[0].drawn, values_of(samples)
        logits = learned.flat if self._first.learning else None
        return noise.pass_noise(drawn, self._law, logits, weights, values)

    @property
    def _law(self) -> BitsLaw:
        return self._first.law

    def whole_bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Rounded bitwidths, float32 [groups]."""
        return torch.round(self._bits(weight, learned))

    def _bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Bitwidths that training uses, float32 [groups]."""
        if self._first.learning:
            return self._law.bits_now(cast(Tensor, learned)).float()
        if self._first.settings.bits is not None:
            return self._first.bits(weight, None).expand(self._flat.groups.total).contiguous()
        return torch.cat([q.bits(weight, learned) for q in self._all])

    def _make_kernels(self, dtype: torch.dtype, device: torch.device) -> Any:
        from diffq.kernels.noisy import Noisy

        flat, first = self._flat, self._first
        law = first.law if first.learning else None
        rule = first.row_size, law, first.noise, first.settings.noise_scale
        return Noisy(flat.shapes, *rule, dtype, device)


class DiffQuantizer(BaseQuantizer[DiffQSettings]):
    """Learns how many bits each group of weights deserves, while the model trains.

    Each group of a weight has a real bitwidth b (Equation 11). In training the
    model computes with `w + step(b) * noise` (Equation 6), so that loss and
    `model_size()` are differentiable in w and b alike. In eval mode b is rounded
    and the model computes with the true quantized weights (Equation 1). See
    "Differentiable Model Compression via Pseudo Quantization Noise", arXiv:2104.09987.

    Examples:
        >>> opt = torch.optim.AdamW(model.parameters(), 1e-3)
        >>> quantizer = DiffQuantizer(model, group_size=8)
        >>> quantizer.setup_optimizer(opt)
        >>> loss = task_loss + lam * quantizer.model_size()

    Args:
        model: a plain model, changed in place until `detach()`.
        group_size: consecutive weights of the flattened tensor that share a
            bitwidth; None or 0 for the whole tensor.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        include: name patterns; if given, only matching parameters are quantized.
        exclude: name patterns of parameters to leave alone.
        overrides: name pattern to a dict of `group_size`, `min_bits`, `max_bits`,
            `init_bits` or `bits` for the parameters that match.
        float16: store the parameters that are not quantized as float16.
        small_bits: bitwidth, 4 to 15, of the parameters that are too small to be quantized,
            with one scale each; None stores them as they are.
        min_bits: lowest bitwidth that can be learned, 1 to 14.
        max_bits: highest bitwidth that can be learned, 2 to 15.
        init_bits: bitwidth at the start.
        bits: fixed bitwidth, 1 to 15; nothing is learned then.
        noise: "gaussian" (the paper), "uniform" (as strong as true rounding), or
            "rounding": the rounding error itself, with bits rounded by the
            straight-through estimator. Often the best; try it.
        noise_scale: steps per unit of random noise: the standard deviation of the
            Gaussian, or half the width of the uniform. The paper has 0.5.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf, or exceeds float32.
    """

    _weight_quantizer = DiffQWeight

    def __init__(
        self,
        model: nn.Module,
        *,
        group_size: int | None = 8,
        min_size: float = 0.01,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Overrides | None = None,
        float16: bool = False,
        small_bits: int | None = None,
        min_bits: int = 2,
        max_bits: int = MAX_BITS,
        init_bits: float = 8,
        bits: int | None = None,
        noise: Noise = "gaussian",
        noise_scale: float = DEFAULT_SCALE,
    ) -> None:
        settings = DiffQSettings(
            group_size, min_bits, max_bits, init_bits, bits, noise, noise_scale
        )
        rules = Rules(min_size, include, exclude, overrides, float16, small_bits)
        super().__init__(model, settings, rules)

    def freeze_bits(self, rounding: bool = False) -> None:
        """Rounds the bitwidths and learns them no more, for the last part of a training.

        The freeze is part of the model's state dict. The size penalty has no
        gradient from here on. A collective if the model is sharded.

        Args:
            rounding: also replace random noise by true rounding with a
                straight-through gradient, so that training and eval agree.

        Raises:
            AttachError: the quantizer was detached.
            ConfigError: `rounding` is neither True nor False.
        """
        check_flag(rounding, "rounding")

        def freeze(quantizer: WeightQuantizer, learned: Tensor | None) -> None:
            if isinstance(quantizer, DiffQWeight):
                quantizer.freeze(rounding, learned)

        self._attachment.each_quantizer(freeze)
        self._attachment.learned.settle()
        self._attachment.forget()
