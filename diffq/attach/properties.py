"""The property of a quantized tensor, in the class of the module that holds it.

In a forward, it gives the tensor that is computed with in place of the Parameter, which stays
where it is. Outside, it gives the Parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from diffq.torch_inside.modules import parameters_in


class QuantizedTensor(property):
    """The property of a quantized tensor.

    Args:
        name: the tensor's name in its module.
        inner: the property of another parametrization, which computes the tensor.
    """

    def __init__(self, name: str, inner: Any) -> None:
        self._name, self._inner = name, inner

        # Functions and no methods, which torch 2.6 cannot compile.
        def read(module: Any) -> Any:
            parameters, cover = parameters_in(module), module._diffq_cover
            forward = None if cover is None else cover.forwards.current()
            if forward is None:
                return parameters[name] if name in parameters else _plain(module, name, inner)
            base, training = parameters.get(name), module.training
            if forward.ready is not None and not (training or torch.is_grad_enabled()):
                value = forward.ready.get(id(base))
                if value is not None and not is_compiling():
                    return value
            place = cover.own[name]
            if base is None and inner is not None and name not in module.__dict__:
                # Computed once, when the forward began.
                mode = training and not cover.forwards.always_quantized
                known = forward.samples(mode)[place.quantizer.index]
                base = None if known is None else known.weight
            if base is None:
                base = _plain(module, name, inner)
            return base if base is None else cover.forwards.read(forward, place, base, training)

        def write(module: nn.Module, value: Any) -> None:
            if inner is not None:
                inner.fset(module, value)
            else:
                module.__dict__[name] = value

        def delete(module: nn.Module) -> None:
            if name not in module.__dict__:
                raise AttributeError(name)
            del module.__dict__[name]

        super().__init__(read, write, delete)

    def plain(self, module: nn.Module) -> Tensor:
        """The tensor without quantization.

        Raises:
            AttributeError: there is none.
        """
        tensor: Tensor = _plain(module, self._name, self._inner)
        return tensor


def _plain(module: nn.Module, name: str, inner: Any) -> Any:
    parameters = parameters_in(module)
    tensor: Tensor | None = parameters.get(name)
    if tensor is None and name in module.__dict__:
        # The hooks of older torch, and DataParallel, put tensors there.
        tensor = module.__dict__[name]
    if tensor is None and inner is not None and name not in parameters:
        tensor = inner.fget(module)
    if tensor is None and name not in parameters:
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
    return tensor
