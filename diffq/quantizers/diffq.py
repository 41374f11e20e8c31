"""DiffQ: learned bitwidths through pseudo quantization noise (arXiv:2104.09987)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffq.attach.plan import Overrides, Rules, TensorPlan
from diffq.attach.sample import Constant
from diffq.checks import MAX_BITS, check_bits, check_flag, check_group_size, check_number
from diffq.errors import ConfigError, MismatchError
from diffq.numerics import grid, noise
from diffq.numerics.grid import BitsLaw
from diffq.numerics.noise import DEFAULT_SCALE, NOISES, Noise
from diffq.numerics.size import Grouping, total_bits
from diffq.quantizers.base import BaseQuantizer
from diffq.quantizers.grid import GridQuantizer
from diffq.torch_inside.sharding import is_dtensor, is_managed, reshard, whole_parameters

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
    noise: Noise
    noise_scale: float

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
        if self.noise not in NOISES:
            raise ConfigError(f"noise must be one of {', '.join(NOISES)}, got {self.noise!r}.")
        check_number(self.noise_scale, "noise_scale", 0)


class Stage(IntEnum):
    """What training does with the bitwidths."""

    LEARNED = 0
    FROZEN = 1
    FROZEN_ROUNDING = 2


class DiffQWeight(GridQuantizer):
    """One tensor with a logit per group for its bitwidth, and noise in training.

    Without `bits` in the settings, `logits` is a float32 parameter [groups], mapped
    to bitwidths by Equation 11. With it, nothing is learned.
    """

    frozen_bits: Tensor | None

    def __init__(self, plan: TensorPlan, settings: DiffQSettings, device: torch.device) -> None:
        fixed = settings.bits
        whole = fixed is not None or not settings.group_size
        group_size = plan.numel if whole else min(settings.group_size or 1, plan.numel)
        super().__init__(plan, group_size, fixed or settings.min_bits)
        self.settings = settings
        self.law = BitsLaw(settings.min_bits, settings.max_bits, settings.noise == "rounding")
        self._grouping = Grouping(self.law, self.group_size, plan.numel)
        self.stage = Stage.LEARNED if fixed is None else Stage.FROZEN
        self._frozen_size: Tensor | None = None
        self.register_buffer("frozen_bits", None, persistent=False)
        if fixed is None:
            init = self.law.logit(settings.init_bits)
            logits = torch.full((self.groups,), init, dtype=torch.float32, device=device)
            self.logits = nn.Parameter(logits)
        else:
            self.frozen_bits = torch.full((1,), fixed, dtype=torch.float32, device=device)

    @property
    def learning(self) -> bool:
        """Whether the bitwidths are still learned."""
        return self.stage is Stage.LEARNED

    @torch.no_grad()
    def bits(self) -> Tensor:
        """Bitwidths that training uses, float32 [groups]: real ones while they are learned."""
        if self.frozen_bits is None:
            return self.law.bits(self.logits).float()
        return self.frozen_bits.float().expand(self.groups)

    def whole_bits(self) -> Tensor:
        """Rounded bitwidths, float32 [groups]."""
        return torch.round(self.bits())

    def sample(self, weight: Tensor) -> Constant:
        """Equation 6: the weight plus noise in proportion to the step, or its rounding."""
        return self.sample_all([self], [weight])[0]

    @classmethod
    @torch.no_grad()
    def sample_all(cls, quantizers: Sequence[Self], weights: Sequence[Tensor]) -> list[Constant]:
        """Equation 6 for all tensors together."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, (q, weight) in enumerate(zip(quantizers, weights, strict=True)):
            alike.setdefault((q._noise_kind, weight.dtype, weight.device), []).append(place)
        found: dict[int, Constant] = {}
        for places in alike.values():
            batch = [quantizers[i] for i in places], [weights[i] for i in places]
            found.update(zip(places, _perturbed(*batch), strict=True))
        return [found[place] for place in range(len(quantizers))]

    def connect(self, weight: Tensor, constant: Constant) -> Tensor:
        """The gradient of Equation 6 to the weight, its range and the bitwidths."""
        logits = self.logits if self.frozen_bits is None else None
        extremes = constant.about or ()
        rule = self.law, self.group_size
        return noise.pass_noise(weight, constant.value, logits, *rule, *extremes)

    def size_bits(self) -> Tensor | float:
        """Equation 12 where bits are fixed, or once they are frozen."""
        if self.settings.bits is not None:
            return float(self.plan.numel * self.settings.bits + self.overhead_bits)
        return 0.0 if self._frozen_size is None else self._frozen_size

    def learned_size(self) -> tuple[Grouping, Tensor] | None:
        """Groups and logits, until the bits are frozen."""
        if self.frozen_bits is not None:
            return None
        logits: Tensor = self.logits
        if is_managed(self) and not is_dtensor(logits):
            # FSDP may free what it has gathered before a backward asks for it.
            logits = logits.clone()
        return self._grouping, logits

    def freeze(self, rounding: bool) -> None:
        """Ends the learning of the bitwidths; see `DiffQuantizer.freeze_bits`."""
        with whole_parameters([self]):
            bits = self.whole_bits()
        self._freeze_at(bits, Stage.FROZEN_ROUNDING if rounding else Stage.FROZEN)

    @property
    def _noise_kind(self) -> Noise:
        return "rounding" if self.stage is Stage.FROZEN_ROUNDING else self.settings.noise

    def _freeze_at(self, bits: Tensor, stage: Stage) -> None:
        # Optimizers may move logits on by momentum, so the bits are kept apart from them.
        self._set_bits(stage, bits)
        for logits in self.parameters():
            logits.grad = None

    def get_extra_state(self) -> Tensor:
        """The stage and the frozen bits, so that a resumed training goes on with them."""
        stage = torch.tensor([int(self.stage)], dtype=torch.uint8, device="cpu")
        if self.frozen_bits is None:
            return stage
        return torch.cat([stage, self.frozen_bits.to("cpu", torch.uint8)])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes up the stage of a state dict."""
        stage, bits = Stage(int(state[0])), state[1:].float()
        fixed = self.settings.bits
        fits = bits.numel() in (1, self.groups) and bool((bits >= self.min_bits).all())
        if (fixed is not None and not torch.equal(bits, bits.new_tensor([fixed]))) or (
            bits.numel() and not fits
        ):
            raise MismatchError(
                f"The state dict was made with other bitwidths for {self.plan.name}: got "
                f"{sorted(set(bits.int().tolist())) or 'learned ones'}. "
                "Make the quantizer with the same arguments."
            )
        if bits.numel():
            device = next((t.device for t in (*self.parameters(), *self.buffers())), bits.device)
            self._freeze_at(bits.to(device), stage)
        else:
            self._set_bits(stage, None)

    def _set_bits(self, stage: Stage, frozen: Tensor | None) -> None:
        self.stage, self.frozen_bits = stage, frozen
        # Kept, because it is asked for in each step.
        self._frozen_size = (
            total_bits([self.bits()], [self._grouping]) if frozen is not None else None
        )
        self.forget()


def _perturbed(quantizers: Sequence[DiffQWeight], weights: Sequence[Tensor]) -> list[Constant]:
    """Samples of tensors that are alike in kind of noise, dtype and device."""
    kind = quantizers[0]._noise_kind
    pairs = list(zip(quantizers, weights, strict=True))
    if kind == "rounding":
        return [Constant(q.quantize(weight, *q.bounds(weight))) for q, weight in pairs]
    counts = torch._foreach_mul(_bits(quantizers), math.log(2))
    torch._foreach_exp_(counts)
    torch._foreach_sub_(counts, 1)
    extremes = grid.extremes([grid.widen(weight) for weight in weights])
    spans = list(torch.split(extremes.distance, 1))
    torch._foreach_mul_(spans, [q.settings.noise_scale for q in quantizers])
    steps = torch._foreach_div(spans, counts)
    noisy = noise.perturb(weights, steps, [q.group_size for q in quantizers], kind)
    if weights[0].dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        noisy = [value.clamp_(-largest, largest) for value in noisy]
    values = [
        torch.where(weight == 0, 0, value) if q.may_have_zeros else value
        for (q, weight), value in zip(pairs, noisy, strict=True)
    ]
    return [Constant(value, (extremes, index)) for index, value in enumerate(values)]


def _bits(quantizers: Sequence[DiffQWeight]) -> list[Tensor]:
    """`bits` of many quantizers."""
    learned = [q for q in quantizers if q.frozen_bits is None]
    if len(learned) < len(quantizers):
        return [q.bits() for q in quantizers]
    return grid.bits_of_all([q.law for q in learned], [q.logits for q in learned])


class DiffQuantizer(BaseQuantizer):
    """Learns how many bits each group of weights deserves, while the model trains.

    Each group of a weight has a real bitwidth b (Equation 11). In training the
    model computes with `w + step(b) * noise` (Equation 6), so that loss and
    `model_size()` are differentiable in w and b alike. In eval mode b is rounded
    and the model computes with the true quantized weights (Equation 1). See
    "Differentiable Model Compression via Pseudo Quantization Noise", arXiv:2104.09987.

    Example:
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

    overridable: ClassVar[frozenset[str]] = frozenset(
        {"group_size", "min_bits", "max_bits", "init_bits", "bits"}
    )

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
        super().__init__(model, settings, Rules(min_size, include, exclude, overrides), float16)

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
        reshard(self.model)
        for quantizer in self._attachment.quantizers:
            if isinstance(quantizer, DiffQWeight):
                quantizer.freeze(rounding)

    def _make_quantizer(
        self, plan: TensorPlan, settings: DiffQSettings, weight: Tensor
    ) -> DiffQWeight:
        return DiffQWeight(plan, settings, weight.device)
