"""The face that all quantizers share: attach, optimizer, sizes, state, detach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from diffq.attach.attachment import Attachment, attachment_of
from diffq.attach.guards import check_detachable, check_model, checked
from diffq.attach.plan import Rules, TensorPlan, build_plan, named_sites
from diffq.attach.weight import WeightQuantizer
from diffq.checks import check_flag, plain
from diffq.errors import AttachError, ConfigError, listed, warn
from diffq.format.container import Codec, encode_parts
from diffq.format.records import Record
from diffq.numerics.size import MEGABYTE, MEGABYTE_BITS
from diffq.quantizers.half import HalfQuantizer
from diffq.quantizers.sizes import level_bits
from diffq.quantizers.small import SmallQuantizer
from diffq.quantizers.switch import QuantizeSwitch
from diffq.quantizers.training import OptimizerSetup
from diffq.quantizers.views import Views
from diffq.storage.state import Snapshot, raw_record, to_state
from diffq.torch_inside.sharding import is_dtensor, is_managed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

#: Metadata of a field of the settings that overrides may not change.
FOR_ALL = {"overridable": False}


class BaseQuantizer(OptimizerSetup, QuantizeSwitch, Views, Generic[Settings]):
    """Quantizes the selected tensors of a model, in place, until `detach()`.

    In training mode the model computes with perturbed weights, in eval mode with
    the true quantized ones. A subclass names its settings, which are a frozen dataclass,
    and the class that quantizes one tensor by them. After `detach()`, every method that
    needs the model raises AttachError.

    After FSDP2's `fully_shard(model)`, what reads whole weights or bitwidths gathers
    them from all ranks, one tensor after the other: every rank must call it, and each
    gets what a single process with the whole model would get. The sharded model stays
    as it is.

    Args:
        model: a plain model. Attach before wrapping it in DDP, sharding or compiling it.
        settings: how one tensor is quantized.
        rules: which tensors are quantized, small or halved, and their overrides of `settings`.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf.
    """

    #: Makes the quantizer of one tensor.
    _weight_quantizer: Callable[[TensorPlan, Settings], WeightQuantizer]

    def __init__(self, model: nn.Module, settings: Settings, rules: Rules) -> None:
        check_model(model)
        self._plans = build_plan(model, rules)
        chosen = [self._override(plan, settings) for plan in self._plans]
        self._by_name: dict[str, WeightQuantizer] = {}
        for plan, own in zip(self._plans, chosen, strict=True):
            quantizer = self._choose_quantizer(plan, own, rules, model)
            if quantizer is not None:
                self._by_name[plan.name] = quantizer
        self._attached: Attachment | None = Attachment(model, tuple(self._by_name.values()), self)
        self._expect_optimizer()
        self._warned_of_unread = False
        if not any(plan.quantized for plan in self._plans):
            warn(rules.why_nothing(self._plans))

    @property
    def model(self) -> nn.Module:
        """The model that this quantizer is attached to."""
        return self._attachment.model

    @property
    def plan(self) -> tuple[TensorPlan, ...]:
        """Every unique tensor of the model's state dict, quantized or raw, in its order."""
        return self._plans

    def model_size(self) -> Tensor:
        """Size of the quantized model in MB, differentiable in what is learned.

        The same on every rank of a sharded model; a collective there.

        Equation 8 of the DiffQ paper plus ranges, bit maps, and the tensors that are
        not quantized. Add `lam * model_size()` to the loss. Reads nothing back from
        the device.

        Bits learn only where noise acted: those of a tensor that no training forward since
        the last step of the optimizer read with gradients get no gradient. Such tensors are
        in eval mode, under `no_grad`, or in a layer that LayerDrop left out (Section 5.2 of
        the paper). Before its first forward, a step takes those of the step before.

        Returns:
            0-dim float32 tensor on the device of the model's parameters.
        """
        attachment = self._attachment
        device = next(attachment.model.parameters(), torch.empty(0, device="cpu")).device
        sizes = [q.size_bits() for q in attachment.quantizers]
        fixed = self._raw_bits() + sum(size for size in sizes if isinstance(size, float))
        bits = torch.full((), fixed, dtype=torch.float32, device=device)
        for frozen in (size for size in sizes if isinstance(size, Tensor)):
            bits = bits + frozen.to(device, non_blocking=True)
        # Before the parameter is read: measuring frees what FSDP has gathered.
        learned = attachment.learned_size()
        parameter = attachment.learned.parameter
        if parameter is not None and learned is not None:
            if is_managed(attachment.model) and not is_dtensor(parameter):
                # FSDP may free what it has gathered before a backward asks for it.
                parameter = parameter.clone()
            bits = bits + learned.bits(parameter).to(device, non_blocking=True)
        if bits.requires_grad:
            bits.register_hook(lambda grad: self._note_size_used(attachment))  # type: ignore[no-untyped-call]
        return bits / MEGABYTE_BITS

    def true_model_size(self) -> float:
        """Size in MB of the model as it is stored, to the bit.

        A collective if the model is sharded.

        Equation 12 of the DiffQ paper for quantized tensors, each counted once
        however many names it has; other tensors and buffers at their stored width.

        Raises:
            WeightError: a weight or bitwidth is not finite.
        """
        attachment = self._attachment
        bits = attachment.each_weight(
            lambda q, weight, learned: q.stored_bits(q.record(weight, learned))
        )
        return (sum(bits) + self._raw_bits()) / MEGABYTE_BITS

    def compressed_model_size(self, codec: Codec = "rans") -> float:
        """Size in MB of the file that `diffq.save` would write now, without metadata.

        A collective if the model is sharded.

        Encodes the whole model: meant for once an epoch, not for each step.

        Args:
            codec: as in `diffq.save`.

        Raises:
            WeightError: a weight or bitwidth is not finite.
            ConfigError: an unknown codec.
        """
        snapshot = self.snapshot()
        parts = encode_parts(snapshot.records, snapshot.aliases, codec=codec)
        return sum(map(len, parts)) / MEGABYTE

    def bits(self) -> dict[str, Tensor]:
        """Rounded bitwidth of each group: tensor name to uint8 [groups] on the CPU.

        Without tensors that have none, such as those of an `EntropyQuantizer`.

        A collective if the model is sharded.

        Raises:
            WeightError: the bitwidths are not finite.
            AttachError: a quantized tensor was removed or replaced.
        """
        self._attachment.check_places()
        widths = self._attachment.each_quantizer(lambda q, part: (q.plan.name, q.group_bits(part)))
        return {name: torch.from_numpy(bits) for name, bits in widths if bits is not None}

    def mean_bits(self) -> float:
        """Average bitwidth of the quantized weights, small ones too; NaN if there are none.

        A collective if the model is sharded.

        Raises:
            WeightError: the bitwidths are not finite.
            AttachError: a quantized tensor was removed or replaced.
        """
        self._attachment.check_places()
        sizes = self._attachment.each_quantizer(lambda q, part: (level_bits(q, part), q.plan.numel))
        weights = sum(numel for bits, numel in sizes if bits)
        return sum(bits for bits, _ in sizes) / weights if weights else float("nan")

    def snapshot(self) -> Snapshot:
        """The whole model as frozen records: what is stored in a state or a file.

        A collective if the model is sharded.

        Raises:
            WeightError: a weight to quantize or a bitwidth is not finite.
            AttachError: tied tensors were untied, or the model was changed otherwise.
        """
        attachment = self._attachment
        self._check_names()
        self._warn_of_unread()
        raw = {plan.name: plan for plan in self._plans if plan.name not in self._by_name}
        records: dict[str, Record] = {}
        quantized = attachment.each_weight(lambda q, weight, learned: q.record(weight, learned))
        records.update(zip(self._by_name, quantized, strict=True))
        records.update(zip(raw, attachment.each_raw(raw.values(), raw_record), strict=True))
        aliases = {name: plan.name for plan in self._plans for name in plan.names[1:]}
        return Snapshot({plan.name: records[plan.name] for plan in self._plans}, aliases)

    def get_quantized_state(self, packed: bool = True) -> dict[str, Any]:
        """The quantized model as a dict of tensors and plain containers.

        Save it with `torch.save`; `torch.load` reads it with `weights_only=True`, and
        `diffq.restore_quantized_state` fills a plain model with it. Buffers and
        parameters that are not quantized are included. A collective if the model is
        sharded: call it on every rank, and let one of them save the state.

        Args:
            packed: store levels at each group's own bitwidth, and bitwidths in a bit
                map; False spells both out for a look inside.

        Raises:
            WeightError: a weight to quantize or a bitwidth is not finite.
            AttachError: tied tensors were untied, or the model was changed otherwise.
            ConfigError: `packed` is neither True nor False.
        """
        check_flag(packed, "packed")
        return to_state(self.snapshot(), packed)

    def detach(self, quantized: bool = False) -> nn.Module:
        """Gives the plain model back: same parameter objects, names, order and classes.

        Args:
            quantized: set the parameters to their quantized values.

        Returns:
            The model.

        Raises:
            AttachError: it was detached before, or the model is sharded.
            WeightError: with `quantized`, a weight is not finite; nothing has changed then.
            ConfigError: `quantized` is neither True nor False.
        """
        check_flag(quantized, "quantized")
        attachment = self._attachment
        check_detachable(attachment.model)
        values: list[tuple[WeightQuantizer, Tensor]] = []
        if quantized:
            with torch.no_grad():
                values = attachment.each_weight(
                    lambda q, weight, learned: (q, q.quantize(weight, learned))
                )
        self._end_checks()
        attachment.detach()
        self._attached = None
        for quantizer, value in values:
            attachment.bake(quantizer, value)
        return attachment.model

    @property
    def _attachment(self) -> Attachment:
        if self._attached is None:
            raise AttachError("This quantizer was detached from its model. Make a new one.")
        return self._attached

    def _warn_of_unread(self) -> None:
        """Warns once of tensors that are stored quantized, but may be computed with as they are."""
        quantizers = self._attachment.quantizers
        unread = [q.plan.name for q in quantizers if q.plan.has_levels and not q.readings.ever]
        if self._attachment.ran and unread and not self._warned_of_unread:
            self._warned_of_unread = True
            warn(
                "A quantized weight must be read through its module, but no forward has read "
                f"{listed(unread)} there. If the model kept the plain tensors in a list when it "
                "was made, it computes with those, and what is stored differs: read them through "
                "their modules, or exclude them."
            )

    def _check_names(self) -> None:
        planned = {name for plan in self._plans for name in plan.names}
        present = {site.name for site, _ in named_sites(self.model)}
        changed = sorted(planned ^ present)
        if changed:
            raise AttachError(
                "The model must have the tensors that it had when the quantizer was made, but "
                f"{', '.join(changed[:5])} came or went since. detach() and make a new quantizer."
            )

    def _choose_quantizer(
        self, plan: TensorPlan, settings: Settings, rules: Rules, model: nn.Module
    ) -> WeightQuantizer | None:
        """The quantizer of a tensor; None if it stays raw."""
        if plan.quantized:
            return checked(self._make_quantizer(plan, settings, model), model)
        if plan.small:
            return checked(SmallQuantizer(plan, plain(rules.small_bits)), model)
        return HalfQuantizer(plan) if plan.learned and rules.halves(plan.dtype) else None

    def _make_quantizer(
        self, plan: TensorPlan, settings: Settings, model: nn.Module
    ) -> WeightQuantizer:
        """The method's quantizer of a tensor."""
        return self._weight_quantizer(plan, settings)

    def _override(self, plan: TensorPlan, settings: Settings) -> Settings:
        known = sorted(f.name for f in fields(settings) if f.metadata != FOR_ALL)
        unknown = sorted(plan.overrides.keys() - set(known))
        if unknown:
            raise ConfigError(
                f"Overrides of {type(self).__name__} may set {', '.join(known)}, "
                f"got {', '.join(map(repr, unknown))} for {plan.name}."
            )
        chosen = {**vars(settings), **plan.overrides}
        return replace(settings, **{name: plain(value) for name, value in chosen.items()})

    def _raw_bits(self) -> float:
        raw = [plan for plan in self._plans if plan.name not in self._by_name]
        return float(sum(self._bits_of(plan) for plan in raw))

    def _bits_of(self, plan: TensorPlan) -> int:
        site = plan.sites[0]
        tensor = site.read(self.model)
        # What FSDP puts in place may be in the lower precision of its policy.
        dtype = plan.dtype if is_managed(site.owner(self.model)) else tensor.dtype
        return 8 * tensor.numel() * dtype.itemsize


def quantizer_of(model: nn.Module) -> BaseQuantizer[Any]:
    """The quantizer that is attached to a model, or to a part of it.

    A deep copy of a quantized model, such as an exponential moving average makes, has
    a quantizer of its own; this finds it, to export the copy or to detach it.

    Raises:
        AttachError: no quantizer is attached.
    """
    attachment = attachment_of(model)
    if attachment is None or not isinstance(attachment.face, BaseQuantizer):
        raise AttachError("The model has no quantizer. Attach one first: DiffQuantizer(model).")
    return attachment.face
