"""The loss by tensor and bitwidth: one tensor of a model is quantized at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffq.attach.attachment import is_attached
from diffq.attach.plan import Rules
from diffq.checks import check_bits
from diffq.errors import AttachError, ConfigError
from diffq.ptq.evaluation import Evaluation, Loss, check_finite_loss
from diffq.ptq.state import Settings, StateGrid, StatePlan, place_of
from diffq.quantizers.progress import ProgressBar
from diffq.reports.tables import table
from diffq.torch_inside.sharding import is_sharded


@dataclass(frozen=True)
class TensorSensitivity:
    """What happens if one tensor alone is quantized.

    Attributes:
        names: every name of the tensor in the state dict.
        shape: the tensor's shape.
        losses: bitwidth to the mean loss.
        errors: bitwidth to the sum of the squared errors of the weights.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    losses: Mapping[int, float]
    errors: Mapping[int, float]


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """Losses by tensor and bitwidth, as `diffq.sensitivity` measured them.

    Printed, it is a table of how much each loss is above that of the model as it is.

    Attributes:
        loss: the mean loss of the model as it is.
        bits: the bitwidths, rising.
        tensors: name to what was measured, the largest loss at the fewest bits first.
    """

    loss: float
    bits: tuple[int, ...]
    tensors: Mapping[str, TensorSensitivity]

    def increase(self, name: str, bits: int) -> float:
        """How much larger the loss is with one tensor at a bitwidth.

        Args:
            name: the tensor's first name.
            bits: one of the bitwidths that were measured.
        """
        return self.tensors[name].losses[bits] - self.loss

    def table(self) -> str:
        """Tensor, shape, and the increase of the loss at each bitwidth."""
        rows = [
            (
                " = ".join(tensor.names),
                "x".join(map(str, tensor.shape)),
                *(f"{self.increase(name, bits):+.3g}" for bits in self.bits),
            )
            for name, tensor in self.tensors.items()
        ]
        header = "tensor", "shape", *(f"{bits} bit{'s' * (bits > 1)}" for bits in self.bits)
        return f"loss {self.loss:.6g}, and what one quantized tensor adds to it\n" + table(
            header, rows, left=2
        )

    def __repr__(self) -> str:
        return self.table()


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    per_channel: bool = False,
    min_size: float = 0.01,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Sensitivity:
    """Measures how much the loss grows if one tensor alone is quantized.

    Each tensor takes the values of each bitwidth in turn, on the grid of `QATQuantizer`, and
    the loss is evaluated over all batches, in eval mode and without gradients. Afterwards, and
    after any error, the model is as it was, bit for bit. Each pass draws the same random numbers.

    The passes are one for the model as it is, and one for each tensor and bitwidth.
    A progress bar on stderr shows how far they are, if that is a terminal.

    Args:
        model: a plain model, which eval and the batches suit: on their device, in their dtype.
        batches: a list, DataLoader or other iterable that gives the same batches each time.
        loss: called with the model and a batch, returns the mean loss of the batch. By
            default `model(**batch).loss`, for models of transformers and batches with labels.
        bits: bitwidths, 1 to 15.
        per_channel: one range for each slice along the first dimension of a tensor.
        min_size: tensors of more than this many MB in float32 are measured.
        include: name patterns; if there are any, only tensors that match are measured.
        exclude: name patterns of tensors that are not measured.

    Returns:
        The losses. `quantize_checkpoint(..., sensitivity=...)` takes them.

    Raises:
        ConfigError: an argument breaks a rule, nothing is measured, the batches are none or
            can be gone through only once, or the loss of the model is not finite.
        AttachError: the model has a quantizer, or is sharded.
        WeightError: a weight to quantize holds NaN or Inf.

    Examples:
        >>> measured = diffq.sensitivity(
        ...     model, batches, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
        ... )
        >>> print(measured)
    """
    widths = _check_widths(bits)
    _check_model(model)
    evaluation = Evaluation(model, batches, loss)
    settings = Settings(None, per_channel, Rules(min_size, include, exclude))
    sweep = _Sweep(model, settings, widths)
    with ProgressBar("sensitivity", 1 + len(sweep.grids) * len(widths)) as bar:
        bar.advance(0, "as it is")
        plain = evaluation.mean_loss()
        check_finite_loss(plain)
        tensors = sweep.run(evaluation, bar)

    def falling(tensor: TensorSensitivity) -> float:
        lowest = tensor.losses[widths[0]]
        return -math.inf if math.isnan(lowest) else -lowest

    ordered = sorted(tensors, key=falling)
    return Sensitivity(plain, widths, {tensor.names[0]: tensor for tensor in ordered})


class _Sweep:
    """Every selected tensor of a model at every bitwidth, one at a time.

    Raises:
        ConfigError: nothing is selected, or a tensor of the state dict is not the model's own.
    """

    def __init__(self, model: nn.Module, settings: Settings, widths: tuple[int, ...]) -> None:
        state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        plan = StatePlan(state, settings)
        if not plan.grids:
            raise ConfigError(plan.why_nothing())
        own = {place_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.grids, self._widths = plan.grids, widths
        self._names = plan.names
        # With a version counter of their own: a graph that awaits its backward stays valid.
        self._live = {grid.name: state[grid.name].data for grid in plan.grids}
        for name, tensor in self._live.items():
            if place_of(tensor) not in own:
                raise ConfigError(
                    f"The state dict must show the model's own tensors, but {name!r} is a copy, so "
                    f"that changes of it have no effect. Pass exclude=[{name!r}]."
                )
        self._original: tuple[Tensor, Tensor] | None = None

    def run(self, evaluation: Evaluation, bar: ProgressBar) -> list[TensorSensitivity]:
        """Evaluates all of them; the model is as before, whatever happens."""
        try:
            return [self._measure(grid, evaluation, bar) for grid in self.grids]
        finally:
            # Once more: Ctrl-C may have come before the first call could begin.
            self._restore()

    def _measure(
        self, grid: StateGrid, evaluation: Evaluation, bar: ProgressBar
    ) -> TensorSensitivity:
        live, losses, errors = self._live[grid.name], {}, {}
        for bits in self._widths:
            bar.advance(1, f"{grid.name} at {bits} bits")
            values = grid.grid.values(torch.tensor([float(bits)]))
            errors[bits] = float((values.double() - grid.grid.weight.double()).square().sum())
            self._original = live, live.clone()
            try:
                live.copy_(values)
                losses[bits] = evaluation.mean_loss()
            finally:
                self._restore()
        return TensorSensitivity(tuple(self._names[grid.name]), tuple(live.shape), losses, errors)

    def _restore(self) -> None:
        if self._original is not None:
            live, values = self._original
            live.copy_(values)
            self._original = None


def _check_widths(bits: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(bits, Sequence) or isinstance(bits, str) or not bits:
        raise ConfigError(f"bits must be a list of bitwidths, such as [2, 4, 8], got {bits!r}.")
    for width in bits:
        check_bits(width, "Each of bits")
    return tuple(sorted({int(width) for width in bits}))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"sensitivity needs the model that computes the loss, got {type(model).__name__}. "
            "Pass a torch.nn.Module."
        )
    if is_attached(model):
        raise AttachError(
            "sensitivity quantizes the tensors of a plain model, but this one has a quantizer. "
            "Call quantizer.detach() first."
        )
    if is_sharded(model):
        raise AttachError(
            "sensitivity quantizes whole tensors, but this model is sharded. "
            "Measure the plain model before fully_shard."
        )
