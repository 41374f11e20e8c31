"""Fixes bitwidths or steps so that the file is just below a size.

All learned ones are moved by one shift before they are rounded, which keeps their order: what
training gave more bits keeps more. The size grows with the shift, and the encoder says how far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffq.attach.attachment import Attachment
from diffq.errors import ConfigError, warn
from diffq.numerics.fineness import Fineness
from diffq.numerics.size import MEGABYTE_BITS
from diffq.torch_inside.sharding import is_distributed, mesh_device

#: Shares of the target in which a size has landed: with training to follow, and in the end.
FIRST_WINDOW, LAST_WINDOW = (0.992, 0.998), (0.99, 1.0)

_TRIES = 30

#: By how much groups that are equally fine are moved apart, so that a shift takes some first.
_APART, _WHOLE_APART = 0.05, 0.98

_MORE = "quantize more tensors (min_size, exclude, small_bits), or ask for more MB."
_BITS = "Lower min_bits, take an EntropyQuantizer, which can do with less than a bit a weight, "


@dataclass(frozen=True)
class _Real:
    """How finely one tensor is quantized, float64 [groups], from which a shift makes whole ones."""

    index: int
    fineness: Fineness
    numbers: Tensor
    finest: Tensor | None

    def learned(self, shift: float) -> Tensor:
        whole = (self.numbers + shift).round()
        if self.finest is not None:
            whole = torch.minimum(whole, self.finest)
        return self.fineness.learned(whole.clamp(self.fineness.least, self.fineness.most))


def land(attachment: Attachment, measure: Callable[[], float], target: float, last: bool) -> float:
    """Fixes what decides the size for a file below a target, and rounds in training from here on.

    Args:
        attachment: what is on the model.
        measure: MB of the file. A collective on several ranks.
        target: MB.
        last: whether no training follows.

    Returns:
        MB of the file.
    """
    low, high = (share * target for share in (LAST_WINDOW if last else FIRST_WINDOW))
    size = math.inf if any(q.fineness and q.learning for q in attachment.quantizers) else measure()
    if not low <= size <= high:
        real = _apart(attachment)
        widest = max(each.fineness.most - each.fineness.least for each in real)

        def size_at(shift: float) -> float:
            _fix(attachment, real, shift)
            return measure()

        size = search(size_at, low, high, widest)
    if size > target:
        warn(
            f"The file takes {size:.4g} MB as coarse as it gets, which is above "
            f"target_mb={target:.4g}. {_remedy(attachment)}"
        )
    return size


def search(size_at: Callable[[float], float], low: float, high: float, most: float) -> float:
    """Finds a shift whose size is in a window, else with the largest size below it.

    The size grows with the shift but for small jumps, so an interval that holds the window is cut
    by a chord of the logarithms, and each third time in halves.

    Args:
        size_at: applies a shift, and gives the size.
        low: the window's lower end.
        high: the window's upper end.
        most: the largest shift, down and up.

    Returns:
        The size of the shift that was applied last; above the window if even the least is.
    """
    goal = (low + high) / 2
    ends = [(-most, math.nan), (most, math.nan)]  # shift, and logarithm of size over goal
    best: tuple[float, float] | None = None
    shift = 0.0
    for attempt in range(_TRIES):
        size = size_at(shift)
        if size <= high and (best is None or size > best[1]):
            best = shift, size
        error = math.log(size / goal)
        if low <= size <= high or shift == math.copysign(most, -error):
            return size
        ends[error > 0] = shift, error
        shift = _next_shift(ends, shift, error, attempt)
    return size_at(-most if best is None else best[0])


def _next_shift(
    ends: Sequence[tuple[float, float]], shift: float, error: float, attempt: int
) -> float:
    (first, below), (second, above) = ends
    if math.isnan(below) or math.isnan(above):
        # A bit more is a fourth of a size of four bits; somewhat farther, to have both ends.
        step = -6 * error * 2.0**attempt
        return min(max(shift + step, first), second)
    if attempt % 3 == 2:
        return (first + second) / 2
    chord: float = first + (second - first) * below / (below - above)
    return chord


def _fix(attachment: Attachment, real: Sequence[_Real], shift: float) -> None:
    """Fixes what decides the size, with a shift."""
    values: list[Tensor | None] = [None] * len(attachment.quantizers)
    for each in real:
        values[each.index] = each.learned(shift)
    attachment.learned.write(values)
    parts = attachment.learned.parts()
    for each in real:
        part = parts[each.index]
        attachment.quantizers[each.index].fix_size(None if part is None else part.detach())
    attachment.forget()


def _apart(attachment: Attachment) -> list[_Real]:
    """How finely all tensors are quantized, where equal groups are moved apart."""
    found, first = [], 0
    finest = attachment.each_weight(lambda q, weight, learned: q.finest(weight))
    for q, part in zip(attachment.quantizers, attachment.learned.parts(), strict=True):
        fineness = q.fineness
        if fineness is None or part is None:
            continue
        real = fineness.of(part)
        width = _APART if q.learning else _WHOLE_APART
        real = real if q.learning else real.round()
        # Multiples of the golden ratio are spread evenly, whatever their number.
        order = torch.arange(first, first + len(real), dtype=torch.float64, device="cpu")
        spread = torch.frac(order * (math.sqrt(5) - 1) / 2) - 0.5
        found.append(_Real(q.index, fineness, real + width * spread, finest[q.index]))
        first += len(real)
    return found


@torch.no_grad()
def check_reachable(
    attachment: Attachment,
    packed: Callable[[], Tensor],
    measure: Callable[[], float],
    target: float,
) -> None:
    """Raises ConfigError for a target below the least size.

    That is the size with every bitwidth at its least, or every step at its coarsest: of the
    present weights, or of normally distributed ones where that is less, as weights become so in
    training.

    Args:
        attachment: what is on the model.
        packed: MB of packed bitwidths.
        measure: MB of the file.
        target: MB.
    """
    parameter = attachment.learned.parameter
    sized = [(q, q.fineness) for q in attachment.quantizers if q.fineness is not None]
    if parameter is None or parameter.is_meta or not all(q.learning for q, _ in sized):
        return
    parts = attachment.learned.parts()
    kept = [None if part is None else part.clone() for part in parts]
    least: list[Tensor | None] = [None] * len(parts)
    for q, fineness in sized:
        part = parts[q.index]
        if part is not None:
            least[q.index] = fineness.learned(torch.full_like(part, fineness.least))
    try:
        attachment.learned.write(least)
        saved = sum(q.plan.numel * fineness.saved for q, fineness in sized)
        size = measure()
        if saved:
            size = min(size, packed().item() - saved / MEGABYTE_BITS)
    finally:
        attachment.learned.write(kept)
        attachment.forget()
    if target < size:
        raise ConfigError(
            f"target_mb must be at least {size:.4g} for this model and quantizer, whose file takes "
            f"that as coarse as it gets, got {target:.4g}. {_remedy(attachment)}"
        )


def largest_on_ranks(attachment: Attachment, size: float) -> float:
    """The largest of the sizes that ranks have measured, whose buffers may differ."""
    parameter = attachment.learned.parameter
    if parameter is None or not is_distributed() or torch.distributed.get_world_size() == 1:
        return size
    value = torch.tensor(size, dtype=torch.float64, device=mesh_device(parameter))
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return float(value.item())


def _remedy(attachment: Attachment) -> str:
    """What makes a file smaller than the quantizer can."""
    steps = any(quantizer.coded for quantizer in attachment.quantizers)
    return _MORE[0].upper() + _MORE[1:] if steps else _BITS + _MORE
