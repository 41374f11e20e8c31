"""A module of any tensors, and the bitwise comparisons of them that several tests share."""

import copy
import io
import pickle

import numpy as np
import torch
from torch import nn

from diffq.attach.attachment import attachment_of


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
    return tensor.dtype, tuple(tensor.shape), data.cpu().numpy().tobytes()


def all_bits(model):
    """Name to `bits_of` each tensor in the model's state dict."""
    return {name: bits_of(tensor) for name, tensor in model.state_dict().items()}


def reloaded(state):
    """What `torch.load` gives back of a saved state, with `weights_only` on."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_torch(model):
    """A model through a file of torch that holds it whole."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model):
    """A model through pickle."""
    return pickle.loads(pickle.dumps(model))  # noqa: S301


class Quantized:
    """The quantizer of one tensor, with its part of what the model's quantizers learn.

    Attributes besides: those of the quantizer.
    """

    def __init__(self, attachment, quantizer):
        self._attachment = attachment
        self._quantizer = quantizer

    def __getattr__(self, name):
        return getattr(self._quantizer, name)

    @property
    def learned(self):
        """What is learned of the tensor, a view that can be written to."""
        return self._attachment.learned.part(self._quantizer.index).detach()

    logits = scale = codebook = learned

    @property
    def weight(self):
        """The Parameter, or what another parametrization computes."""
        return self._attachment.weight(self._quantizer)

    @property
    def grad(self):
        """The gradient of what is learned; None if there is none."""
        parameter = self._attachment.learned.parameter
        return None if parameter.grad is None else self._part(parameter.grad)

    def gradient_of(self, result, **options):
        """The gradient of a scalar to what is learned of the tensor."""
        parameter = self._attachment.learned.parameter
        return self._part(torch.autograd.grad(result, parameter, **options)[0])

    def quantized(self):
        """The true quantized weight."""
        return self._quantizer.quantize(self.weight.detach(), self.learned_or_none)

    @property
    def learned_or_none(self):
        """What is learned; None for methods that learn nothing."""
        part = self._attachment.learned.part(self._quantizer.index)
        return None if part is None else part.detach()

    def _part(self, flat):
        return self._attachment.learned.parts(flat)[self._quantizer.index]


def weight_quantizers(model):
    """Tensor name to the `Quantized` of each quantized tensor; empty for a plain model."""
    attachment = attachment_of(model)
    quantizers = () if attachment is None else attachment.quantizers
    return {quantizer.plan.name: Quantized(attachment, quantizer) for quantizer in quantizers}


def quantizers_in(model):
    """The `Quantized` of each quantized tensor of a model."""
    return list(weight_quantizers(model).values())


def set_bits(weight_quantizer, bits):
    """Sets the logits of a DiffQ weight so that its real bitwidths are whole."""
    settings = weight_quantizer.settings
    share = (torch.as_tensor(np.array(bits)).double() - settings.min_bits) / (
        settings.max_bits - settings.min_bits
    )
    with torch.no_grad():
        # At 40 from zero the sigmoid is 0 or 1 to float32.
        weight_quantizer.logits.copy_(torch.logit(share).clamp(-40, 40))
