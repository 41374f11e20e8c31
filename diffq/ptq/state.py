"""Post-training quantization: a plain state dict to records, without a model.

The grid is that of the quantizers: evenly spaced from minimum to maximum, of the tensor
or of each of its channels. `diffq.ptq.budget` chooses bitwidths for a size of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.attach.plan import Rules, TensorPlan
from diffq.checks import check_bits, check_flag, check_group_size, plain
from diffq.errors import ConfigError, warn
from diffq.format.records import GridRecord, RawRecord, Record, group_count
from diffq.numerics import grid
from diffq.quantizers.grid import WeightGrid, check_range
from diffq.quantizers.half import to_half
from diffq.storage.state import Snapshot, raw_record

#: The running statistics of BatchNorm, and the ranges of activations: never quantized nor
#: rounded to float16. A state dict does not tell buffers from parameters; these are the
#: ones that rounding would harm.
STATISTICS = ("running_mean", "running_var", "activation_range")


#: What tensors that show the same memory in the same way share.
Place = tuple[object, ...]


@dataclass(frozen=True)
class Settings:
    """How a state dict is quantized.

    Attributes:
        group_size: consecutive weights that share a bitwidth; None or 0 for the tensor.
        per_channel: one range and one bitwidth for each slice along the first dimension
            (tensors of one dimension: one for all), whatever `group_size` says.
        rules: which tensors are quantized, and which are stored as float16.
    """

    group_size: int | None = None
    per_channel: bool = False
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        check_flag(self.per_channel, "per_channel")


def quantize_state(
    state: Mapping[str, Any], bits: int, settings: Settings | None = None
) -> Snapshot:
    """Quantizes every selected tensor of a state dict at one bitwidth.

    Args:
        state: name to tensor, as `model.state_dict()` gives it.
        bits: bitwidth, 1 to 15.
        settings: what is quantized, and how.

    Returns:
        The records that `diffq.QATQuantizer(model, bits=bits)` would store.

    Raises:
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf, or does not fit float16.
    """
    check_bits(bits)
    plan = plan_state(state, settings or Settings())
    return plan.snapshot({g.name: np.full(g.count, bits, np.uint8) for g in plan.grids})


def plan_state(state: Mapping[str, Any], settings: Settings) -> StatePlan:
    """Plans a state dict, and warns if nothing in it is to be quantized.

    Raises:
        ConfigError, WeightError: as `quantize_state`.
    """
    plan = StatePlan(state, settings)
    if not plan.grids:
        warn(plan.why_nothing())
    return plan


def find_ties(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The unique tensors of a state dict, and further names of those that share memory.

    Two names are tied if they show the same memory in the same way; views that overlap
    otherwise are tensors of their own.

    Raises:
        ConfigError: an entry is not a dense tensor.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Place, str] = {}
    for name, tensor in state.items():
        _check_dense(name, tensor)
        target = first.setdefault(place_of(tensor), name) if tensor.numel() else name
        if target == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = target
    return tensors, aliases


def all_names(first: Iterable[str], aliases: Mapping[str, str]) -> dict[str, list[str]]:
    """First name of each tensor, to all of its names."""
    names = {name: [name] for name in first}
    for alias, name in aliases.items():
        names[name].append(alias)
    return names


def place_of(tensor: Tensor) -> Place:
    """The memory that a tensor shows, and how: equal for tied tensors."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class StatePlan:
    """A state dict's unique tensors: those to quantize on their grids, others as records.

    Attributes:
        grids: the tensors to quantize.
        raw: name to record of the others.
        aliases: further names of tied tensors, to the name of their tensor.
        tensors: name to unique tensor, in the order of the state dict.
        names: name to all names of the tensor.

    Raises:
        ConfigError, WeightError: as `quantize_state`.
    """

    def __init__(self, state: Mapping[str, Any], settings: Settings) -> None:
        self.tensors, self.aliases = find_ties(state)
        self._rules = settings.rules
        self.names = names = all_names(self.tensors, self.aliases)
        settings.rules.check_patterns({n: tensor.shape for n, tensor in state.items()})
        self.grids: list[StateGrid] = []
        self.raw: dict[str, RawRecord] = {}
        for name, tensor in self.tensors.items():
            statistic = name.rpartition(".")[2] in STATISTICS
            if not statistic and tensor.numel() and settings.rules.select(names[name], tensor):
                # The bits of a choice do not depend on the device.
                self.grids.append(StateGrid(name, tensor.cpu(), settings))
            elif settings.rules.halves(tensor.dtype) and not statistic:
                half = to_half(tensor, name, "Store it as it is: leave float16 out.")
                self.raw[name] = raw_record(half.to(tensor.dtype), torch.float16)
            else:
                self.raw[name] = raw_record(tensor)

    def snapshot(self, bits: Mapping[str, NDArray[np.uint8]]) -> Snapshot:
        """The records, given the bitwidths of each quantized tensor's groups."""
        records: dict[str, Record] = {**self.raw}
        records |= {grid.name: grid.record(bits[grid.name]) for grid in self.grids}
        return Snapshot({name: records[name] for name in self.tensors}, self.aliases)

    def why_nothing(self) -> str:
        """The reason why there is no tensor to quantize, with the remedy."""
        plans = [
            TensorPlan(
                names=tuple(self.names[name]),
                sites=(),
                shape=tensor.shape,
                dtype=tensor.dtype,
                quantized=False,
                small=False,
                learned=True,
                pruned=False,
                padded=False,
                overrides={},
            )
            for name, tensor in self.tensors.items()
        ]
        return self._rules.why_nothing(plans)


class StateGrid:
    """One tensor to quantize.

    Attributes:
        name: the tensor's name.
        grid: its groups and ranges; zeros stay.
        count: number of groups.
    """

    def __init__(self, name: str, weight: Tensor, settings: Settings) -> None:
        self.name = name
        if settings.per_channel and weight.ndim > 1:
            size = weight.numel() // weight.shape[0]
            low, high = grid.group_bounds(weight, size)
        else:
            size = min(plain(settings.group_size) or weight.numel(), weight.numel())
            low, high = grid.bounds(weight)
        self.count = group_count(weight.numel(), size)
        self.grid = WeightGrid(weight, size, low.float(), high.float(), (weight == 0).any())
        check_range(self.grid.low, self.grid.high, name)

    def record(self, bits: NDArray[np.uint8]) -> GridRecord:
        """The stored form at the bitwidths, uint8 [groups]."""
        return self.grid.record(bits, int(bits.min()))


def _check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        got = type(tensor).__name__
    elif tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        got = f"a {tensor.dtype} tensor on {tensor.device} with layout {tensor.layout}"
    else:
        return
    raise ConfigError(
        f"A state dict to quantize holds dense tensors only, got {got} for {name!r}. "
        "Take it out, make it dense, or pass the state dict that is in it."
    )
