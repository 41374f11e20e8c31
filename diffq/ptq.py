"""Post-training quantization: a plain state dict to records, without a model.

Either every weight gets the same bitwidth (`quantize_state`), or each group gets its
own, so that the file fits a size and the squared error is small (`quantize_to_size`).
The grid is that of the quantizers: evenly spaced from minimum to maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq import grid
from diffq.checks import MAX_BITS, check_bits, check_group_size
from diffq.errors import ConfigError, WeightError
from diffq.format.container import Codec, encode_parts
from diffq.format.entropy import entropy_bits
from diffq.format.records import GridRecord, RawRecord, group_count
from diffq.quantizers.grids import check_range
from diffq.select import Rules
from diffq.size import MEGABYTE
from diffq.state import Snapshot, dtype_name, raw_record

#: Called with what is being done, the steps done and the steps in all.
Report = Callable[[str, int, int], None]

#: Bitwidths that the search chooses from.
WIDTHS = range(1, MAX_BITS + 1)
#: Weights per group of the search unless told otherwise; docs/cli.md has the measurement.
SEARCH_GROUP_SIZE = 64

#: The running statistics of BatchNorm: never quantized nor rounded to float16. A state
#: dict does not tell buffers from parameters; these are the ones that rounding would harm.
STATISTICS = ("running_mean", "running_var")

# Weights whose errors are measured at a time.
_CHUNK = 1 << 20
# How often groups choose again after the bit map's cost has followed their choice.
_ROUNDS = 5
# The search ends after so many files, or with one that leaves less than 1/1000 unused.
_MOST_FILES = 16
_CLOSE = 0.999


@dataclass(frozen=True)
class Settings:
    """How a state dict is quantized.

    Attributes:
        group_size: consecutive weights that share a bitwidth; None or 0 for the tensor.
        per_channel: one range and one bitwidth for each slice along the first dimension
            (tensors of one dimension: one for all), whatever `group_size` says.
        rules: which tensors are quantized.
        float16: store float tensors that are not quantized as float16.
    """

    group_size: int | None = None
    per_channel: bool = False
    rules: Rules = field(default_factory=Rules)
    float16: bool = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)


def find_ties(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The unique tensors of a state dict, and further names of those that share memory.

    Two names are tied if they show the same memory in the same way; views that overlap
    otherwise are tensors of their own.

    Raises:
        ConfigError: an entry is not a dense tensor.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            kind = type(tensor).__name__ if not isinstance(tensor, Tensor) else tensor.layout
            raise ConfigError(f"A state dict holds dense tensors by name, got {kind} for {name!r}.")
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        target = first.setdefault(key, name) if tensor.numel() else name
        if target == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = target
    return tensors, aliases


def quantize_state(
    state: Mapping[str, Any], bits: int, settings: Settings | None = None
) -> Snapshot:
    """Quantizes every selected tensor at one bitwidth.

    Args:
        state: name to tensor, as `model.state_dict()` gives it.
        bits: bitwidth, 1 to 15.
        settings: what is quantized, and how.

    Raises:
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf, or does not fit float16.
    """
    check_bits(bits)
    model = _Model(state, settings or Settings())
    return model.snapshot({g.name: np.full(g.count, bits, np.uint8) for g in model.grids})


def quantize_to_size(
    state: Mapping[str, Any],
    most: int,
    settings: Settings | None = None,
    codec: Codec = "zstd",
    metadata: Mapping[str, Any] | None = None,
    report: Report = lambda what, done, total: None,
) -> tuple[Snapshot, list[bytes]]:
    """Chooses the bitwidth of each group so that the file has at most `most` bytes.

    Minimises E + λ R: E is the sum of all squared errors, measured for each group at each
    bitwidth; R the bits that the levels and the bit map take, by their entropy (levels:
    that of the whole tensor at this bitwidth; with the "packed" codec, the bitwidth).
    λ is then searched until the file, as really encoded, nearly fills the size.

    Args:
        state: name to tensor.
        most: bytes of the whole file.
        settings: what is quantized, and how.
        codec: see `diffq.save`.
        metadata: see `diffq.save`.
        report: told about progress.

    Returns:
        The snapshot, and the parts of its file.

    Raises:
        ConfigError: no choice of bitwidths fits, or as `quantize_state`.
        WeightError: as `quantize_state`.
    """
    model = _Model(state, settings or Settings(group_size=SEARCH_GROUP_SIZE))
    search = _Search(model, most, codec, metadata or {}, report)
    return search.run()


class _Model:
    """A state dict's unique tensors: those to quantize on their grids, others as records."""

    def __init__(self, state: Mapping[str, Any], settings: Settings) -> None:
        tensors, self.aliases = find_ties(state)
        names = {name: [name] for name in tensors}
        for alias, name in self.aliases.items():
            names[name].append(alias)
        settings.rules.check_patterns(list(state))
        self.order = list(tensors)
        self.grids: list[_Grid] = []
        self.raw: dict[str, RawRecord] = {}
        for name, tensor in tensors.items():
            statistic = name.rpartition(".")[2] in STATISTICS
            if not statistic and tensor.numel() and settings.rules.select(names[name], tensor):
                self.grids.append(_Grid(name, tensor, settings))
            else:
                half = settings.float16 and not statistic
                self.raw[name] = _half_record(name, tensor) if half else raw_record(tensor)

    def snapshot(self, bits: Mapping[str, NDArray[np.uint8]]) -> Snapshot:
        """The records with the bitwidths of each tensor's groups."""
        levels = {grid.name: grid.record(bits[grid.name]) for grid in self.grids}
        records = {name: levels.get(name) or self.raw[name] for name in self.order}
        return Snapshot(records, self.aliases)


