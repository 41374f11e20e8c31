"""PEFT: LoRA below a quantizer and on top of one, merged, unmerged and unloaded."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.integrations.tiny import EXTRAS, floats, gpt2, library, shipped, texts
from tests.models import QUANTIZERS, mlp, seeded, step

library("peft")
from peft import LoraConfig, get_peft_model  # noqa: E402

FINE = partial(diffq.DiffQuantizer, min_size=0, group_size=4, init_bits=14)


def lora(model, **options):
    """The model with adapters of random weights on its first layer."""
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options)
    return get_peft_model(model, config)


def adapted():
    """A network with an adapter, as the peft model gives it out."""
    return lora(mlp()).get_base_model()


def train(model, quantizer, x):
    """Three steps on all that asks for gradients, and on what is learned."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    for _ in range(3):
        step(model.train(), optimizer, x, quantizer, lam=100)


def merged_by_hand(layer):
    """The float weight that merging must leave, up to the rounding of the product in it."""
    return layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()


@torch.no_grad()
def evaluate(model, x):
    """The output in eval mode."""
    return model.eval()(x)


def test_lora_before_attaching():
    """Adapters train with the bits, the frozen base stays, and the file has both."""
    peft_model = seeded(lambda: lora(mlp()))
    base = peft_model.get_base_model()
    quantizer = QUANTIZERS["diffq"](base)
    x, before = torch.randn(5, 16), floats(base)
    train(peft_model, quantizer, x)
    after = floats(base)
    frozen = [name for name in before if "lora" not in name and name not in EXTRAS]
    assert frozen
    assert same_bits([after[n] for n in frozen], [before[n] for n in frozen])
    assert all(not same_bits(after[n], before[n]) for n in before if "lora" in n)
    assert quantizer.mean_bits() < 8
    assert close(evaluate(peft_model, x), shipped(quantizer, adapted())(x))


def test_attached_to_the_peft_model():
    """The peft model itself is attached, disables its adapters, and evaluates as its file."""
    peft_model = seeded(lambda: lora(mlp()))
    quantizer = QUANTIZERS["diffq"](peft_model)
    x = torch.randn(5, 16)
    train(peft_model, quantizer, x)
    plain = shipped(quantizer, lora(mlp()))
    assert close(evaluate(peft_model, x), plain(x))
    with peft_model.disable_adapter(), plain.disable_adapter():
        assert close(evaluate(peft_model, x), plain(x))


def test_merge_before_attaching_ends():
    """`merge_adapter` writes the float sum into the parameter, and eval quantizes it."""
    peft_model = seeded(lambda: lora(mlp()))
    base = peft_model.get_base_model()
    quantizer = FINE(base)
    quantizer.no_optimizer()
    x, layer = torch.randn(5, 16), base[0]
    before, wanted = evaluate(peft_model, x), merged_by_hand(layer)
    original = layer.base_layer.weight.detach().clone()
    peft_model.merge_adapter()
    assert close(layer.base_layer.weight.detach(), wanted)
    assert torch.allclose(evaluate(peft_model, x), before, atol=1e-2)
    plain = adapted()
    file = shipped(quantizer, plain)
    file[0].merged_adapters = ["default"]  # as the attached layer says of itself
    assert close(evaluate(base, x), file(x))
    peft_model.unmerge_adapter()
    assert close(layer.base_layer.weight.detach(), original)
    assert torch.allclose(evaluate(peft_model, x), before, atol=1e-2)


def test_unload_below_a_quantizer():
    """`merge_and_unload` of an attached base leaves the merged floats, and `detach()` all of it."""
    peft_model = seeded(lambda: lora(mlp()))
    reference = copy.deepcopy(peft_model).merge_and_unload()
    base = peft_model.get_base_model()
    quantizer = QUANTIZERS["diffq"](base)
    merged = peft_model.merge_and_unload()
    assert merged is base
    plain = quantizer.detach()
    assert type(plain[0]) is nn.Linear
    assert close(floats(plain), floats(reference))
    x = torch.randn(5, 16)
    assert close(evaluate(plain, x), evaluate(reference, x))


def test_lora_after_attaching():
    """Adapters on an attached model get their gradients through the quantized base."""
    model = seeded(mlp)
    quantizer = FINE(model)
    quantizer.no_optimizer()
    before, x = floats(model), torch.randn(5, 16)
    peft_model = lora(model)
    assert not any(p.requires_grad for p in quantizer.learned_parameters())
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], 1e-2)
    adapters = {n: p.detach().clone() for n, p in peft_model.named_parameters() if "lora" in n}
    step(peft_model.train(), optimizer, x)
    after = {n: p.detach() for n, p in peft_model.named_parameters() if "lora" in n}
    assert all(not same_bits(after[name], adapters[name]) for name in adapters)
    wanted = {**before, "0.weight": merged_by_hand(model[0])}
    merged = peft_model.merge_and_unload()
    assert merged is model
    assert close(floats(merged), wanted)
    assert same_bits({**floats(merged), "0.weight": None}, {**before, "0.weight": None})
    plain = mlp()
    plain.load_state_dict({name: wanted[name] for name in plain.state_dict()})
    assert torch.allclose(evaluate(merged, x), evaluate(plain, x), atol=1e-2)
    assert close(evaluate(merged, x), shipped(quantizer, mlp())(x))


@pytest.mark.parametrize("kind", ["diffq", "qat"])
def test_merge_after_attaching(kind):
    """An adapter on an attached model is merged into floats and taken out again."""
    model = seeded(mlp)
    QUANTIZERS[kind](model).no_optimizer()
    peft_model = lora(model)
    layer, x = model[0], torch.randn(5, 16)
    original, wanted = layer.base_layer.weight.detach().clone(), merged_by_hand(layer)
    before = evaluate(peft_model, x)
    peft_model.merge_adapter()
    assert close(layer.base_layer.weight.detach(), wanted)
    assert not close(evaluate(peft_model, x), before)  # quantized after the sum, not before
    peft_model.unmerge_adapter()
    assert close(layer.base_layer.weight.detach(), original)


def test_adapter_is_saved_without_the_base(tmp_path):
    """`save_pretrained` of a peft model on an attached base writes the adapter alone."""
    library("safetensors")
    from safetensors.torch import load_file

    model = seeded(mlp)
    QUANTIZERS["diffq"](model).no_optimizer()
    lora(model).save_pretrained(tmp_path)
    plain = seeded(lambda: lora(mlp()))
    plain.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()


def test_transformers_model():
    """GPT-2 with LoRA on its attention trains, merges, and ships what it evaluates."""
    library("transformers")

    def make():
        options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 2}
        return get_peft_model(gpt2(), LoraConfig(**options, init_lora_weights=False))

    peft_model = seeded(make)
    reference = copy.deepcopy(peft_model).merge_and_unload()
    quantizer = QUANTIZERS["diffq"](peft_model.get_base_model())
    quantizer.no_optimizer()
    ids = texts()
    peft_model.train()(ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in peft_model.named_parameters() if "lora" in n}
    assert grads
    assert all(grad is not None for grad in grads.values())
    file = shipped(quantizer, make().get_base_model())
    assert close(evaluate(peft_model, ids).logits, evaluate(file, ids).logits)
    peft_model.merge_and_unload()
    assert close(floats(quantizer.detach()), floats(reference))
