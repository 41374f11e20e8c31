"""The earlier package's other two quantizers, under its names and with its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffq.checks import check_flag
from diffq.errors import ConfigError
from diffq.quantizers.lsq import LSQQuantizer
from diffq.quantizers.qat import QATQuantizer


class UniformQuantizer(QATQuantizer):
    """`QATQuantizer` with the arguments of the earlier package, for code that uses them.

    Args:
        model: a plain model, changed in place until `detach()`.
        bits: bitwidth of every quantized weight, 1 to 15.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        float16: store the parameters that are not quantized as float16.
        qat: round the weights in training too; by default only in eval mode.
        exclude: name patterns of parameters to leave alone.
        detect_bound: tied parameters are stored once; always so.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: float = 8,
        min_size: float = 0.01,
        float16: bool = False,
        qat: bool = False,
        exclude: Sequence[str] = (),
        detect_bound: bool = True,
    ) -> None:
        _check_ties(detect_bound)
        check_flag(qat, "qat")
        super().__init__(
            model,
            bits=_whole(bits),
            training=qat,
            min_size=min_size,
            exclude=exclude,
            float16=float16,
        )


class LSQ(LSQQuantizer):
    """`LSQQuantizer` with the arguments of the earlier package, for code that uses them.

    Args:
        model: a plain model, changed in place until `detach()`.
        bits: bitwidth of every quantized weight, 2 to 15.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        float16: store the parameters that are not quantized as float16.
        exclude: name patterns of parameters to leave alone.
        detect_bound: tied parameters are stored once; always so.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: float = 8,
        min_size: float = 0.01,
        float16: bool = False,
        exclude: Sequence[str] = (),
        detect_bound: bool = True,
    ) -> None:
        _check_ties(detect_bound)
        super().__init__(
            model, bits=_whole(bits), min_size=min_size, exclude=exclude, float16=float16
        )


def _whole(bits: Any) -> Any:
    """8.0 as 8; other numbers are left for the check of bitwidths to refuse."""
    return int(bits) if isinstance(bits, float) and bits.is_integer() else bits


def _check_ties(detect_bound: Any) -> None:
    if detect_bound is not True:
        raise ConfigError(
            "detect_bound must be True: tied parameters are always found and stored once, "
            f"got {detect_bound!r}. Leave the argument out."
        )
