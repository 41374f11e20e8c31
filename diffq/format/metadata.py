"""The user's JSON object in a file (docs/format.md, section 9)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from diffq.errors import FormatError
from diffq.format.wire import damaged

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_WHERE = "The metadata"


def write_metadata(metadata: Mapping[str, Any]) -> bytes:
    """JSON in one form: sorted keys, no spaces, ASCII.

    Raises:
        FormatError: not a JSON object, too long or too deep, or a number that is not finite.
    """
    if not isinstance(metadata, Mapping):
        raise FormatError(f"The metadata is a dict, got {type(metadata).__name__}.")
    try:
        _check_keys(metadata)
        text = json.dumps(dict(metadata), sort_keys=True, separators=(",", ":"), allow_nan=False)
        read_metadata(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            "The metadata must be plain JSON (dict with str keys, list, str, int, finite float, "
            f"bool, None) of at most {MAX_BYTES} bytes and {MAX_DEPTH} levels, got: {error}."
        ) from error
    return text.encode()


def read_metadata(data: bytes | memoryview) -> dict[str, Any]:
    """Inverse of `write_metadata`.

    Raises:
        FormatError: not a JSON object within the bounds.
    """
    if len(data) > MAX_BYTES:
        raise damaged(_WHERE, f"it has at most {MAX_BYTES} bytes", len(data))
    try:
        metadata = json.loads(
            bytes(data).decode(),
            parse_constant=_finite,
            parse_float=_finite,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        raise damaged(_WHERE, "it must be JSON", error) from error
    if not isinstance(metadata, dict):
        raise damaged(_WHERE, "it must be a JSON object", type(metadata).__name__)
    _check_depth(metadata)
    return metadata


def _check_keys(value: Any) -> None:
    # json.dumps would turn other keys into strings.
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r}")
    children = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list | tuple):
        for child in children:
            _check_keys(child)


def _check_depth(metadata: dict[str, Any]) -> None:
    level: list[Any] = [metadata]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise damaged(_WHERE, f"it nests at most {MAX_DEPTH} deep", "more")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key that occurs twice")
    return made
