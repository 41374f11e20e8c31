"""The outside of a legacy state: its lists, its kind, and how its tensors are laid out.

A state is `{quantized: [...], float16: [...], others: [...], meta: {...}}`, without
names: entries belong to parameters by position. docs/legacy.md has every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from diffq.checks import MAX_BITS, check_bits, check_number, check_patterns
from diffq.errors import ConfigError, StateError
from diffq.numerics.size import MEGABYTE

KINDS = {"DiffQuantizer": "DiffQ", "UniformQuantizer": "uniform", "LSQ": "LSQ"}


@dataclass(frozen=True)
class Settings:
    """The arguments of the earlier quantizer that say how a state is laid out.

    A state's `meta` holds those that its author passed; these are the defaults.

    Raises:
        ConfigError: a value breaks a rule.
    """

    min_size: float = 0.01
    exclude: Sequence[str] = ()
    detect_bound: bool = True
    group_size: int = 1
    min_bits: int = 2
    bits: float = 8

    def __post_init__(self) -> None:
        check_number(self.min_size, "min_size", 0)
        check_patterns(self.exclude, "exclude")
        if not isinstance(self.detect_bound, bool):
            raise ConfigError(f"detect_bound must be True or False, got {self.detect_bound!r}.")
        if type(self.group_size) is not int or self.group_size < 0:
            raise ConfigError(
                f"group_size must be a whole number of weights, or 0, got {self.group_size!r}."
            )
        check_bits(self.min_bits, "min_bits")
        check_number(self.bits, "bits", 1, MAX_BITS)

    def select(self, name: str, numel: int) -> bool:
        """Whether the earlier package quantizes a parameter."""
        short = name.rpartition(".")[2]
        excluded = any(fnmatchcase(n, p) for p in self.exclude for n in (name, short))
        return numel > self.min_size * MEGABYTE // 4 and not excluded

    def whole_bits(self, where: str) -> int:
        """The bitwidth of a uniform or LSQ state."""
        if self.bits != int(self.bits):
            raise StateError(f"{where} has {self.bits} bits; only whole bitwidths can be read.")
        return int(self.bits)


@dataclass(frozen=True)
class LegacyState:
    """The outside of a state: its lists and how to read them.

    Attributes:
        quantized: one entry for each quantized parameter.
        raw: one tensor for each other parameter.
        half: whether `raw` is stored as float16 whatever the parameter's dtype is.
        kind: the earlier class, by its name; None if the state does not say.
        packed: whether levels are bit planes.
        torch_pack: whether those planes are of 16-bit words.
        settings: what selects and lays out the tensors.
    """

    quantized: Sequence[Any]
    raw: Sequence[Any]
    half: bool
    kind: str | None
    packed: bool
    torch_pack: bool
    settings: Settings


def is_legacy(state: Any) -> bool:
    """Whether this is a state of the earlier package, to look at."""
    return isinstance(state, Mapping) and "format" not in state and "quantized" in state


def read_state(state: Any, settings: Mapping[str, Any] | None = None) -> LegacyState:
    """Reads the outside of a state, which may come from anywhere.

    Args:
        state: the dict.
        settings: arguments of the earlier quantizer, over those in the state.

    Raises:
        StateError: it is no legacy state, or of an unknown kind.
        ConfigError: a setting is unknown or breaks a rule.
    """
    if not is_legacy(state):
        raise StateError(_not_legacy(state))
    lists = {key: state.get(key, ()) for key in ("quantized", "float16", "others")}
    for key, value in lists.items():
        if not isinstance(value, list | tuple):
            raise StateError(f"A legacy state needs a list {key!r}, got {describe(value)}.")
    if lists["float16"] and lists["others"]:
        raise StateError(
            "A legacy state has its other parameters in 'float16' or in 'others', got both."
        )
    meta = state.get("meta", {})
    if not isinstance(meta, Mapping):
        raise StateError(f"A legacy state needs a dict 'meta', got {describe(meta)}.")
    kind = getattr(meta.get("klass"), "__name__", None)
    if "klass" in meta and kind not in KINDS:
        raise StateError(f"Legacy states are of {', '.join(KINDS)}, got {describe(meta['klass'])}.")
    return LegacyState(
        quantized=lists["quantized"],
        raw=lists["float16"] or lists["others"],
        half=bool(lists["float16"]),
        kind=kind,
        packed=bool(meta.get("packed", False)),
        torch_pack=bool(meta.get("torch_pack", False)),
        settings=_settings(meta.get("init_kwargs", {}), settings or {}),
    )


def _settings(stored: Any, given: Mapping[str, Any]) -> Settings:
    known = {field.name for field in fields(Settings)}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ConfigError(
            f"settings may have {', '.join(sorted(known))}, got {', '.join(map(repr, unknown))}."
        )
    if not isinstance(stored, Mapping):
        raise StateError(f"A legacy state needs a dict 'init_kwargs', got {describe(stored)}.")
    laid_out = {name: value for name, value in stored.items() if name in known}
    try:
        Settings(**laid_out)
    except ConfigError as error:
        raise StateError(f"The state's 'init_kwargs' are damaged: {error}") from error
    return Settings(**{**laid_out, **given})


def _not_legacy(state: Any) -> str:
    if isinstance(state, Mapping) and "format" in state:
        return "This state is of the present diffq: pass it to diffq.restore_quantized_state."
    message = f"A legacy state is a dict with a list 'quantized', got {describe(state)}."
    if isinstance(state, Mapping):
        inside = [key for key, value in state.items() if is_legacy(value)]
        message += f" It is inside: pass key={inside[0]!r}." if inside else ""
    return message


def describe(value: Any) -> str:
    """What an error says about a value."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, list(value)[:6])) or 'no keys'}"
    return f"{type(value).__name__} {value!r:.60}"
