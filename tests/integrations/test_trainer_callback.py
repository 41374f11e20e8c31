"""The callback of transformers' Trainer: sizes, logs, files, resuming, and what it refuses."""

import copy
import io
import json
import os

import pytest
import torch

import diffq
from tests.compare import same_bits
from tests.integrations.tiny import gpt2, library, same_weights, texts
from tests.models import seeded, snapshot_of
from tests.processors import repeatable

library("transformers")
library("accelerate")
from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from diffq.integrations.transformers import DiffQCallback  # noqa: E402

#: Settings of a quantizer for a model of a few thousand weights.
SMALL = {"min_size": 0, "group_size": 4}
EVERY = {"save_strategy": "steps", "save_steps": 4}
#: A size that the tiny model reaches within some steps: it has 0.0055 MB at 8 bits.
TARGET = 0.006


def dropping():
    """A GPT-2 with dropout, whose random numbers a checkpoint must restore."""
    return gpt2(n_embd=32, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)


def wide():
    """A GPT-2 with tied embeddings, 32 wide."""
    return gpt2(n_embd=32)


def trainer_of(model, folder, callback, *others, **options):
    """A trainer of 40 steps, without network or progress bars; the callback is all it knows."""
    settings = {"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    settings |= {"save_strategy": "no", "logging_steps": 10, "report_to": []}
    settings |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    rows = [{"input_ids": row, "labels": row} for row in texts(16)]
    data = {"train_dataset": rows, "eval_dataset": rows[:4]}
    given = {"model_init": model} if callable(model) and not hasattr(model, "state_dict") else {}
    given = given or {"model": model}
    return Trainer(**given, args=arguments, callbacks=[callback, *others], **data)


def trained(folder, resume=None, make=wide, arguments=None, **options):
    """A trainer whose training to a size has ended, of a fresh seeded model."""
    callback = DiffQCallback(**{"target_mb": TARGET, **SMALL, **(arguments or {})})
    trainer = trainer_of(seeded(make), folder, callback, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def megabytes(path):
    """The size of a file."""
    return os.path.getsize(path) / 2**20


def file_of(quantizer):
    """The bytes that a quantizer would write."""
    file = io.BytesIO()
    diffq.save(quantizer, file)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_size_that_was_asked_for(options, tmp_path):
    """The callback alone makes a tied model end with a file of the size, which loads plain."""
    trainer = trained(tmp_path, **options)
    assert 0.97 * TARGET < megabytes(tmp_path / "model.diffq") <= TARGET
    quantizer = diffq.quantizer_of(trainer.model)
    assert (tmp_path / "model.diffq").read_bytes() == file_of(quantizer)
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight
    loaded = diffq.load(tmp_path / "model.diffq", wide())
    assert same_weights(loaded, diffq.quantizer_of(copy.deepcopy(trainer.model)).detach(True))


def test_group_of_the_bits(tmp_path):
    """Bits have their own group, without weight decay, and the scheduler scales their own rate."""
    trainer = trained(tmp_path, arguments={"lr": 0.02}, weight_decay=0.1, max_steps=10)
    quantizer = diffq.quantizer_of(trainer.model)
    learned = {id(parameter) for parameter in quantizer.learned_parameters()}
    *others, last = trainer.optimizer.param_groups
    assert {id(parameter) for parameter in last["params"]} == learned
    assert last["weight_decay"] == 0
    assert last["initial_lr"] == 0.02
    assert learned.isdisjoint(id(p) for group in others for p in group["params"])
    assert trainer.lr_scheduler.get_last_lr()[-1] == pytest.approx(0, abs=1e-9)


class Reporter(TrainerCallback):
    """What loggers are told, as TensorBoard and W&B are."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **options):
        self.logs.append(dict(logs))


def test_logs(tmp_path):
    """Size, mean bits and price stand in each training log, for all loggers and the history."""
    reporter = Reporter()
    callback = DiffQCallback(target_mb=TARGET, **SMALL)
    trainer = trainer_of(seeded(wide), tmp_path, callback, eval_strategy="steps", eval_steps=10)
    # Loggers of `report_to` come before the callbacks of the user.
    trainer.callback_handler.callbacks.insert(0, reporter)
    trainer.train()
    for logs in (reporter.logs, trainer.state.log_history):
        training = [each for each in logs if "loss" in each]
        assert len(training) == 4
        assert all({"size_mb", "mean_bits", "lam"} <= set(each) for each in training)
        assert training[0]["mean_bits"] == 8
        assert training[-1]["mean_bits"] < 8
        assert training[-1]["size_mb"] == pytest.approx(TARGET, rel=0.03)
        assert not any("size_mb" in each for each in logs if "eval_loss" in each)


def test_price(tmp_path):
    """A price of 0 leaves the bits to the loss, and a high one lowers them from the first step."""
    found = []
    for lam in (0.0, 1000.0):
        trainer = trained(tmp_path, arguments={"target_mb": None, "lam": lam, "lr": 0.1})
        found.append(diffq.quantizer_of(trainer.model).mean_bits())
    assert found[1] < found[0] - 1
    assert diffq.quantizer_of(trainer.model).target is None
    assert trainer.state.log_history[0]["lam"] == 1000


def test_price_after_a_float_phase(tmp_path):
    """With `float_share`, the price begins late and the trainer's number of steps is the plan's."""
    share = {"target_mb": None, "lam": 10.0, "float_share": 0.5}
    trainer = trained(tmp_path, arguments=share)
    assert [each["lam"] for each in trainer.state.log_history[:2]] == [0, 0]
    target = diffq.quantizer_of(trainer.model).target
    assert (target.step, target.steps, target.lam) == (40, 40, 10)


@repeatable()
@pytest.mark.parametrize("step", [8, 28, 36])
def test_resume(step, tmp_path):
    """A run that resumes in the float phase, on the path or settled ends as the whole one does."""
    whole = trained(tmp_path, make=dropping, **EVERY)
    folder = tmp_path / f"checkpoint-{step}"
    torch.manual_seed(1)  # the random state comes from the checkpoint
    resumed = trained(tmp_path / "resumed", resume=str(folder), make=dropping, **EVERY)
    assert resumed.state.global_step == 40
    assert same_bits(snapshot_of(resumed.model), snapshot_of(whole.model))
    files = [each / "model.diffq" for each in (tmp_path, tmp_path / "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


class Watch(TrainerCallback):
    """The file of the model at each save."""

    def __init__(self):
        self.files = {}

    def on_save(self, args, state, control, model=None, **options):
        self.files[state.global_step] = file_of(diffq.quantizer_of(model))


def test_file_in_each_checkpoint(tmp_path):
    """Each folder that the model is saved to has the file of that moment, the user's too."""
    watch = Watch()
    callback = DiffQCallback(target_mb=TARGET, **SMALL)
    trainer = trainer_of(
        seeded(wide), tmp_path, callback, watch, save_strategy="steps", save_steps=20
    )
    trainer.train()
    for step, file in watch.files.items():
        assert (tmp_path / f"checkpoint-{step}" / "model.diffq").read_bytes() == file
    assert set(watch.files) == {20, 40}
    assert watch.files[20] != watch.files[40]
    trainer.save_model(str(tmp_path / "shipped"))
    assert (tmp_path / "shipped" / "model.diffq").read_bytes() == watch.files[40]
    assert (tmp_path / "shipped" / "model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_best_model_has_the_size(strategy, tmp_path):
    """The best model is one of those that have the size, though larger ones have a lower loss."""
    every = {"save_strategy": strategy, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = trained(tmp_path, **every, **best, learning_rate=1e-9)
    losses = {
        each["step"]: each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each
    }
    settled = {step: loss for step, loss in losses.items() if step >= 38}
    assert min(losses.values()) < min(settled.values())
    assert trainer.state.best_metric == min(settled.values())
    assert 0.97 * TARGET < megabytes(tmp_path / "model.diffq") <= TARGET


def test_early_stopping_waits_for_the_size(tmp_path):
    """A loss that rises on the path to the size does not end the training."""
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    callback = DiffQCallback(target_mb=TARGET, **SMALL)
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    options = {**every, **best, "learning_rate": 1e-9}
    trainer = trainer_of(seeded(wide), tmp_path, callback, stopping, **options)
    trainer.train()
    assert trainer.state.global_step >= 38


class Stop(TrainerCallback):
    """Ends the training after ten steps."""

    def on_step_end(self, args, state, control, **options):
        control.should_training_stop = state.global_step == 10


def test_training_that_stops_early(tmp_path):
    """A training that ends before its plan says so, with the size that the file has."""
    callback = DiffQCallback(target_mb=TARGET, **SMALL)
    trainer = trainer_of(seeded(wide), tmp_path, callback, Stop())
    with pytest.warns(diffq.DiffqWarning, match="ended at step 10 of the 40"):
        trainer.train()


def test_model_init(tmp_path):
    """A model that the trainer makes anew for its training is compressed."""
    callback = DiffQCallback(target_mb=TARGET, **SMALL)
    trainer = trainer_of(lambda: seeded(wide), tmp_path, callback)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert megabytes(tmp_path / "model.diffq") <= TARGET


def test_attached_before(tmp_path):
    """The callback takes the quantizer that a model has, of any method, and needs no size."""
    model = seeded(wide)
    quantizer = diffq.LSQQuantizer(model, bits=4, min_size=0)
    trainer = trainer_of(model, tmp_path, DiffQCallback(), max_steps=4, logging_steps=2)
    trainer.train()
    assert diffq.quantizer_of(trainer.model) is quantizer
    assert (tmp_path / "model.diffq").read_bytes() == file_of(quantizer)
    assert trainer.state.log_history[0]["mean_bits"] == 4
    assert "lam" not in trainer.state.log_history[0]


def test_optimizer_of_the_user(tmp_path):
    """An optimizer that was made before the trainer learns the bits too."""
    model = seeded(wide)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    callback = DiffQCallback(target_mb=TARGET, **SMALL)
    trainer = trainer_of(model, tmp_path, callback)
    trainer.optimizer = optimizer
    trainer.train()
    assert megabytes(tmp_path / "model.diffq") <= TARGET
    assert len(optimizer.param_groups) == 2


def test_trained_again(tmp_path):
    """A second training goes on with the bitwidths of the first, and with their rate."""
    trainer = trained(tmp_path, arguments={"lr": 0.02})
    bits = diffq.quantizer_of(trainer.model).bits()
    trainer.train()
    assert same_bits(diffq.quantizer_of(trainer.model).bits(), bits)


def test_the_class_of_the_trainer(tmp_path):
    """The trainer stays what it was to the code around it, and others have no such methods."""

    class Own(Trainer):
        """A trainer of the user."""

        def create_optimizer(self, *args):
            self.made = True
            return super().create_optimizer(*args)

    model = seeded(wide)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Own(model, arguments, callbacks=[DiffQCallback(lam=1.0, **SMALL)])
    assert type(trainer).__name__ == "Own"
    assert isinstance(trainer, Own)
    trainer.create_optimizer()
    assert trainer.made
    assert not hasattr(Own(seeded(wide), arguments), "diffq_callback")


def test_checkpoint_is_of_the_plain_model(tmp_path):
    """`from_pretrained` reads a checkpoint as the plain model, and the configuration is its."""
    trainer = trained(tmp_path, save_strategy="steps", save_steps=40)
    folder = tmp_path / "checkpoint-40"
    plain = type(wide()).from_pretrained(folder)
    assert same_weights(plain, trainer.model)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
