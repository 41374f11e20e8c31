"""transformers' Trainer: checkpoints, the best model, resuming, accumulation, checkpointing."""

import json

import pytest
import torch

import diffq
from tests.compare import close, same_bits
from tests.integrations.tiny import EXTRAS, floats, gpt2, library, same_weights, texts, weights
from tests.models import QUANTIZERS, seeded, snapshot_of
from tests.processors import repeatable

library("transformers")
library("accelerate")
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

LAM = 100.0


def dropping():
    """A GPT-2 with dropout, whose random numbers a checkpoint must restore."""
    return gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)


def dataset(count=16):
    """Sequences of tokens that are their own labels."""
    return [{"input_ids": row, "labels": row} for row in texts(count)]


class Compressing(Trainer):
    """A Trainer that pays for the size once a step, however many batches a step has."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            diffq.quantizer_of(self.model).setup_optimizer(optimizer, lr=0.1)
            optimizer.register_step_pre_hook(self.pay)
        return self.optimizer

    def pay(self, *_):
        size = diffq.quantizer_of(self.model).model_size()
        if size.requires_grad:
            (LAM * size).backward()


def trainer_of(model, folder, **options):
    """A trainer of six steps, without network, progress bars or logs."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"save_strategy": "no", "logging_steps": 100, "report_to": []}
    settings |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return Compressing(model, arguments, train_dataset=dataset(), eval_dataset=dataset(4))


def trained(make, folder, kind="diffq", resume=None, **options):
    """A trainer whose training has ended, of a fresh seeded model."""
    model = seeded(make)
    QUANTIZERS[kind](model)
    trainer = trainer_of(model, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@repeatable()
@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_resume(kind, tmp_path):
    """A run that resumes at a checkpoint of a tied model ends as the uninterrupted one does."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(dropping, tmp_path, kind, **saves)
    torch.manual_seed(1)  # the random state comes from the checkpoint
    resumed = trained(dropping, tmp_path, kind, resume=str(tmp_path / "checkpoint-4"), **saves)
    assert resumed.state.global_step == 6
    assert same_bits(snapshot_of(resumed.model), snapshot_of(whole.model))
    assert not same_weights(resumed.model, seeded(dropping))
    assert resumed.model.lm_head.weight is resumed.model.transformer.wte.weight


def test_bits_learn(tmp_path):
    """The optimizer of a Trainer trains the logits, in their group without weight decay."""
    trainer = trained(gpt2, tmp_path, weight_decay=0.1)
    quantizer = diffq.quantizer_of(trainer.model)
    assert quantizer.mean_bits() < 8
    group = trainer.optimizer.param_groups[-1]
    assert group["weight_decay"] == 0
    assert [id(p) for p in group["params"]] == [id(p) for p in quantizer.learned_parameters()]


def test_groups_of_weight_decay(tmp_path):
    """An attached model's weights are split by decay as the plain model's are, by name."""
    plain = seeded(gpt2)
    names = trainer_of(plain, tmp_path).get_decay_parameter_names(plain)
    model = seeded(gpt2)
    QUANTIZERS["diffq"](model)
    found = trainer_of(model, tmp_path).get_decay_parameter_names(model)
    assert set(found) - EXTRAS == set(names)


class Watch(TrainerCallback):
    """Keeps the state of the model at each save."""

    def __init__(self):
        self.states = {}

    def on_save(self, args, state, control, model=None, **options):
        self.states[state.global_step] = snapshot_of(model)


def test_best_model(tmp_path):
    """`load_best_model_at_end` brings back the whole state of the best checkpoint."""
    model = seeded(gpt2)
    quantizer = QUANTIZERS["diffq"](model)
    # The largest loss is the best here, so that it is not the last checkpoint's.
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(model, tmp_path, load_best_model_at_end=True, **best, **every)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.state.best_global_step in (2, 4)
    assert same_bits(snapshot_of(model), watch.states[trainer.state.best_global_step])
    assert not same_weights(model, seeded(gpt2))
    # The files of the checkpoint say the same as the model, and its bits come from them.
    state = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert same_bits(state["transformer.wte.weight"], weights(model)["transformer.wte.weight"])
    assert same_bits(state["_diffq.learned"], model.state_dict()["_diffq.learned"])
    assert quantizer.mean_bits() < 8


def test_checkpoint_is_of_the_plain_model(tmp_path):
    """`from_pretrained` reads a checkpoint of an attached model as the plain float model."""
    trainer = trained(gpt2, tmp_path, save_strategy="steps", save_steps=6)
    folder = tmp_path / "checkpoint-6"
    plain, found = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    assert set(found["unexpected_keys"]) <= EXTRAS
    assert same_weights(plain, trainer.model)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("kind", ["qat", "diffq-rounding"])
def test_accumulation(kind, tmp_path):
    """A step of two accumulated batches is the step of one batch of their size."""
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one = trained(gpt2, tmp_path, kind, **step)
    two = trained(gpt2, tmp_path, kind, **step, **halves)
    assert close(floats(two.model), floats(one.model))
    assert not close(floats(two.model), floats(seeded(gpt2)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_gradient_checkpointing(kind, reentrant, tmp_path):
    """Blocks that backward computes again see the noise of their forward: the step is the same."""
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    plain = trained(gpt2, tmp_path, kind, **step)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    again = trained(gpt2, tmp_path, kind, gradient_checkpointing=True, **options, **step)
    assert again.model.is_gradient_checkpointing
    assert close(floats(again.model), floats(plain.model))


def test_eval_loss_is_of_the_quantized_model(tmp_path):
    """`evaluate()` measures what the file holds."""
    trainer = trained(gpt2, tmp_path, "qat")
    plain = seeded(gpt2)
    state = diffq.quantizer_of(trainer.model).get_quantized_state()
    loss = trainer.evaluate()["eval_loss"]
    measured = Trainer(
        diffq.restore_quantized_state(plain, state), trainer.args, eval_dataset=dataset(4)
    )
    assert loss == pytest.approx(measured.evaluate()["eval_loss"], rel=1e-5)
    floating = seeded(gpt2)
    floating.load_state_dict(diffq.quantizer_of(trainer.model).detach().state_dict())
    other = Trainer(floating, trainer.args, eval_dataset=dataset(4)).evaluate()["eval_loss"]
    assert loss != pytest.approx(other, rel=1e-3)
