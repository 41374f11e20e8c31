"""Where the state dict of a checkpoint is, and how its names become those of a plain model."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from diffq.errors import ConfigError

# What torch puts into a state dict for modules that define `get_extra_state`.
_EXTRA_STATE = "_extra_state"
_PARAMETRIZED = ".parametrizations."
_MOST_LISTED = 5
_CONTAINERS = (Mapping, list, tuple, set)
# What an attached quantizer adds to the state dict of its model.
_ADDED = ("_diffq.learned", "_diffq.kept", "_diffq._extra_state")
# What earlier ones that learn something added to a parametrized tensor.
_LEARNED = ({"logits", _EXTRA_STATE}, {"codebook", "indices"})
# Prefixes of wrappers, and what they are.
_WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}


@dataclass(frozen=True)
class Checkpoint:
    """The state dict of a checkpoint.

    Attributes:
        state: name to tensor.
        notes: what a user should know of how it was found.
    """

    state: dict[str, Any]
    notes: tuple[str, ...] = ()


def find_state(path: str, loaded: Any, key: str | None) -> Checkpoint:
    """The state dict in what a checkpoint holds.

    Args:
        path: the file, for errors.
        loaded: what torch.load returned.
        key: where the state dict is: keys joined by dots, each of which may have dots. By
            default the top level, or the only state dict there is.

    Raises:
        ConfigError: there is no state dict, or there are several.
    """
    if not isinstance(loaded, Mapping):
        got = type(loaded).__name__
        raise ConfigError(f"{path} must hold a dict, got {got}. Save model.state_dict().")
    if loaded.get("format") == "diffq.state":
        raise ConfigError(
            f"{path} is a quantized state already. Write it as it is with "
            "diffq.save(torch.load(path), 'model.diffq')."
        )
    chosen = loaded if key is None else _descend(loaded, key)
    holders = _holders(loaded)
    if _is_state(chosen, holders):
        return _plain(path, chosen, ())
    found = dict(islice(_candidates(loaded, holders), _MOST_LISTED))
    if key is None and len(found) == 1:
        ((name, state),) = found.items()
        return _plain(path, state, (f"took the state dict under --key {name}",))
    where = "at its top level" if key is None else f"under {key!r}"
    remedy = "Save model.state_dict()."
    if found:
        listed = ", ".join(map(repr, found))
        remedy = f"There are some under {listed}: pass --key {next(iter(found))}."
    raise ConfigError(f"{path} has no state dict (name to tensor) {where}. {remedy}")


def plain_names(path: str, state: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A state dict under the names of the model before a quantizer was attached, with notes.

    A tensor that only a quantizer of diffq parametrizes is stored as it is, so its name can
    be translated. What other parametrizations store is not the weight itself.

    Raises:
        ConfigError: the weights of a quantized model cannot be told from the state dict.
    """
    _check_stages(path, state)
    renamed: dict[str, str] = {}
    left_out: dict[str, None] = {name: None for name in state if name.endswith(_ADDED)}
    kept: list[str] = []
    for stem, parts in _parametrized(state).items():
        owner, _, tensor = f".{stem}".rpartition(_PARAMETRIZED)
        name = f"{owner}.{tensor}"[1:]
        quantized = any(map(_is_quantizer, parts.values()))
        if quantized and parts.keys() == {"original", "0"} and name not in state:
            _check_trained(path, name, parts["0"])
            renamed[f"{stem}.original"] = name
            left_out |= dict.fromkeys(f"{stem}.0.{ending}" for ending in parts["0"])
        elif quantized or _may_be_quantizer(parts):
            raise ConfigError(
                f"{path} does not hold {name!r} itself: a quantizer or another parametrization "
                "was attached, and computes it from what is stored. Write the file with "
                "diffq.save(quantizer, 'model.diffq'), or save model.state_dict() after "
                "quantizer.detach()."
            )
        else:
            kept.append(name)
    plain = {renamed.get(name, name): t for name, t in state.items() if name not in left_out}
    notes = []
    if left_out:
        notes.append(
            "a quantizer was attached: took the plain weights without its own state, such as "
            f"{next(iter(left_out))}; diffq.save(quantizer, path) keeps that"
        )
    if kept:
        notes.append(
            f"other parametrizations compute {_listed(kept)}; the names of what they store stay"
        )
    return plain, tuple(notes)


def _plain(path: str, found: Mapping[str, Any], notes: tuple[str, ...]) -> Checkpoint:
    """The tensors of a state dict, under plain names, and notes on the rest."""
    from torch import Tensor

    state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    others = [name for name in found if name not in state]
    extra = [name for name in others if _is_extra(name)]
    rest = [name for name in others if not _is_extra(name)]
    state, more = plain_names(path, state)
    if extra:
        notes += (f"extra state of modules is not stored: {_listed(extra)}",)
    if rest:
        notes += (f"left out, because they are no tensors: {_listed(rest)}",)
    for prefix, wrapper in _WRAPPERS.items():
        if all(name.startswith(prefix) for name in state):
            notes += (
                f"all names keep the prefix {prefix!r} of {wrapper}; save the state dict of the "
                "wrapped model for names without it",
            )
    return Checkpoint(state, notes + more)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MOST_LISTED]) + ", ..." * (len(names) > _MOST_LISTED)


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def _is_state(value: Any, holders: set[int]) -> bool:
    """Tells whether a value maps names to tensors, and to nothing else that holds tensors."""
    from torch import Tensor

    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    others = [v for n, v in value.items() if not isinstance(v, Tensor) and not _is_extra(n)]
    return len(others) < len(value) and not any(
        id(other) in holders for other in others if other is not value
    )


