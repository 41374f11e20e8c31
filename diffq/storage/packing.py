"""Files into models whose weights stay packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffq.attach.plan import named_tensors
from diffq.attach.ties import tie_key
from diffq.errors import MismatchError, listed, warn
from diffq.packed.kinds import pack, stays_packed
from diffq.packed.modules import can_pack, put_in, refuse_loads
from diffq.packed.weight import PackedWeight
from diffq.storage.filling import decode, header_of
from diffq.storage.open import StoredModel
from diffq.storage.restore import match, unique_targets


@dataclass(frozen=True)
class _Filled:
    """A tensor of a model that gets its value from a file.

    Attributes:
        name: under which it is stored.
        target: the tensor.
        places: the modules that hold it, with its name in each.
        packs: whether it stays packed.
    """

    name: str
    target: Tensor
    places: list[tuple[nn.Module, str]]
    packs: bool

    def put_value(self, value: Tensor, device: torch.device) -> None:
        """Copies a value into the target; a target on the meta device is replaced."""
        if not self.target.is_meta:
            self.target.copy_(value)
            return
        made = value.to(device)
        if isinstance(self.target, nn.Parameter):
            made = nn.Parameter(made, self.target.requires_grad)
        for owner, attribute in self.places:
            setattr(owner, attribute, made)

    def put_packed(self, weight: PackedWeight) -> None:
        """Puts a packed weight in the place of the target."""
        for owner, _ in self.places:
            put_in(owner, weight)

    def device(self, device: torch.device) -> torch.device:
        """Where the value goes: `device` in place of the meta device."""
        return device if self.target.is_meta else self.target.device


def fill_packed(
    model: nn.Module, stored: StoredModel, strict: bool, device: torch.device | None
) -> nn.Module:
    """Gives a plain model the tensors of a file, packed ones where layers can hold them.

    All of it is read and checked before the model is changed; see `diffq.load`.
    """
    header = header_of(stored)
    targets = match(model, header, strict, meta=True)
    unique = unique_targets(targets, header, lambda name: stored[name])
    filled = _plan(model, stored, unique)
    _check_meta(model, filled)
    place = torch.device("cpu") if device is None else device
    values = decode(stored, [each.name for each in filled if not each.packs])
    packed = {
        each.name: _pack(stored, each).to(each.device(place)) for each in filled if each.packs
    }
    with torch.no_grad():
        for each in filled:
            if each.packs:
                each.put_packed(packed[each.name])
            else:
                each.put_value(values[each.name], place)
    refuse_loads(model)
    if not packed:
        warn(
            "Nothing is packed: the file stores no weight of a linear, embedding or convolution "
            "layer of the model as levels or codewords. The model is loaded as without packed=True."
        )
    return model


def _plan(model: nn.Module, stored: StoredModel, unique: list[tuple[str, Tensor]]) -> list[_Filled]:
    places: dict[object, dict[tuple[int, str], tuple[nn.Module, str]]] = {}
    for site, tensor in named_tensors(model):
        owner, name = site.owner(model), site.attribute
        # A module under two names is one place.
        places.setdefault(tie_key(tensor), {})[id(owner), name] = owner, name
    filled = []
    for name, target in unique:
        held = list(places[tie_key(target)].values())
        packs = stays_packed(stored.entries[name].record_type) and target.numel() > 0
        packs = packs and all(can_pack(owner, attribute) for owner, attribute in held)
        filled.append(_Filled(name, target, held, packs))
    return filled


def _check_meta(model: nn.Module, filled: list[_Filled]) -> None:
    """Raises MismatchError for tensors on the meta device that the file has no values for."""
    known = {tie_key(each.target) for each in filled}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lost = [name for name, tensor in tensors if tensor.is_meta and tie_key(tensor) not in known]
    if lost:
        raise MismatchError(
            "Tensors on the meta device get their values from the file, which has none for "
            f"{listed(lost)}. Make these on a real device before, as "
            "accelerate.init_empty_weights(include_buffers=False) does with buffers."
        )


def _pack(stored: StoredModel, filled: _Filled) -> PackedWeight:
    by_rows = any(isinstance(owner, nn.Embedding) for owner, _ in filled.places)
    return pack(stored.reader.record(filled.name), by_rows)
