"""What the tests of other libraries share: small models, and what is compared of attached ones."""

import copy
import io

import pytest
import torch

import diffq
from tests.compare import close, same_bits
from tests.models import QUANTIZERS, seeded

#: One quantizer of each kind of learned parameters: logits, none, scales, codebooks.
KINDS = ["diffq", "qat", "lsq", "product"]
#: What a quantizer adds to the state dict of its model, in a module of the root.
EXTRAS = {"_diffq.learned", "_diffq.kept", "_diffq._extra_state", "_diffq.schedule"}


def library(name):
    """Imports another library, or skips the module of tests that asks for it."""
    return pytest.importorskip(name, reason=f"{name} is missing: run `make test-integrations`")


def gpt2(**options):
    """A GPT-2 of transformers with tied embeddings, 16 wide, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 16}
    rates = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "initializer_range": 0.2}
    words = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**shape, **rates, **words, **options}))


def texts(count=2):
    """Sequences of 8 tokens for it, the same at each call."""
    return torch.randint(40, (count, 8), generator=torch.Generator().manual_seed(0))


def prepared(make, kind="diffq", seed=0):
    """A seeded model and its quantizer, which may train without an optimizer."""
    model = seeded(make, seed)
    quantizer = QUANTIZERS[kind](model)
    quantizer.no_optimizer()
    return model, quantizer


def perturb(model, seed=1):
    """Moves what is learned, each parameter to values of its own, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in diffq.quantizer_of(model).learned_parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))


def weights(model):
    """Name to a copy of each tensor of the state dict, without what a quantizer adds."""
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if name not in EXTRAS}


def extras(model):
    """Name to a copy of each tensor that a quantizer adds to the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name in EXTRAS}


def floats(model):
    """Name to a copy of each floating-point tensor of the state dict, what is learned too."""
    state = model.state_dict()
    return {
        name: tensor.clone()
        for name, tensor in state.items()
        if tensor.is_floating_point() and not name.endswith("_extra_state")
    }


def shipped(quantizer, plain):
    """A plain model in eval mode, with the weights of the file that the quantizer writes."""
    file = io.BytesIO()
    diffq.save(quantizer, file)
    file.seek(0)
    return diffq.load(file, plain).eval()


@torch.no_grad()
def evaluates_as_shipped(model, make, *inputs, **options):
    """Whether eval computes with what the file holds, and not with the float weights."""
    quantizer = diffq.quantizer_of(model)
    plain = diffq.quantizer_of(copy.deepcopy(model)).detach().eval()
    result = _tensors(model.eval()(*inputs, **options))
    file = _tensors(shipped(quantizer, make())(*inputs, **options))
    return close(result, file) and not close(result, _tensors(plain(*inputs, **options)))


def _tensors(output):
    """The main tensor of an output, where a library puts it into a class of its own."""
    return getattr(output, "logits", output)


def same_weights(one, other):
    """Whether two models have the same tensors under the same names, but for the extras."""
    return same_bits(weights(one), weights(other))
