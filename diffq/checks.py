"""Checks of what users pass in, with errors that name the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from diffq.errors import ConfigError

MAX_BITS = 15

#: With fewer, the few levels of a norm or a bias would cost quality for hardly any bytes.
LEAST_SMALL_BITS = 4


def check_bits(bits: Any, name: str = "bits", least: int = 1, most: int = MAX_BITS) -> None:
    """Raises ConfigError unless `bits` is a whole number of bits that can be stored."""
    if not _is_whole(bits) or not least <= bits <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {bits!r}.")


def check_small_bits(value: Any) -> None:
    """Raises ConfigError unless `value` is a bitwidth for small parameters, or None."""
    if value is not None and (not _is_whole(value) or not LEAST_SMALL_BITS <= value <= MAX_BITS):
        raise ConfigError(
            f"small_bits must be None or a whole number from {LEAST_SMALL_BITS} to {MAX_BITS}, "
            f"got {value!r}. Pass 8, or None to store small parameters as they are."
        )


def check_number(value: Any, name: str, least: float, most: float = math.inf) -> None:
    """Raises ConfigError unless `value` is a finite number from `least` to `most`."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(f"{name} must be a number, {limits}, got {value!r}.")


def check_whole(value: Any, name: str) -> None:
    """Raises ConfigError unless `value` is a whole number from 1."""
    if not _is_whole(value) or value < 1:
        raise ConfigError(f"{name} must be a whole number from 1, got {value!r}.")


def check_group_size(value: Any) -> None:
    """Raises ConfigError unless `value` is a number of weights, or None for all."""
    if value is not None and (not _is_whole(value) or value < 0):
        raise ConfigError(
            "group_size must be a whole number of weights, or None for the whole tensor, "
            f"got {value!r}."
        )


def check_choice(value: Any, name: str, known: Sequence[str]) -> None:
    """Raises ConfigError unless `value` is one of the known names."""
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def check_flag(value: Any, name: str) -> None:
    """Raises ConfigError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name} must be True or False, got {value!r}.")


def plain(value: Any) -> Any:
    """NumPy's numbers and booleans as Python's, which states can hold; others as they are."""
    return value.item() if isinstance(value, np.generic) else value


def check_patterns(patterns: Any, name: str) -> None:
    """Raises ConfigError unless `patterns` is a list or tuple of strings."""
    if isinstance(patterns, str):
        raise ConfigError(f"{name} must be a list of name patterns; write {name}=[{patterns!r}].")
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"{name} must be a list of name patterns, got {patterns!r}.")


def check_overrides(overrides: Any) -> None:
    """Raises ConfigError unless `overrides` maps name patterns to dicts of settings."""
    sound = isinstance(overrides, dict) and all(
        isinstance(pattern, str) and isinstance(settings, dict)
        for pattern, settings in overrides.items()
    )
    if overrides is not None and not sound:
        raise ConfigError(
            "overrides must map name patterns to dicts of settings, such as "
            f"{{'*.head.weight': {{'bits': 8}}}}, got {overrides!r}."
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
