"""Activations in few bits: ranges from a few forwards, then fixed.

The inputs of linear and convolutional layers are rounded to a grid, which is what
integer kernels compute with. Weights are quantized by a weight quantizer of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffq.attach.attachment import is_attached
from diffq.attach.guards import check_model
from diffq.attach.patterns import allowed, matches
from diffq.checks import check_bits, check_number, check_patterns, plain
from diffq.errors import AttachError, CalibrationError, ConfigError, warn
from diffq.numerics.grid import finite_levels, is_narrow, widen
from diffq.numerics.masks import block_mask
from diffq.numerics.noise import straight_through
from diffq.numerics.ranges import Observer, RangeTracker, check_observer
from diffq.torch_inside.modules import CONVOLUTIONS, buffers_in, is_attention_projection, is_lazy
from diffq.torch_inside.tensors import Stamp, stamp

#: Name of the buffer that a layer gets: float32 [2, 1] or [2, channels], low and high of
#: its input; NaN before calibration.
BUFFER = "activation_range"

MAX_BITS = 8

_Layer = nn.Linear | CONVOLUTIONS


class ActivationQuantizer:
    """Rounds the inputs of a model's linear and convolutional layers, until `detach()`.

        activations = diffq.ActivationQuantizer(model, bits=8)
        quantizer = diffq.QATQuantizer(model)  # any weight quantizer, attached after it
        with activations.calibrate():
            model(inputs)

    Calibration fixes the ranges, as in the Quant-Noise paper (arXiv:2004.07320, Section
    8.3). From then on, eval rounds; training does so at random with probability `p`.
    The ranges are buffers, so they are part of the state dict, and of the file that the
    weight quantizer writes: attach an `ActivationQuantizer` with the same settings
    before loading either. `nn.MultiheadAttention` calls none of its layers, so what goes
    on inside of it stays in full precision.

    Args:
        model: a plain model, changed in place until `detach()`.
        bits: bitwidth of the activations, 1 to 8.
        observer: "min-max" of each layer's input, "histogram" for the range of least
            squared error, or "channel" for minimum and maximum of each channel.
        p: probability that an element is rounded in a training forward, 0 to 1.
        include: name patterns of layers; if given, only those are quantized.
        exclude: name patterns of layers to leave alone.

    Raises:
        AttachError: the model has a weight quantizer or an activation quantizer already.
        ConfigError: a setting breaks a rule, or a pattern matches no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: int = 8,
        observer: Observer = "min-max",
        p: float = 0.0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        settings = ActivationSettings(plain(bits), observer, plain(p))
        _check_model(model)
        self._layers = _select(model, include, exclude)
        self._inputs = {name: LayerInput(name, settings) for name in self._layers}
        self._handles = [
            handle
            for name, layer in self._layers.items()
            for handle in self._inputs[name].attach(layer)
        ]
        self._attached = True
        if not self._layers:
            reason = "include and exclude leave every layer out. Change the patterns."
            if not (include or exclude):
                reason = "the model has no linear or convolutional layer with an input to quantize."
            warn(f"No activation is quantized: {reason}")

    @contextmanager
    def calibrate(self) -> Iterator[None]:
        """Observes the layers' inputs in a `with` block, and fixes their ranges at its end.

        Run a few typical batches in it, in eval mode, so that layers see what they will
        see later. Nothing is rounded and no gradient is computed meanwhile. A layer that
        sees nothing keeps its range, and so do all if the block raises.

        Raises:
            AttachError: the quantizer was detached.
            CalibrationError: no layer saw any data, or one saw NaN or infinite numbers.
        """
        self._check_attached()
        inputs = self._inputs.values()
        for point in inputs:
            point.tracker = RangeTracker(point.settings.observer, point.settings.bits)
        try:
            with torch.no_grad():
                yield
            found = {point.name: point.found_range() for point in inputs}
        finally:
            for point in inputs:
                point.tracker = None
        if found and all(bounds is None for bounds in found.values()):
            raise CalibrationError(
                "Calibration needs data, but no layer saw any. Call the model in the with "
                "block: `with quantizer.calibrate(): model(inputs)`."
            )
        for name, bounds in found.items():
            if bounds is not None:
                _range_of(self._layers[name]).copy_(bounds)

    def ranges(self) -> dict[str, Tensor]:
        """Layer name to the range of its input: [2, 1] or [2, channels], low and high.

        The step is (high - low) / (2**bits - 1), and -low / step is the level that is
        zero. NaN where a layer has not been calibrated.

        Raises:
            AttachError: the quantizer was detached.
        """
        self._check_attached()
        return {name: _range_of(layer).clone() for name, layer in self._layers.items()}

    def detach(self) -> None:
        """Gives the plain model back, without ranges and hooks.

        Raises:
            AttachError: it was detached before.
        """
        self._check_attached()
        for handle in self._handles:
            handle.remove()
        for layer in self._layers.values():
            delattr(layer, BUFFER)
        self._attached = False

    def _check_attached(self) -> None:
        if not self._attached:
            raise AttachError("This quantizer was detached from its model. Make a new one.")


@dataclass(frozen=True)
class ActivationSettings:
    """How inputs are quantized; see `ActivationQuantizer` for the meaning of each field."""

    bits: int
    observer: Observer
    p: float

    def __post_init__(self) -> None:
        check_bits(self.bits, most=MAX_BITS)
        check_observer(self.observer)
        check_number(self.p, "p", 0, 1)