class _Grid:
    """One tensor to quantize: its groups and range."""

    def __init__(self, name: str, weight: Tensor, settings: Settings) -> None:
        self.name, self.weight = name, weight
        per_channel = settings.per_channel and weight.ndim > 1
        if per_channel:
            self.size = weight.numel() // weight.shape[0]
        else:
            self.size = min(settings.group_size or weight.numel(), weight.numel())
        self.count = group_count(weight.numel(), self.size)
        if per_channel:
            groups = weight.reshape(weight.shape[0], -1)
            low, high = torch.amin(groups, dim=1), torch.amax(groups, dim=1)
        else:
            low, high = grid.bounds(weight)
        self.low, self.high = low.float(), high.float()
        check_range(self.low, self.high, name)

    @property
    def constant(self) -> bool:
        """Whether no level is stored."""
        return torch.equal(self.low, self.high)

    @property
    def spread(self) -> float:
        """The longest range."""
        return float((self.high - self.low).max())

    def record(self, bits: NDArray[np.uint8]) -> GridRecord:
        """What is stored at the bitwidths [groups]."""
        groups = grid.to_groups(self.weight.float(), self.size)
        levels = grid.to_levels(groups, self.low, self.high, torch.from_numpy(bits).float())
        return GridRecord(
            shape=tuple(self.weight.shape),
            dtype=dtype_name(self.weight.dtype),
            group_size=self.size,
            min_bits=int(bits.min()),
            bits=bits,
            levels=levels.reshape(-1)[: self.weight.numel()].to(torch.int16).numpy().view("u2"),
            ranges=torch.stack([self.low, self.high], dim=1).numpy(),
        )

    def measure(self, scale: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared error of each group at each bitwidth, and how often each level occurs.

        Args:
            scale: unit of the errors, at least `spread`, so that no square overflows.

        Returns:
            [groups, widths], and [widths, 2**15].
        """
        groups = grid.to_groups(self.weight.float(), self.size)
        errors = np.empty((self.count, len(WIDTHS)), np.float32)
        counts = np.zeros((len(WIDTHS), 1 << MAX_BITS), np.int64)
        step = max(1, _CHUNK // self.size)
        for start in range(0, self.count, step):
            part = groups[start : start + step]
            ends = slice(start, start + step) if len(self.low) > 1 else slice(None)
            padding = max(0, (start + len(part)) * self.size - self.weight.numel())
            for column, width in enumerate(WIDTHS):
                on_grid = self.low[ends], self.high[ends], torch.tensor([float(width)])
                levels = grid.to_levels(part, *on_grid)
                error = (grid.from_levels(levels, *on_grid) - part) / scale
                flat = levels.reshape(-1)
                if padding:
                    error.view(-1)[-padding:] = 0
                    flat = flat[:-padding]
                errors[start : start + step, column] = (error * error).sum(dim=1).numpy()
                counts[column] += np.bincount(flat.to(torch.int32).numpy(), minlength=1 << MAX_BITS)
        return errors, counts


@dataclass(frozen=True)
class _Choice:
    """What one tensor's groups can choose from.

    Attributes:
        errors: squared error, [groups, widths].
        weights: weights of each group, [groups].
        rates: expected bits per weight, [widths].
    """

    errors: NDArray[np.float32]
    weights: NDArray[np.float32]
    rates: NDArray[np.float32]

    def best(self, price: float) -> tuple[NDArray[np.uint8], float]:
        """Bitwidths that minimise error + price · bits, and the bits that they take.

        A group's entry in the bit map costs -log2 of the share of groups that choose the
        same; shares and choices follow each other for some rounds.
        """
        costs = self.errors + np.float32(price) * (self.weights[:, None] * self.rates)
        map_costs = np.zeros(len(WIDTHS), np.float32)
        for _ in range(_ROUNDS):
            chosen = (costs + np.float32(price) * map_costs).argmin(axis=1)
            used = np.bincount(chosen, minlength=len(WIDTHS))
            # A bitwidth that nobody chose stays possible, at the price of a rare one.
            map_costs = -np.log2(np.maximum(used, 0.5) / len(chosen)).astype(np.float32)
        total = float((self.weights * self.rates[chosen]).sum()) + entropy_bits(used)
        return (chosen + WIDTHS.start).astype(np.uint8), total


class _Search:
    """Finds the price of a bit at which the file just fits."""

    def __init__(
        self,
        model: _Model,
        most: int,
        codec: Codec,
        metadata: Mapping[str, Any],
        report: Report,
    ) -> None:
        self.model, self.most, self.report = model, most, report
        self._codec, self._metadata = codec, metadata
        scale = max((grid.spread for grid in model.grids), default=0) or 1.0
        self._choices: dict[str, _Choice] = {}
        for number, tensor_grid in enumerate(model.grids):
            report("measuring errors", number, len(model.grids))
            self._choices[tensor_grid.name] = self._choice(tensor_grid, scale)
        # Errors are in units of the longest range, so that these prices mean the finest
        # and the coarsest grids whatever the weights are.
        self._prices = 2.0**-100, 2.0**20

    def run(self) -> tuple[Snapshot, list[bytes]]:
        """The file of least error found among those that fit."""
        found, size, expected = self._encode(self._prices[1])
        if size > self.most:
            raise ConfigError(
                f"The smallest file has {size} bytes ({size / MEGABYTE:.4f} MB), "
                f"the target is {self.most}. Quantize more tensors (a smaller min_size), "
                "store the others as float16, or allow more."
            )
        fits, exceeds = self._prices[1], self._prices[0]
        for number in range(_MOST_FILES):
            if size >= _CLOSE * self.most:
                break
            self.report("searching bitwidths", number, _MOST_FILES)
            price = self._solve(self.most - (size - expected), exceeds, fits)
            if number % 4 == 3 or not exceeds < price < fits:
                # Halving ends the search where the estimate misleads it.
                price = (exceeds * fits) ** 0.5
            tried, tried_size, tried_expected = self._encode(price)
            if tried_size > self.most:
                exceeds, size, expected = price, tried_size, tried_expected
                continue
            fits, found, size, expected = price, tried, tried_size, tried_expected
        return found

    def _choice(self, tensor_grid: _Grid, scale: float) -> _Choice:
        errors, counts = tensor_grid.measure(scale)
        numel = tensor_grid.weight.numel()
        weights = np.full(tensor_grid.count, tensor_grid.size, np.float32)
        weights[-1] -= tensor_grid.count * tensor_grid.size - numel
        if self._codec == "packed":
            rates = np.array(WIDTHS, np.float32)
        else:
            rates = np.array([entropy_bits(count) / numel for count in counts], np.float32)
        return _Choice(errors, weights, rates)
