"""The one tree of errors that diffq raises for what a user, a model or a file got wrong.

* DiffqError
    * ConfigError          an argument, a name pattern or a bitwidth breaks a rule
    * AttachError          a model cannot be quantized, or was changed under its quantizer
    * OptimizerError       the learned parameters are missing from the optimizer
    * CalibrationError     activations have no range yet, or saw no data to take it from
    * WeightError          a weight cannot be quantized (NaN, Inf, out of range)
    * StateError           a quantized state is damaged or incomplete
        * MismatchError    a sound state that belongs to another model
    * FormatError          a file is damaged, hostile or from another version

One warning, for calls that work but hardly as you meant:

* DiffqWarning             nothing is quantized, or learned parameters are not trained

Each message gives the rule, what was got, and the remedy. An operation that
raises one of these has changed nothing.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIBRARIES = {"diffq", "torch", "accelerate", "lightning", "pytorch_lightning", "transformers"}


class DiffqError(Exception):
    """Base of every error that diffq raises on purpose."""


class DiffqWarning(UserWarning):
    """A call works, but hardly as you meant: nothing is quantized, or a part is not trained."""


class ConfigError(DiffqError, ValueError):
    """An argument breaks a rule: a bitwidth, a range of bits, a pattern without match."""


class AttachError(DiffqError, RuntimeError):
    """The model cannot take a quantizer or changed under it, or the quantizer was detached."""


class OptimizerError(DiffqError, RuntimeError):
    """The optimizer does not hold what the quantizer learns."""


class CalibrationError(DiffqError, RuntimeError):
    """Activations have no range yet, or calibration saw no data, NaN or Inf."""


class WeightError(DiffqError, ValueError):
    """A weight cannot be quantized: it holds NaN or Inf, or exceeds the stored range."""


class StateError(DiffqError, ValueError):
    """A quantized state is damaged, incomplete or of an unknown version."""


class MismatchError(StateError):
    """A sound state that does not fit the model: names, shapes, dtypes or settings differ."""


class FormatError(DiffqError, ValueError):
    """A file or packed stream is damaged, hostile, or of an unknown version."""


def missing_package(package: str, purpose: str, extra: str) -> ConfigError:
    """The error for an optional package that is not installed.

    Args:
        package: its name.
        purpose: names the part of diffq that needs it.
        extra: the extra of diffq that installs it.
    """
    return ConfigError(
        f"{purpose} needs the package {package}. Install it with pip install 'diffq[{extra}]', or "
        f"from a checkout with pip install '.[{extra}]'."
    )


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few of them, separated by commas."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def warn(message: str) -> None:
    """Issues a DiffqWarning at the line of the user that led to it, outside of the libraries."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DiffqWarning, stacklevel=level)


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES
