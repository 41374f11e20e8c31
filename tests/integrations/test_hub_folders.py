"""Folders of the hub with quantized weights: each kind of model, and folders that do not fit."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import diffq
from diffq.integrations.hub import from_pretrained, save_pretrained
from tests.compare import close, same_bits
from tests.integrations.tiny import KINDS, gpt2, library, perturb, prepared, shipped, texts, weights
from tests.models import seeded, tokens

library("transformers")
library("huggingface_hub")
library("peft")
from huggingface_hub import PyTorchModelHubMixin  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.integrations.test_huggingface_hub import OnHub  # noqa: E402


def llama(**options):
    """A Llama without ties, whose rotary frequencies are in no state dict."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **options))


def same_as_file(model, quantizer, plain):
    """Whether a model has the weights of the file that the quantizer writes."""
    return same_bits(weights(model), weights(shipped(quantizer, plain)))


@torch.no_grad()
def same_logits(one, other):
    """Whether two language models compute the same in eval mode."""
    return close(one.eval()(texts()).logits, other.eval()(texts()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers(kind, tmp_path):
    """A tied model comes back by its class, in eval mode, with the values of eval."""
    model, quantizer = prepared(gpt2, kind)
    perturb(model)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(GPT2LMHeadModel, tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert same_as_file(loaded, quantizer, gpt2())
    assert same_logits(loaded, model)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.diffq"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "GPT2LMHeadModel"
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_buffers_that_are_not_stored(tied, tmp_path):
    """What the class computes when it is made is there, tied or not."""
    model = seeded(lambda: llama(tie_word_embeddings=tied))
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    save_pretrained(quantizer, tmp_path)
    loaded = from_pretrained(LlamaForCausalLM, tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert same_logits(loaded, model)


def test_auto_class(tmp_path):
    """A class that looks the model's class up in the configuration is taken too."""
    model, quantizer = prepared(gpt2)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(AutoModelForCausalLM, tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    assert same_as_file(loaded, quantizer, gpt2())


def test_dtype(tmp_path):
    """A model in bfloat16 comes back in bfloat16."""
    model = seeded(gpt2).bfloat16()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(GPT2LMHeadModel, tmp_path)
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert same_as_file(loaded, quantizer, gpt2().bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_mixin(kind, tmp_path):
    """A model with the mixin comes back with its settings, and the mixin writes its card."""
    model, quantizer = prepared(lambda: OnHub(scale=2.0), kind)
    save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.diffq", "README.md"}
    loaded = from_pretrained(OnHub, tmp_path)
    assert type(loaded) is OnHub
    assert loaded.scale == 2.0
    assert not loaded.training
    assert same_as_file(loaded, quantizer, OnHub())
    with torch.no_grad():
        inputs = tokens()
        assert close(loaded(inputs), model.eval()(inputs))
    # Its own methods are back in place.
    model.save_pretrained(tmp_path / "float")
    assert (tmp_path / "float" / "model.safetensors").exists()


@dataclass
class Shape:
    """A configuration as a class."""

    width: int = 4


class Shaped(nn.Module, PyTorchModelHubMixin):
    """A model that takes its configuration in one argument."""

    def __init__(self, config: Shape):
        super().__init__()
        self.layer = nn.Linear(16, config.width)


class Bare(nn.Module, PyTorchModelHubMixin):
    """A model without settings, for which the mixin writes no configuration."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)


@pytest.mark.parametrize("make", [lambda: Shaped(Shape(6)), Bare])
def test_configurations_of_the_mixin(make, tmp_path):
    """The mixin reads what it wrote: classes of settings, and none."""
    model = make()
    quantizer = diffq.QATQuantizer(model, min_size=0)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(type(make()), tmp_path)
    assert same_as_file(loaded, quantizer, make())


class Plain(nn.Module):
    """A model of no library."""

    def __init__(self, width=4, bias=True):
        super().__init__()
        self.layer = nn.Linear(16, width, bias)


@pytest.mark.parametrize("config", [None, {"width": 6, "bias": False}])
def test_any_other_model(config, tmp_path):
    """The arguments of another class are given, and come back."""
    model = Plain(**(config or {}))
    quantizer = diffq.QATQuantizer(model, min_size=0)
    save_pretrained(model, tmp_path / "new" / "folder", config=config)
    loaded = from_pretrained(Plain, tmp_path / "new" / "folder")
    assert same_as_file(loaded, quantizer, Plain(**(config or {})))
    assert not loaded.training


def adapted(rank=4, **options):
    """A GPT-2 with random adapters on its attention."""
    config = LoraConfig(r=rank, target_modules=["c_attn"], init_lora_weights=False, **options)
    return get_peft_model(seeded(gpt2), config)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["ln_f"]}])
def test_adapter(options, part, tmp_path):
    """An adapter is stored alone, without the base, and computes on a base as it did."""
    model = adapted(**options)
    quantizer = diffq.DiffQuantizer(
        model.get_base_model() if part else model, include=["*lora_*"], min_size=0, bits=4
    )
    save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.diffq",
    }
    stored = diffq.load(tmp_path / "adapter_model.diffq")
    assert stored
    assert not any("wte" in name or "base_layer.weight" in name for name in stored)
    loaded = from_pretrained(seeded(gpt2), tmp_path)
    assert isinstance(loaded, PeftModel)
    assert not loaded.training
    assert same_logits(loaded, model)
    quantizer.detach()
    assert not same_logits(loaded, model)


def test_adapter_in_use(tmp_path):
    """Of several adapters the one in use is stored."""
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    diffq.DiffQuantizer(model, include=["*lora_*"], min_size=0)
    save_pretrained(model, tmp_path / "first")
    model.set_adapter("second")
    save_pretrained(model, tmp_path / "second")
    for name, rank in (("first", 4), ("second", 2)):
        file = diffq.load(tmp_path / name / "adapter_model.diffq")
        assert {tensor.shape[0] for key, tensor in file.items() if "lora_A" in key} == {rank}
    assert same_logits(from_pretrained(seeded(gpt2), tmp_path / "second"), model)


def test_adapter_of_another_base(tmp_path):
    """An adapter for more layers than the base has is refused."""
    model = adapted()
    diffq.DiffQuantizer(model, include=["*lora_*"], min_size=0)
    save_pretrained(model, tmp_path)
    with pytest.raises(diffq.MismatchError, match="does not fit the base model"):
        from_pretrained(gpt2(n_layer=1), tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "model.diffq"])
@pytest.mark.parametrize("kind", [GPT2LMHeadModel, AutoModelForCausalLM, Plain])
def test_missing_files(kind, missing, tmp_path):
    """A folder without a file says which, and what to pass."""
    model, _ = prepared(gpt2)
    save_pretrained(model, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(diffq.ConfigError, match=f"has {missing}, but .* has none"):
        from_pretrained(kind, tmp_path)


def test_folder_that_is_none(tmp_path):
    """A name on the hub is no folder, and the error says how to get one."""
    with pytest.raises(diffq.ConfigError, match="snapshot_download"):
        from_pretrained(GPT2LMHeadModel, "someone/model")
    with pytest.raises(diffq.ConfigError, match=r"adapter_config\.json"):
        from_pretrained(gpt2(), tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"depth": 3}'])
def test_configurations_that_do_not_fit(text, tmp_path):
    """A damaged configuration and one of another class are errors of diffq."""
    model = Plain()
    diffq.QATQuantizer(model, min_size=0)
    save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(diffq.ConfigError, match=r"config\.json must hold"):
        from_pretrained(Plain, tmp_path)


def test_weights_of_another_model(tmp_path):
    """Weights that do not fit the configuration are a MismatchError."""
    model = Plain(width=6)
    diffq.QATQuantizer(model, min_size=0)
    save_pretrained(model, tmp_path, config={"width": 5})
    with pytest.raises(diffq.MismatchError):
        from_pretrained(Plain, tmp_path)


def test_model_without_quantizer(tmp_path):
    """A plain model has nothing to save, and the folder is not made."""
    with pytest.raises(diffq.AttachError, match="has no quantizer"):
        save_pretrained(gpt2(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_quantizer_of_a_part(tmp_path):
    """A model of which a part is quantized is refused, and the part can be saved."""
    model = gpt2()
    quantizer = diffq.DiffQuantizer(model.transformer, min_size=0)
    with pytest.raises(diffq.AttachError, match="on a part of it"):
        save_pretrained(model, tmp_path)
    save_pretrained(quantizer, tmp_path)
    assert same_as_file(
        from_pretrained(type(model.transformer), tmp_path), quantizer, gpt2().transformer
    )


def test_config_for_a_model_that_has_one(tmp_path):
    """Arguments for a model that knows its own are an error."""
    model, _ = prepared(gpt2)
    with pytest.raises(diffq.ConfigError, match="Leave config out"):
        save_pretrained(model, tmp_path, config={"n_layer": 1})
