"""Whole layers left out or used twice: LayerDrop, sharing in chunks, every other layer.

The layers of a network are an `nn.Sequential` or `nn.ModuleList` of blocks that keep
the shape of what passes through, such as residual or transformer blocks. Change them
before a quantizer is attached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffq.attach.checkpoints import rename_tensors
from diffq.attach.sample import same_memory
from diffq.checks import check_number, check_whole
from diffq.errors import ConfigError
from diffq.torch_inside.modules import children_in

Layers = TypeVar("Layers", nn.Sequential, nn.ModuleList)


class LayerDrop(nn.Sequential):
    """Layers of which training leaves some out (Fan et al., arXiv:1909.11556).

    Takes the place of the list or sequence that it is made from, with the same names:

        model.layers = diffq.LayerDrop(model.layers, 0.2)

    Each call, or each iteration over it, is one forward and draws anew which layers are
    left out; in eval mode all are there. `children()` gives all of them in training too.
    Where bits are learned, those of a layer stay as they are in steps that leave it out
    (Section 5.2 of the DiffQ paper).

    Attributes:
        rate: probability that a layer is left out.
        leaves_out: tells watches of training that layers may be missing in a step.

    Args:
        layers: blocks that keep the shape of their input.
        rate: from 0 to 1.

    Raises:
        ConfigError: the rate is no probability.
    """

    leaves_out = True

    def __init__(self, layers: Iterable[nn.Module], rate: float = 0.1) -> None:
        check_number(rate, "rate", 0, 1)
        names = children_in(layers) if isinstance(layers, nn.Module) else count()
        super().__init__(OrderedDict(zip(map(str, names), _all(layers), strict=False)))
        self.rate = rate

    def __iter__(self) -> Iterator[nn.Module]:
        """The layers of one forward."""
        layers = _all(self)
        if not self.training:
            return iter(layers)
        # Drawn on the CPU, so that nothing waits for a device.
        draws = torch.rand(len(layers), dtype=torch.float32, device="cpu").tolist()
        return iter([layer for layer, x in zip(layers, draws, strict=True) if x >= self.rate])

    def __getitem__(self, index: Any) -> Any:
        """A layer; or, of a slice, a `LayerDrop` of the same rate."""
        if isinstance(index, slice):
            return type(self)(_all(self)[index], self.rate)
        return super().__getitem__(index)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Passes the input through the layers; each gets the other arguments too."""
        for layer in self:
            input = layer(input, *args, **kwargs)
        return input

    def extra_repr(self) -> str:
        """Shows the rate."""
        return f"rate={self.rate}"


def share_layers(layers: Layers, chunk: int = 2) -> Layers:
    """Lets adjacent layers share their weights, in place (Quant-Noise paper, Section 8.5).

    The first layer of each chunk takes the place of the others: A B C D becomes A A C C.
    Files and states hold each shared layer once.

    Args:
        layers: layers of one architecture.
        chunk: how many adjacent layers share; the last chunk may have fewer.

    Returns:
        The same list.

    Raises:
        ConfigError: layers of a chunk differ in the names or shapes of their tensors.
    """
    check_whole(chunk, "chunk")
    plain = _all(layers)
    firsts = [plain[place - place % chunk] for place in range(len(plain))]
    for place, (first, layer) in enumerate(zip(firsts, plain, strict=True)):
        if _shapes(first) != _shapes(layer):
            raise ConfigError(
                f"Layers that share weights must be alike, but layers {place - place % chunk} and "
                f"{place} differ in the names or shapes of their tensors. Share other chunks."
            )
    for place, first in enumerate(firsts):
        layers[place] = first
    return layers


def every_other_layer(layers: Layers, chunk: int = 1) -> Layers:
    """Keeps every other layer, or every other chunk of shared ones, beginning with the first.

    The Every Other Layer strategy of LayerDrop (arXiv:1909.11556), which works at
    inference after training with it: of A B C D, A C are kept, and with chunks of two A B.

        model.layers = diffq.every_other_layer(model.layers)

    Args:
        layers: the trained layers, which stay as they are.
        chunk: how many adjacent layers are kept or left out together.

    Returns:
        A list of the same kind with the layers that are kept, numbered from 0.

    Raises:
        ConfigError: the chunk is no whole number from 1.
    """
    check_whole(chunk, "chunk")
    kept = [layer for place, layer in enumerate(_all(layers)) if _is_kept(place, chunk)]
    if isinstance(layers, LayerDrop):
        return type(layers)(kept, layers.rate)
    return type(layers)(*kept) if isinstance(layers, nn.Sequential) else type(layers)(kept)


def every_other_layer_state(state: Mapping[str, Any], name: str, chunk: int = 1) -> dict[str, Any]:
    """The state dict of a model after `every_other_layer`, from the one before.

    Carries learned bitwidths over: load it into the smaller model with a quantizer of
    the same settings attached.

    Args:
        state: state dict of the whole model, with or without a quantizer.
        name: the list's name in the model, such as "encoder.layers".
        chunk: as for `every_other_layer`.

    Raises:
        ConfigError: the state has no layers under that name.
    """
    check_whole(chunk, "chunk")
    prefix = f"{name}." if name else ""
    if not any(_place(key, prefix) for key in state):
        raise ConfigError(
            f"The state must have layers named {prefix}0, {prefix}1 and so on, got "
            f"{', '.join(list(state)[:3])} ... Pass the name of the list in the model."
        )
    renamed = {key: _new_name(key, prefix, chunk) for key in state}

    def rename(key: str) -> str | None:
        new = _new_name(key, prefix, chunk)
        # A tied tensor goes by its first name, whose layer may go while others stay.
        tied = [] if new is not None else _same_tensor(state, key)
        return next((found for each in tied if (found := renamed[each]) is not None), new)

    result = {new: state[key] for key, new in renamed.items() if new is not None}
    rename_tensors(result, rename)
    return result


def _place(key: str, prefix: str) -> tuple[int, str] | None:
    """The number of the layer that an entry belongs to, and the name in it; None for others."""
    number, dot, rest = key.removeprefix(prefix).partition(".")
    if not key.startswith(prefix) or not number.isdecimal() or not dot:
        return None
    return int(number), rest


def _new_name(key: str, prefix: str, chunk: int) -> str | None:
    """The name of an entry in the smaller model; None if its layer goes."""
    place = _place(key, prefix)
    if place is None:
        return key
    number, rest = place
    return f"{prefix}{_new_place(number, chunk)}.{rest}" if _is_kept(number, chunk) else None


def _same_tensor(state: Mapping[str, Any], key: str) -> list[str]:
    """The names under which a state dict has one tensor."""
    tensor = state.get(key)
    if not isinstance(tensor, Tensor):
        return []
    return [
        n for n, each in state.items() if isinstance(each, Tensor) and same_memory(each, tensor)
    ]


def _is_kept(place: int, chunk: int) -> bool:
    return place // chunk % 2 == 0


def _new_place(place: int, chunk: int) -> int:
    return place // (2 * chunk) * chunk + place % chunk


def _all(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Every layer, also of a `LayerDrop` in training."""
    if not isinstance(layers, nn.Module):
        return list(layers)
    return [layer for layer in children_in(layers).values() if layer is not None]


def _shapes(layer: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in layer.state_dict().items()]
