"""transformers' models: saving, tying, resizing, generating, and what they tell of themselves."""

import json

import pytest
import torch
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.integrations.tiny import (
    EXTRAS,
    KINDS,
    evaluates_as_shipped,
    extras,
    floats,
    gpt2,
    library,
    perturb,
    prepared,
    same_weights,
    shipped,
    texts,
    weights,
)
from tests.models import QUANTIZERS, gradients, seeded, snapshot_of, step

library("transformers")
from safetensors.torch import load_model  # noqa: E402
from transformers import (  # noqa: E402
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


def resnet():
    """A residual network on images of 32 x 32."""
    layers = {"hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, num_labels=5, **layers))


def vit():
    """A vision transformer on images of 32 x 32."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {"intermediate_size": 32, "image_size": 32, "patch_size": 8, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**shape, **image, initializer_range=0.2))


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained(kind, tmp_path):
    """What an attached model saves, `from_pretrained` loads as the plain model with its floats."""
    model, _ = prepared(gpt2, kind)
    perturb(model)
    model.save_pretrained(tmp_path)
    plain, found = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    assert set(found["unexpected_keys"]) <= EXTRAS
    assert type(plain) is GPT2LMHeadModel
    assert same_weights(plain, model)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "GPT2LMHeadModel"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_attached_again(kind, tmp_path):
    """The saved file gives an attached model its weights and learned parameters back."""
    model, _ = prepared(gpt2, kind)
    perturb(model)
    model.save_pretrained(tmp_path)
    other, _ = prepared(gpt2, kind, seed=1)
    load_model(other, tmp_path / "model.safetensors")
    assert same_bits(snapshot_of(other), snapshot_of(model))
    assert evaluates_as_shipped(other, gpt2, texts())


def test_save_pretrained_in_shards(tmp_path):
    """A save in several files is loaded plain as well."""
    model, _ = prepared(gpt2)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)


def test_attached_after_from_pretrained(tmp_path):
    """A pretrained model is attached, trained for two steps and shipped."""
    seeded(gpt2).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    ids = texts()
    for _ in range(2):
        (model(ids, labels=ids).loss + 100 * quantizer.model_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert quantizer.mean_bits() < 8
    assert evaluates_as_shipped(model, gpt2, ids)


def test_tie_weights():
    """`tie_weights()` leaves an attached model as it is: one parameter, one quantizer."""
    model, quantizer = prepared(gpt2)
    parameter, before = model.get_input_embeddings().weight, snapshot_of(model)
    model.tie_weights()
    assert model.lm_head.weight is parameter
    assert model.transformer.wte.weight is parameter
    assert same_bits(snapshot_of(model), before)
    model.train()(texts()).logits.sum().backward()
    assert parameter.grad is not None
    assert sum("wte" in name or "lm_head" in name for name in quantizer.bits()) == 1
    assert evaluates_as_shipped(model, gpt2, texts())


def test_resize_before_attaching():
    """A resized vocabulary is quantized whole, and tied as before."""

    def resized():
        model = gpt2()
        model.resize_token_embeddings(50)
        return model

    model, quantizer = prepared(resized)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.wte.weight.shape == (50, 16)
    assert quantizer.bits()["transformer.wte.weight"].numel() == 50 * 16 // 4
    assert evaluates_as_shipped(model, resized, torch.randint(40, 50, (2, 8)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind, reentrant):
    """Gradients are those without checkpointing, of weights and of what is learned."""
    ids, found = texts(), []
    for checkpointing in (False, True):
        model, _ = prepared(gpt2, kind)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(2)
        model.train()(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    assert close(found[1], found[0])
    assert all(found[0][name] is not None for name in weights(gpt2()) if name in found[0])


@pytest.mark.parametrize("sampled", [False, True])
def test_generate(sampled):
    """`generate()` in eval uses the quantized weights, with its cache of keys and values."""
    model, quantizer = prepared(gpt2)
    options = {"max_new_tokens": 6, "do_sample": sampled, "pad_token_id": 0, "min_new_tokens": 6}
    ids, found = texts(), []
    for each in (model.eval(), shipped(quantizer, gpt2())):
        torch.manual_seed(3)
        found.append(
            each.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
        )
    assert found[0].sequences.shape == (2, 14)
    assert close(list(found[0].logits), list(found[1].logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_introspection(dtype, tmp_path):
    """Dtype, device, size and names are those of the plain model."""
    plain = seeded(gpt2).to(dtype)
    model = seeded(gpt2).to(dtype)
    quantizer = QUANTIZERS["diffq"](model)
    assert model.dtype == dtype
    assert model.device == torch.device("cpu")
    learned = sum(p.numel() for p in quantizer.learned_parameters())
    assert model.num_parameters() - learned == plain.num_parameters()
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert isinstance(model, GPT2LMHeadModel)
    assert repr(model.config) == repr(plain.config)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == ["GPT2LMHeadModel"]


def test_embeddings_are_found():
    """The getters of embeddings give modules whose weight is the parameter."""
    model, _ = prepared(gpt2)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, nn.Parameter)
    assert weight is model.get_output_embeddings().weight
    assert same_bits(weight.detach(), seeded(gpt2).transformer.wte.weight.detach())


def test_initialized_again():
    """`_init_weights` writes to the parameters of an attached model, and eval follows."""
    model, _ = prepared(gpt2)
    assert evaluates_as_shipped(model, gpt2, texts())
    for each in (model, plain := seeded(gpt2)):
        torch.manual_seed(5)
        with torch.no_grad():
            for block in each.transformer.h:
                nn.init.normal_(block.mlp.c_fc.weight)
    assert same_weights(model, plain)
    assert evaluates_as_shipped(model, gpt2, texts())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [resnet, vit])
def test_images(make, kind):
    """A convolutional network and a vision transformer train, and evaluate as their files do."""
    model = seeded(make)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    x, before = torch.randn(4, 3, 32, 32), floats(model)
    for _ in range(2):
        step(lambda x: model(x).logits, optimizer, x, quantizer)
    assert not close(floats(model), before)
    assert evaluates_as_shipped(model, make, x)


def test_images_without_the_head():
    """A backbone of an attached model, called by itself, computes as in the whole model."""
    model, quantizer = prepared(vit)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.eval().vit(x).last_hidden_state
        file = shipped(quantizer, vit()).vit(x).last_hidden_state
    assert close(features, file)
    assert weights(model).keys() == weights(seeded(vit)).keys()
    assert extras(model)
    assert diffq.quantizer_of(model) is quantizer


def test_quantized_without_training():
    """A model's own loss is measured batch by batch, and its tied embedding counts once."""
    model = seeded(gpt2).train()
    before = weights(model)
    batches = [{"input_ids": texts(), "labels": texts()}]
    measured = diffq.sensitivity(model, batches, min_size=0, include=["*.weight"])
    with torch.no_grad():
        assert measured.loss == pytest.approx(model.eval()(**batches[0]).loss.item(), rel=1e-5)
    assert measured.tensors["transformer.wte.weight"].names[1:] == ("lm_head.weight",)
    assert all(same_bits(tensor, before[name]) for name, tensor in weights(model).items())
    quantized = diffq.quantize_checkpoint(
        model.state_dict(), 0.02, sensitivity=measured, min_size=0, include=["*.weight"]
    )
    fresh = seeded(gpt2, 1)
    fresh.load_state_dict(quantized.state_dict())
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert quantized.size_mb <= 0.02
