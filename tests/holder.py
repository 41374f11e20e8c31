"""A module of any tensors, and the bitwise comparisons of them that several tests share."""

import copy
import io

import numpy as np
import torch
from torch import nn

from diffq.attach.chains import quantizers_in


class Holder(nn.Module):
    """Parameters and buffers of any name, shape and dtype, without a forward."""

    def __init__(self, parameters=None, buffers=None):
        super().__init__()
        for name, tensor in (parameters or {}).items():
            self.register_parameter(
                name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
            )
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)


def blank(model):
    """A copy of a plain model whose tensors all hold other values: zeros."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    return other


def bits_of(tensor):
    """Dtype, shape and bytes of a tensor: equal only for tensors that are the same bit for bit."""
    # Resolved first: a conjugate view has other bytes than its values.
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    # Cloned, because even a contiguous tensor may have odd strides where it is empty.
    data = plain.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), data.numpy().tobytes()


def all_bits(model):
    """Name to `bits_of` each tensor in the model's state dict."""
    return {name: bits_of(tensor) for name, tensor in model.state_dict().items()}


def reloaded(state):
    """What `torch.load` gives back of a saved state, with `weights_only` on."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def weight_quantizers(model):
    """Tensor name to the weight quantizer that sits on it."""
    return {quantizer.plan.name: quantizer for quantizer in quantizers_in(model)}


def set_bits(weight_quantizer, bits):
    """Sets the logits of a DiffQ weight so that its real bitwidths are whole."""
    settings = weight_quantizer.settings
    share = (torch.as_tensor(np.array(bits)).double() - settings.min_bits) / (
        settings.max_bits - settings.min_bits
    )
    with torch.no_grad():
        # At 40 from zero the sigmoid is 0 or 1 to float32.
        weight_quantizer.logits.copy_(torch.logit(share).clamp(-40, 40))
