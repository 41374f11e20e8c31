"""The callback of transformers' Trainer: adapters of PEFT, and what it refuses."""

import pytest
import torch

import diffq
from tests.integrations.tiny import library, texts
from tests.models import seeded

library("transformers")
library("accelerate")
from transformers import Trainer, TrainingArguments  # noqa: E402

from diffq.integrations.transformers import DiffQCallback  # noqa: E402
from tests.integrations.test_trainer_callback import (  # noqa: E402
    SMALL,
    Watch,
    trainer_of,
    wide,
)


@pytest.mark.parametrize("arguments", [{}, {"group_size": 4}])
def test_neither_size_nor_price(arguments, tmp_path):
    """Without size and price the callback has nothing to do, and says so before training."""
    with pytest.raises(diffq.ConfigError, match=r"target_mb=.* or lam="):
        trainer_of(seeded(wide), tmp_path, DiffQCallback(**arguments))


def test_options_for_an_attached_model(tmp_path):
    """Options for a quantizer that is there already are an error."""
    model = seeded(wide)
    diffq.DiffQuantizer(model, **SMALL)
    with pytest.raises(diffq.ConfigError, match=r"has a quantizer.*group_size"):
        trainer_of(model, tmp_path, DiffQCallback(lam=1.0, group_size=8))


def test_added_too_late(tmp_path):
    """A callback that is added to a trainer raises at the beginning of the training."""
    trainer = trainer_of(seeded(wide), tmp_path, Watch())
    trainer.add_callback(DiffQCallback(lam=1.0, **SMALL))
    with pytest.raises(diffq.AttachError, match=r"Trainer\(\.\.\., callbacks=\[callback\]\)"):
        trainer.train()


def test_called_by_no_trainer():
    """A callback that something else calls says where it belongs."""
    with pytest.raises(diffq.AttachError, match="belongs to a Trainer"):
        DiffQCallback(lam=1.0).on_init_end(None, None, None)


def test_scheduler_of_the_user(tmp_path):
    """A scheduler that was made before raises, with the order that works."""
    model = seeded(wide)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=4)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in texts(4)],
        callbacks=[DiffQCallback(lam=1.0, **SMALL)],
        optimizers=(optimizer, scheduler),
    )
    with pytest.raises(diffq.OptimizerError, match="scheduler"):
        trainer.train()


def adapted():
    """A GPT-2 with adapters of PEFT."""
    peft = library("peft")
    return peft.get_peft_model(wide(), peft.LoraConfig(r=4, target_modules=["c_attn"]))


def test_adapters(tmp_path):
    """Adapters of PEFT are compressed, and each checkpoint has a file of them alone."""
    callback = DiffQCallback(lam=100.0, lr=0.1, include=["*lora_*"], **SMALL)
    trainer = trainer_of(seeded(adapted), tmp_path, callback, save_strategy="steps", save_steps=20)
    trainer.train()
    assert diffq.quantizer_of(trainer.model).mean_bits() < 8
    for folder in (tmp_path, tmp_path / "checkpoint-40"):
        stored = diffq.load(folder / "adapter_model.diffq")
        assert stored
        assert all("lora_" in name for name in stored)


def test_adapters_without_their_bits(tmp_path):
    """A checkpoint of PEFT has no bitwidths, so resuming and the best model are refused."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}

    def trainer():
        callback = DiffQCallback(lam=100.0, include=["*lora_*"], **SMALL)
        return trainer_of(seeded(adapted), tmp_path, callback, **options)

    trainer().train()
    with pytest.raises(diffq.AttachError, match="resume_from_checkpoint"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    options |= {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    with pytest.raises(diffq.AttachError, match="load_best_model_at_end"):
        trainer()


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_trainers(name, tmp_path, monkeypatch):
    """Trainers that replace the model's parameters are refused when they are made."""
    create = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        setattr(self, name, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(diffq.AttachError, match="one device or with DDP"):
        trainer_of(seeded(wide), tmp_path, DiffQCallback(lam=1.0, **SMALL))
