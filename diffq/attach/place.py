"""Where a quantized tensor is: a module, and the name in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffq.attach.plan import TensorPlan
from diffq.attach.weight import WeightQuantizer
from diffq.errors import AttachError
from diffq.torch_inside.modules import parameter_in, parameters_in


class Place(NamedTuple):
    """A module that holds a quantized tensor.

    Attributes:
        quantizer: the tensor's.
        owner: the module.
        name: the tensor's name in it.
        position: its place among the module's parameters.
    """

    quantizer: WeightQuantizer
    owner: nn.Module
    name: str
    position: int

    def base(self) -> Tensor:
        """The tensor without quantization.

        Raises:
            AttachError: something else was put in its place.
        """
        found = parameter_in(self.owner, self.name)
        if found is not None and torch.compiler.is_compiling():
            return found
        plain = getattr(getattr(type(self.owner), self.name, None), "plain", None)
        if plain is None:
            raise self.changed("was replaced or parametrized")
        if found is not None:
            return found
        try:
            base: Tensor | None = plain(self.owner)
        except AttributeError:
            base = None
        if base is None:
            raise self.changed("was removed")
        return base

    def check_shape(self, base: Tensor) -> None:
        """Raises AttachError for a tensor of another shape than when it was planned."""
        if base.shape != self.quantizer.plan.shape:
            was, now = list(self.quantizer.plan.shape), list(base.shape)
            raise self.changed(f"went from shape {was} to {now}")

    def changed(self, what: str) -> AttachError:
        """The error for a tensor to which something happened while it was quantized."""
        return AttachError(self.quantizer.plan.sites[0].changed(what))

    def replaced(self, old: Tensor) -> AttachError:
        """Puts the Parameter back for which a forward put in another, and gives the error."""
        names = self.quantizer.plan.names
        if len(names) > 1:
            return AttachError(untied(self.quantizer.plan))
        if isinstance(old, nn.Parameter):
            parameters = parameters_in(self.owner)
            others = [pair for pair in parameters.items() if pair[0] != self.name]
            parameters.clear()
            parameters.update(
                [*others[: self.position], (self.name, old), *others[self.position :]]
            )
        return self.refused("assign", "assigned")

    def refused(self, verb: str, done: str) -> AttachError:
        """The error for a forward that does to a tensor what cannot last."""
        name = self.quantizer.plan.name
        return AttachError(
            f"A forward must not {verb} a quantized tensor, but {name} was {done}, and that would "
            "be lost: in a forward, reading gives the tensor that is computed with. Do it before "
            f"the forward, or pass exclude=[{name!r}]."
        )


def untied(plan: TensorPlan) -> str:
    """The message for tied tensors that were untied."""
    return (
        f"{' and '.join(plan.names)} were one tensor when the quantizer was made, "
        "and must stay so. Tie them again, or detach() and make a new quantizer."
    )