class LayerInput:
    """What happens to the input of one layer: nothing, observation or rounding.

    Attributes:
        name: the layer's name.
        settings: how its input is quantized.
        tracker: what calibration sees, while it goes on.
    """

    def __init__(self, name: str, settings: ActivationSettings) -> None:
        self.name = name
        self.settings = settings
        self.tracker: RangeTracker | None = None
        self._checked: Stamp = None

    def attach(self, layer: _Layer) -> list[RemovableHandle]:
        """Gives a layer its buffer and hooks."""
        size = _channels(layer) if self.settings.observer == "channel" else 1
        device = next(layer.parameters()).device
        bounds = torch.full((2, size), torch.nan, dtype=torch.float32, device=device)
        layer.register_buffer(BUFFER, bounds)
        return [
            layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True),
            layer.register_load_state_dict_pre_hook(_load_plain),  # type: ignore[no-untyped-call]
        ]

    def found_range(self) -> Tensor | None:
        """The range at the end of a calibration; None if the layer saw no data.

        Raises:
            CalibrationError: it is not finite.
        """
        bounds = self.tracker.range() if self.tracker else None
        if bounds is not None and not torch.isfinite(bounds).all():
            raise CalibrationError(
                f"Activations must be finite, but the input of {self.name} holds NaN or Inf "
                "or its range exceeds float32. Calibrate with sound data and weights."
            )
        return bounds

    def _enter_layer(self, layer: _Layer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (self._pass(layer, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self._pass(layer, kwargs["input"])}

    def _pass(self, layer: _Layer, x: Tensor) -> Tensor:
        after = _dims_after_channels(layer)
        if self.tracker is not None:
            if x.numel():
                channels = x.detach().float().movedim(-1 - after, 0)
                self.tracker.update(channels.reshape(len(channels), -1))
            return x
        rate = self.settings.p if layer.training else 1
        if rate == 0:
            return x
        bounds = _range_of(layer)
        self._check_calibrated(bounds)
        low, high = bounds.view(2, -1, *[1] * after)
        quantized = fake_quantize(x, low, high, self.settings.bits)
        return quantized if rate == 1 else torch.where(block_mask(x, rate, 1), quantized, x)

    def _check_calibrated(self, bounds: Tensor) -> None:
        """Raises CalibrationError for NaN; looks at each version of the buffer once."""
        if torch.compiler.is_compiling():
            return
        version = stamp(bounds)
        if version is None or version != self._checked:
            if not torch.isfinite(bounds).all():
                raise CalibrationError(
                    f"The input of {self.name} has no range yet. Calibrate before evaluating:\n"
                    "    with activations.calibrate():\n"
                    "        model(inputs)"
                )
            self._checked = version


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Rounds to the grid of 2**bits levels from `low` to `high`; numbers outside go to its ends.

    The ends broadcast to the shape of `x`. The gradient passes unchanged for numbers within the
    range, both ends included, and is zero for those outside.
    """
    wide = widen(x)
    low, high = low.to(wide.dtype), high.to(wide.dtype)
    with torch.no_grad():
        top = 2**bits - 1
        step = (high - low) / top
        least, most = low, high
        if is_narrow(x.dtype):
            # The grid may reach beyond the dtype. It ends at the last levels that are finite.
            first, last = finite_levels(step, low, x.dtype)
            least = torch.where(first > 0, low + first * step, low)
            most = torch.where(last < top, low + last * step, high)
        inside = torch.clamp(wide, least, most)
        levels = torch.round((inside - low) / torch.where(step > 0, step, 1))
        quantized = levels * step + low
        # Not left to the gradient of clamp: at the ends, some versions of torch halve it.
        passes = inside == wide
    (passed,) = straight_through([wide], [quantized])
    return torch.where(passes, passed, quantized).to(x.dtype)


def _select(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, _Layer]:
    """Name to layer, of those whose inputs are quantized."""
    check_patterns(include, "include")
    check_patterns(exclude, "exclude")
    layers = {
        name: module
        for name, module in model.named_modules()
        # Attention reads the weight of its output projection, and does not call it.
        if isinstance(module, _Layer) and not is_attention_projection(module)
    }
    for pattern in (*include, *exclude):
        if not any(matches([pattern], [name]) for name in layers):
            raise ConfigError(
                f"The pattern {pattern!r} matches no linear or convolutional layer. "
                f"Layers have names such as {', '.join(map(repr, list(layers)[:3]))}."
            )
    return {name: layers[name] for name in layers if allowed([name], include, exclude)}


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.Module) and is_attached(model):
        raise AttachError(
            "Activations are quantized before weights, so that files hold their ranges. "
            "detach() the weight quantizer, make the ActivationQuantizer, then quantize weights."
        )
    check_model(model)
    for name, module in model.named_modules():
        if BUFFER in buffers_in(module):
            raise AttachError(
                f"The input of {name or 'the model'} has an ActivationQuantizer already. "
                "Call detach() on that one first."
            )
        if isinstance(module, _Layer) and any(is_lazy(p) for p in module.parameters()):
            raise AttachError(
                f"{name or 'the model'} has no shape yet. Run one forward of the lazy module first."
            )


def _range_of(layer: _Layer) -> Tensor:
    bounds: Tensor = getattr(layer, BUFFER)
    return bounds


def _dims_after_channels(layer: _Layer) -> int:
    return 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)


def _channels(layer: _Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _load_plain(layer: _Layer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a checkpoint without ranges load; the layer keeps its own."""
    state_dict.setdefault(prefix + BUFFER, _range_of(layer))
