"""Loading the state dict of an attached model: checked first, then taken.

| key | value |
| --- | --- |
| names of the plain model | its tensors |
| `_diffq.learned` | the flat parameter, if something is learned |
| `_diffq.kept` | int32, what some methods hold besides, such as indices of blocks |
| `_diffq._extra_state` | float32, the settings as characters |
| `_diffq.schedule` | float64, where a plan of training stands, if one is followed |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffq.attach.forward import Forwards
from diffq.attach.learned import PLAN, Learned, characters
from diffq.attach.place import Place
from diffq.attach.plan import LEARNED
from diffq.attach.sample import same_memory
from diffq.errors import MismatchError
from diffq.torch_inside.modules import parameter_in, parameters_in
from diffq.torch_inside.sharding import is_dtensor

_FLAT, _KEPT, _SETTINGS = (f"{LEARNED}.{name}" for name in ("learned", "kept", "_extra_state"))

_SCHEDULE = f"{LEARNED}.schedule"

_REMEDY = (
    "Make the quantizer with the settings of the checkpoint; or load its weights alone, without "
    "the entries whose names begin with '_diffq.'."
)


class StateHooks:
    """Hooks of the root that check a state dict before anything is loaded, and take the rest.

    Args:
        forwards: the model's forwards.
        places: of all quantized tensors.
    """

    def __init__(self, forwards: Forwards, places: Sequence[Place]) -> None:
        self._forwards = forwards
        self._places = places
        self._handles: list[RemovableHandle] = []
        # What a load brings besides the learned parameter: stages and integers by name.
        self._loaded: tuple[dict[str, int], dict[str, Tensor]] | None = None
        self._schedule: Tensor | None = None

    def register(self, root: nn.Module) -> None:
        """Registers the hooks."""
        self._handles += [
            root.register_load_state_dict_pre_hook(self._before_load),  # type: ignore[no-untyped-call]
            root.register_load_state_dict_post_hook(self._after_load),  # type: ignore[no-untyped-call]
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_load(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        *_: Any,
    ) -> None:
        self._loaded = None
        self._translate(state, prefix)
        settings = state.pop(prefix + _SETTINGS, None)
        kept = state.pop(prefix + _KEPT, None)
        schedule = state.pop(prefix + _SCHEDULE, None)
        _compare_plans(schedule, self._forwards.learned)
        self._schedule = schedule
        if settings is not None:
            self._take(state, prefix, _parsed(settings), kept)
        learned = self._forwards.learned
        if learned.parameter is not None:
            state.setdefault(prefix + _FLAT, learned.parameter)
        state[prefix + _SETTINGS] = learned.get_extra_state()

    def _take(
        self, state: dict[str, Any], prefix: str, theirs: dict[str, Any], kept: Tensor | None
    ) -> None:
        """Checks the settings of a checkpoint, and takes the parts that fit.

        A part of a checkpoint may be loaded: the tensors whose weights are there. What else is
        missing, unexpected or of another shape is torch's to report.
        """
        entries: dict[str, list[Any]] = theirs["tensors"]
        own: dict[str, list[Any]] = self._forwards.learned.settings()["tensors"]
        shapes = {name: tuple(t.shape) for name, t in self._forwards.tensors().items()}
        there = [n for n, shape in shapes.items() if _has(state, prefix + n, shape)]
        there += [name for name in own if name not in shapes and _has_computed(state, prefix, name)]
        for name in there:
            if (name in entries) != (name in own):
                raise MismatchError(
                    "The checkpoint and the quantizer of this model must have the same quantized "
                    f"tensors, but only one has {name}. {_REMEDY}"
                )
        chosen = [name for name in entries if name in own and name in there]
        for name in chosen:
            _compare(name, entries[name][3], own[name][3])
        integers = _cut(kept, {name: entry[2] for name, entry in entries.items()})
        self._loaded = {name: entries[name][0] for name in chosen}, integers
        if chosen != list(entries) or chosen != list(own):
            counts = {name: entry[1] for name, entry in entries.items()}
            self._merge(state, prefix, counts, chosen)

    def _merge(
        self, state: dict[str, Any], prefix: str, counts: Mapping[str, int], names: Sequence[str]
    ) -> None:
        """Puts what was learned of some tensors into the present learned parameter."""
        loaded, parameter = state.get(prefix + _FLAT), self._forwards.learned.parameter
        if loaded is None or parameter is None:
            return
        if is_dtensor(loaded) or is_dtensor(parameter):
            raise MismatchError(
                "A part of what was learned cannot be taken out of a sharded checkpoint: its "
                f"quantized tensors must be those of the model. {_REMEDY}"
            )
        theirs, merged = _cut(loaded, counts), parameter.detach().clone()
        parts = self._forwards.learned.parts(merged)
        for quantizer, part in zip(self._forwards.quantizers, parts, strict=True):
            if part is not None and quantizer.plan.name in names:
                part.copy_(theirs[quantizer.plan.name].view_as(part))
        state[prefix + _FLAT] = merged

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        self._tie_again()
        if self._schedule is not None:
            self._forwards.learned.take(self._schedule)
            self._schedule = None
        if self._loaded is not None:
            stages, kept = self._loaded
            self._loaded = None
            parts = self._forwards.learned.parts()
            for q, part in zip(self._forwards.quantizers, parts, strict=True):
                if q.plan.name in stages:
                    learned = None if part is None else part.detach()
                    q.set_stage(stages[q.plan.name], learned, kept.get(q.plan.name))
        self._forwards.forget()

    def _tie_again(self) -> None:
        # load_state_dict(assign=True) makes one parameter for each name of a tied one.
        first: dict[int, Place] = {}
        for place in self._places:
            own = parameter_in(place.owner, place.name)
            tied = first.setdefault(place.quantizer.index, place)
            parameter = parameter_in(tied.owner, tied.name)
            if own is None or parameter is None or own is parameter:
                continue
            if not same_memory(own, parameter):
                parameters_in(place.owner)[place.name] = parameter
                self._forwards.look(tied)

    def _translate(self, state: dict[str, Any], prefix: str) -> None:
        """Gives a checkpoint from when parametrizations held the quantizers the names of today."""
        found: dict[str, dict[str, Tensor]] = {}
        for quantizer, owner, name, _ in self._places:
            for site in quantizer.plan.sites:
                stem = ".".join(filter(None, (site.module, "parametrizations", site.attribute)))
                if name in parameters_in(owner) and f"{prefix}{stem}.original" in state:
                    state[prefix + site.name] = state.pop(f"{prefix}{stem}.original")
                found.setdefault(quantizer.plan.name, {}).update(_earlier(state, prefix + stem))
        parameter = self._forwards.learned.parameter
        if not any(found.values()) or is_dtensor(
            torch.empty(0) if parameter is None else parameter
        ):
            return
        merged = torch.empty(0) if parameter is None else parameter.detach().clone()
        parts = self._forwards.learned.parts(None if parameter is None else merged)
        stages: dict[str, int] = {}
        kept: dict[str, Tensor] = {}
        for quantizer, part in zip(self._forwards.quantizers, parts, strict=True):
            entries = found.get(quantizer.plan.name)
            if entries:
                name = quantizer.plan.name
                stages[name], integers = quantizer.read_earlier(entries, part)
                if integers is not None:
                    kept[name] = integers
        self._loaded = stages, kept
        if parameter is not None:
            state[prefix + _FLAT] = merged


def _has(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> bool:
    """Whether a state dict has a tensor of this name and shape."""
    return isinstance(state.get(name), Tensor) and tuple(state[name].shape) == shape


def _has_computed(state: Mapping[str, Any], prefix: str, name: str) -> bool:
    """Whether a state dict has what other parametrizations compute a tensor from."""
    module, _, attribute = name.rpartition(".")
    stem = ".".join(filter(None, (module, "parametrizations", attribute)))
    return any(key.startswith(f"{prefix}{stem}.") for key in state)


def stages(settings: Tensor) -> dict[str, int]:
    """The stage of each tensor, from the entry `_diffq._extra_state` of a state dict.

    Raises:
        MismatchError: the entry cannot be read.
    """
    return {name: entry[0] for name, entry in _parsed(settings)["tensors"].items()}


def rename_tensors(state: dict[str, Any], rename: Callable[[str], str | None]) -> None:
    """Renames the tensors of a model in what its state dict holds of quantizers, in place.

    Args:
        state: of a model of which a quantizer may be attached to a part.
        rename: the name of a tensor to its new name, or to None if it is left out.

    Raises:
        MismatchError: the entries cannot be read.
    """
    for key in [key for key in state if key.endswith(_SETTINGS)]:
        prefix = key.removesuffix(_SETTINGS)
        state.pop(prefix + _SCHEDULE, None)  # a plan for the size of another model
        settings = _parsed(state[key])
        entries: dict[str, list[Any]] = settings["tensors"]
        new = {name: rename(prefix + name) for name in entries}
        for part, place in ((_FLAT, 1), (_KEPT, 2)):
            if prefix + part in state:
                counts = {name: entry[place] for name, entry in entries.items()}
                cut = _cut(state[prefix + part], counts).items()
                state[prefix + part] = torch.cat([t for name, t in cut if new[name] is not None])
        left = {to: entries[name] for name, to in new.items() if to is not None}
        settings["tensors"] = {name.removeprefix(prefix): entry for name, entry in left.items()}
        state[key] = characters(settings)


def _parsed(settings: Tensor) -> dict[str, Any]:
    try:
        # Averages are near whole numbers.
        text = bytes(settings.detach().float().round().to("cpu", torch.uint8).tolist())
        parsed: dict[str, Any] = json.loads(text)
        if not _are_settings(parsed):
            raise ValueError("it does not describe quantizers")
        return parsed
    except (ValueError, RecursionError) as error:
        raise MismatchError(
            f"The entry {_SETTINGS!r} of the checkpoint cannot be read: {error}. Load a checkpoint "
            "as it was saved; or its weights alone, without the entries whose names begin with "
            "'_diffq.'."
        ) from error


def _are_settings(parsed: Any) -> bool:
    """Whether this is what `Learned.settings` gives."""
    if not isinstance(parsed, dict) or not isinstance(parsed.get("tensors"), dict):
        return False
    tensors = parsed.get("tensors")
    kinds = [int, int, int, dict]
    return isinstance(tensors, dict) and all(
        isinstance(entry, list) and [type(part) for part in entry] == kinds
        for entry in tensors.values()
    )


def _compare(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    differing = ["method"] if "method" in differing else differing
    if differing:
        said = ", ".join(f"{key}={theirs.get(key)}" for key in differing)
        asked = ", ".join(f"{key}={ours[key]}" for key in differing)
        raise MismatchError(
            f"A checkpoint continues under the settings that it was made with, but {name} has "
            f"{said} in the checkpoint and {asked} in the quantizer of this model. {_REMEDY}"
        )


def _compare_plans(schedule: Tensor | None, learned: Learned) -> None:
    """Raises MismatchError if a checkpoint was made with another plan than the present one."""
    own = learned.schedule if learned.follows else None
    if schedule is None or own is None:
        return
    if schedule.shape == own.shape and torch.allclose(schedule.cpu().double()[PLAN], own[PLAN]):
        return
    raise MismatchError(
        "A training goes on with the plan that it began with, but steps, float_share, target_mb "
        f"and lam are {_listed(schedule)} in the checkpoint and {_listed(own)} in this "
        "quantizer's setup_optimizer (0 for what is not set). Call it with those of the "
        f"checkpoint; or leave the entry {_SCHEDULE!r} out, to begin the new plan."
    )


def _listed(schedule: Tensor) -> str:
    return ", ".join(f"{number:g}" for number in schedule[PLAN].tolist())


def _cut(flat: Tensor | None, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The parts of a flat tensor by name."""
    if flat is None:
        return {}
    if len(flat) != sum(counts.values()):
        raise MismatchError(
            f"The checkpoint's settings tell of {sum(counts.values())} numbers for its quantizer, "
            f"and it holds {len(flat)}. Load a checkpoint as it was saved."
        )
    return dict(zip(counts, torch.split(flat, list(counts.values())), strict=True))


def _earlier(state: dict[str, Any], stem: str) -> dict[str, Tensor]:
    """Takes the entries of a quantizer that was the last of a tensor's parametrizations."""
    names = ("logits", "scale", "codebook", "indices", "_extra_state")
    found = {}
    for key in [key for key in state if key.startswith(f"{stem}.")]:
        position, _, name = key[len(stem) + 1 :].partition(".")
        if position.isdigit() and name in names:
            found[name] = state.pop(key)
    return found
