"""Shell patterns for full names, such as `encoder.*.weight`, or for their last part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from diffq.errors import ConfigError


def allowed(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns let a tensor or a layer be quantized."""
    return (not include or matches(include, names)) and not matches(exclude, names)


def matches(patterns: Sequence[str], names: Sequence[str]) -> bool:
    """Whether any of the patterns fits any of the names, or its last part."""
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)
        for pattern in patterns
        for name in names
    )


def check_matches(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises ConfigError for a pattern that matches no name of a parameter."""
    for pattern in patterns:
        if not matches([pattern], names):
            close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ConfigError(
                f"The pattern {pattern!r} matches no parameter. "
                f"Parameters have names such as {', '.join(map(repr, close))}."
            )