def _holders(value: Any) -> set[int]:
    """Ids of the containers within a value, itself included, that hold tensors at any depth."""
    from torch import Tensor

    # A checkpoint can share containers, and contain itself: each is looked into once.
    parents: dict[int, list[int]] = {id(value): []}
    holders, queue = set(), deque([value])
    while queue:
        container = queue.popleft()
        for item in container.values() if isinstance(container, Mapping) else container:
            if isinstance(item, Tensor):
                holders.add(id(container))
            elif isinstance(item, _CONTAINERS):
                if id(item) not in parents:
                    parents[id(item)] = []
                    queue.append(item)
                parents[id(item)].append(id(container))
    rising = list(holders)
    while rising:
        above = set(parents[rising.pop()]) - holders
        holders |= above
        rising += above
    return holders


def _children(value: Any) -> Mapping[str, Any]:
    """What a key can lead to."""
    if isinstance(value, (list, tuple)):
        return {str(number): item for number, item in enumerate(value)}
    # The tensors of an optimizer have numbers for names.
    if not isinstance(value, Mapping) or "param_groups" in value:
        return {}
    return {name: item for name, item in value.items() if isinstance(name, str)}


def _candidates(loaded: Any, holders: set[int]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The state dicts within a value, each once under its shortest key, shortest keys first."""
    seen = {id(loaded)}
    # A key is a pair of the key before it and a name: joined at each level, deep ones take long.
    queue: deque[tuple[Any, Any]] = deque([(loaded, None)])
    while queue:
        value, before = queue.popleft()
        for name, item in _children(value).items():
            if id(item) not in holders or id(item) in seen:
                continue
            seen.add(id(item))
            key = (before, name)
            if _is_state(item, holders):
                yield _joined(key), item
            else:
                queue.append((item, key))


def _joined(key: Any) -> str:
    names = []
    while key is not None:
        key, name = key
        names.append(name)
    return ".".join(reversed(names))


def _descend(value: Any, key: str) -> Any:
    """What is under a key; the longest part that is a key itself comes first."""
    children = _children(value)
    if key in children:
        return children[key]
    parts = key.split(".")
    for count in range(len(parts) - 1, 0, -1):
        first = ".".join(parts[:count])
        if first in children:
            found = _descend(children[first], ".".join(parts[count:]))
            if found is not None:
                return found
    return None


def _parametrized(state: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Tensors of each `a.parametrizations.weight`, by `original` or a position in the chain."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in state.items():
        owner, separator, rest = f".{name}".rpartition(_PARAMETRIZED)
        tensor, dot, ending = rest.partition(".")
        if separator and dot:
            part, _, within = ending.partition(".")
            found[f"{owner}{separator}{tensor}"[1:]][part][within] = value
    return found


def _is_quantizer(stored: Mapping[str, Any]) -> bool:
    """Tells whether a parametrization that stores these tensors is a quantizer of diffq."""
    import torch

    # Fixed bitwidths are all that is stored of a `DiffQuantizer` that learns none.
    fixed = stored.keys() == {_EXTRA_STATE} and stored[_EXTRA_STATE].dtype == torch.uint8
    return fixed or any(learned <= stored.keys() for learned in _LEARNED)


def _may_be_quantizer(parts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tells whether only what a `QATQuantizer` or `LSQQuantizer` stores is there."""
    return parts.keys() <= {"original", "0"} and parts.get("0", {}).keys() <= {"scale"}


def _check_stages(path: str, state: Mapping[str, Any]) -> None:
    """Checks that no codebook is trained in the place of a tensor."""
    from diffq.attach.checkpoints import stages

    _, kept, settings = _ADDED
    for name in (name for name in state if name.endswith(settings)):
        prefix = name.removesuffix(settings)
        found = stages(state[name]) if prefix + kept in state else {}
        for tensor in (tensor for tensor, stage in found.items() if stage):
            raise _trained(path, prefix + tensor)


def _check_trained(path: str, name: str, stored: Mapping[str, Any]) -> None:
    """Checks that a quantizer trains the tensor itself, and no codebook in its place."""
    if "codebook" in stored and _EXTRA_STATE in stored and stored[_EXTRA_STATE].any():
        raise _trained(path, name)


def _trained(path: str, name: str) -> ConfigError:
    return ConfigError(
        f"{path} holds {name!r} as it was before quantize_stage() fixed its codewords: the "
        "codebook was trained in its place. Write the file with diffq.save(quantizer, "
        "'model.diffq'), or save model.state_dict() after quantizer.detach(quantized=True)."
    )
