"""Layers whose weight is packed: a subclass of their class, of the same name, with a property."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffq.errors import AttachError, MismatchError
from diffq.packed.weight import PackedWeight
from diffq.torch_inside.modules import CONVOLUTIONS, parameters_in
from diffq.torch_inside.overrides import SavesFirst
from diffq.torch_inside.subclasses import Quiet, maker, tells_subclasses

#: The tensor of a layer that can be packed, and the module that takes its place.
WEIGHT, PACKED = "weight", "packed_weight"

_LAYERS = (nn.Linear, nn.Embedding, CONVOLUTIONS)


class PackedLayer(SavesFirst):
    """What the classes of layers with a packed weight have first."""

    packed_weight: PackedWeight
    plain_class: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        """The decoded weight, a new tensor at each reading."""
        return self.packed_weight.decode()

    @weight.setter
    def weight(self, value: Any) -> None:
        raise AttachError(_fixed("replaced"))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers any parameter but the weight."""
        if name == WEIGHT:
            raise AttachError(_fixed("replaced"))
        super().register_parameter(name, param)

    def saved_first(self, saved: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The decoded weight, which plain layers save first as well."""
        return {WEIGHT: self.packed_weight.saved(saved.values())}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By the plain class, because ours cannot be found by its name.
        made: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        function, args, *rest = made
        plain = self.plain_class
        args = tuple(plain if each is type(self) else each for each in args)
        return (_rebuild, (plain, function, args), *rest)


class PackedEmbedding(nn.Embedding):
    """What the classes of packed embeddings have before torch's: decodes the rows asked for."""

    packed_weight: PackedWeight

    def forward(self, input: Tensor) -> Tensor:
        """The rows, as torch's embedding gives them."""
        packed, few = self.packed_weight, input.numel() < self.num_embeddings
        if self.max_norm is not None or not (packed.has_rows and few):
            return super().forward(input)
        # torch's own check of the indices, on a tensor of one element.
        F.embedding(input, packed.like.new_empty(1, 1).expand(self.num_embeddings, 1))
        return packed.decode_rows(input.reshape(-1).long()).view(*input.shape, self.embedding_dim)


def can_pack(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module can be packed: the weight of a layer that reads it in full."""
    if name != WEIGHT or not isinstance(module, _LAYERS) or hasattr(module, PACKED):
        return False
    layer: nn.Module = module
    plain = type(layer)
    try:
        layer.__class__ = _packed_class(plain)
    except TypeError:  # Of a class that cannot be subclassed like this.
        return False
    layer.__class__ = plain
    return True


def put_in(module: nn.Module, packed: PackedWeight) -> None:
    """Puts a packed weight in the place of a layer's weight, of which `can_pack` is true."""
    del parameters_in(module)[WEIGHT]
    module.add_module(PACKED, packed)
    module.__class__ = _packed_class(type(module))


def refuse_loads(model: nn.Module) -> None:
    """Keeps `load_state_dict` of a model, and of its parts, from passing packed weights over."""
    for module in model.modules():
        if is_packed(module):
            module.register_load_state_dict_pre_hook(_check_load)  # type: ignore[no-untyped-call]


def is_packed(model: nn.Module) -> bool:
    """Whether a layer of a model has a packed weight."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def _check_load(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    for path, layer in module.named_modules(remove_duplicate=False):
        name = f"{prefix}{path}.{WEIGHT}" if path else prefix + WEIGHT
        if isinstance(layer, PackedLayer) and name in state:
            raise MismatchError(_fixed("loaded", f": {name!r} of the state dict is one"))


def _fixed(done: str, which: str = "") -> str:
    return (
        f"A packed weight is read only and cannot be {done}{which}. "
        "Change a plain model, which diffq.load gives without packed=True."
    )


def _packed_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class; layers of one class share it, and it goes when unused."""
    bases: tuple[type, ...] = (PackedLayer, plain)
    if issubclass(plain, nn.Embedding):
        bases = (PackedLayer, *([] if plain is nn.Embedding else [plain]), PackedEmbedding)
    if tells_subclasses(plain):
        bases = (Quiet, *bases)
    last: type[nn.Module] = bases[-1]
    for known in last.__subclasses__():
        if known.__bases__ == bases:
            return known
    members = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "plain_class": plain,
    }
    packed: type[nn.Module] = maker(plain)(plain.__name__, bases, members)
    return packed


def _rebuild(plain: type[nn.Module], function: Any, args: Any) -> nn.Module:
    module: nn.Module = function(*args)
    module.__class__ = _packed_class(plain)
    return module
