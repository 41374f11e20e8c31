"""The callback of Lightning: sizes, logs, schedulers, checkpoints, resuming, refusals."""

import math
import os
from functools import partial

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.integrations.tiny import library, same_weights, shipped
from tests.models import seeded, snapshot_of
from tests.processors import repeatable

library("lightning")
import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from diffq.integrations.lightning import DiffQCallback  # noqa: E402

SMALL = {"min_size": 0, "group_size": 4}
#: The network below has 0.0049 MB at 8 bits.
TARGET = 0.004


def network():
    """A network of 5000 weights."""
    return nn.Sequential(nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 8))


class Module(L.LightningModule):
    """A module as users write it: nothing in it knows of quantization."""

    def __init__(self, schedule=None, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def training_step(self, batch, index):
        loss = (self.net(batch) - batch[:, :8]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", (self.net(batch) - batch[:, :8]).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
        return SCHEDULES[self.hparams.schedule](optimizer)


def cosine(optimizer):
    """A scheduler by the step."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sequential(optimizer):
    """A warm-up, and a scheduler after it, which are made of the optimizer one after the other."""
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    rest = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, rest], [2])
    return [optimizer], [both]


def plateau(optimizer):
    """A scheduler that keeps the least rate of each group when it is made."""
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


def one_cycle(optimizer):
    """A scheduler that sets its rates before it is one."""
    rates = [1e-2] * (len(optimizer.param_groups) - 1) + [0.05]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, 40)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


SCHEDULES = {
    None: lambda optimizer: optimizer,
    "cosine": cosine,
    "sequential": sequential,
    "plateau": plateau,
    "one_cycle": one_cycle,
}


def batches(count=5):
    """Batches of four rows, the same at each call."""
    data = torch.randn(4 * count, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(data, batch_size=4)


def trainer_of(folder, callback, *others, epochs=8, **options):
    """A trainer of 40 steps on the CPU; the callback is all it knows of quantization."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    settings |= {"max_epochs": epochs, "default_root_dir": folder, "log_every_n_steps": 5}
    return L.Trainer(callbacks=[callback, *others], **{**quiet, **settings, **options})


def fitted(folder, make=Module, arguments=None, ckpt_path=None, **options):
    """A module whose training to a size has ended, and its trainer."""
    module = seeded(make)
    callback = DiffQCallback(**{"target_mb": TARGET, **SMALL, **(arguments or {})})
    trainer = trainer_of(folder, callback, **options)
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return module, trainer


def megabytes(path):
    """The size of a file."""
    return os.path.getsize(path) / 2**20


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_size_that_was_asked_for(schedule, tmp_path):
    """The callback alone makes a module end with a file of the size, under any scheduler."""
    module, trainer = fitted(tmp_path, partial(Module, schedule))
    assert trainer.global_step == 40
    assert 0.97 * TARGET < megabytes(tmp_path / "model.diffq") <= TARGET
    quantizer = diffq.quantizer_of(module)
    loaded = diffq.load(tmp_path / "model.diffq", Module())
    assert same_weights(loaded, shipped(quantizer, Module()))
    _, group = trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in quantizer.learned_parameters()]


OPTIONS = [
    {"accumulate_grad_batches": 2, "epochs": 14},
    {"precision": "bf16-mixed"},
    {"gradient_clip_val": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_the_trainer(options, tmp_path):
    """Accumulation, mixed precision and clipping: the plan has the steps that the trainer makes."""
    module, trainer = fitted(tmp_path, **options)
    target = diffq.quantizer_of(module).target
    assert target.step == target.steps == trainer.global_step
    assert 0.97 * TARGET < megabytes(tmp_path / "model.diffq") <= TARGET


def test_logs(tmp_path):
    """Loggers get size, bits and price with the other numbers of a step, and callbacks see them."""
    logger = CSVLogger(tmp_path, name="", version="run")
    checkpoint = ModelCheckpoint(monitor="size_mb", every_n_train_steps=5, dirpath=tmp_path)
    callback = DiffQCallback(target_mb=TARGET, **SMALL)
    options = {"logger": logger, "enable_checkpointing": True}
    trainer_of(tmp_path, callback, checkpoint, **options).fit(seeded(Module), batches())
    header, *lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    logged = [row for row in rows if row["size_mb"]]
    assert len(logged) == 8
    assert all(row["loss"] for row in logged)
    assert float(logged[0]["mean_bits"]) == 8
    assert float(logged[-1]["mean_bits"]) < 8
    assert float(logged[-1]["lam"]) >= 0
    assert float(checkpoint.best_model_score) == pytest.approx(TARGET, rel=0.1)
    assert (tmp_path / "run" / "model.diffq").exists()


@repeatable()
@pytest.mark.parametrize("epochs", [2, 6])
def test_resume(epochs, tmp_path):
    """A fit that goes on from a checkpoint, before and on the path, ends as the whole one does."""
    rounding = {"noise": "rounding"}  # Lightning restores no random state
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    callback = DiffQCallback(target_mb=TARGET, **SMALL, **rounding)
    whole = seeded(partial(Module, "cosine"))
    trainer = trainer_of(tmp_path, callback, saving, enable_checkpointing=True)
    trainer.fit(whole, batches())
    path = tmp_path / f"epoch={epochs}.ckpt"
    resumed, trainer = fitted(tmp_path / "resumed", partial(Module, "cosine"), rounding, str(path))
    assert trainer.global_step == 40
    assert same_bits(snapshot_of(resumed), snapshot_of(whole))
    files = [each / "model.diffq" for each in (tmp_path, tmp_path / "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_checkpoint_evaluated(tmp_path):
    """`test` and `validate` of a fresh module with a checkpoint measure the quantized weights."""
    module, trainer = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    (first,) = trainer.validate(module, batches(), verbose=False)
    other = trainer_of(tmp_path / "other", DiffQCallback(target_mb=TARGET, **SMALL))
    path = str(tmp_path / "module.ckpt")
    (second,) = other.validate(Module(), batches(), ckpt_path=path, verbose=False)
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-5)
    plain = diffq.load(tmp_path / "model.diffq", Module()).eval()
    losses = [(plain.net(each) - each[:, :8]).square().mean().item() for each in batches()]
    assert first["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_load_from_checkpoint(tmp_path):
    """A checkpoint gives a plain module its float weights, with `strict=False`."""
    module, trainer = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    plain = Module.load_from_checkpoint(tmp_path / "module.ckpt", map_location="cpu", strict=False)
    assert type(plain) is Module
    assert same_weights(plain, module)


class Configured(Module):
    """A module that makes its network in `configure_model`."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = network()


class SetUp(Configured):
    """A module that makes its network in `setup`."""

    def configure_model(self):
        """Has nothing to do."""

    def setup(self, stage):
        if self.net is None:
            self.net = network()


@pytest.mark.parametrize("make", [Configured, SetUp])
def test_networks_made_late(make, tmp_path):
    """A network that the module makes in a hook is quantized."""
    module, _ = fitted(tmp_path, make)
    assert set(diffq.quantizer_of(module).bits()) == set(Module().state_dict())
    assert 0.97 * TARGET < megabytes(tmp_path / "model.diffq") <= TARGET


def test_attached_before(tmp_path):
    """The callback takes the quantizer of a part of the module, and needs no size."""
    module = seeded(Module)
    quantizer = diffq.LSQQuantizer(module.net, bits=4, min_size=0)
    trainer_of(tmp_path, DiffQCallback(), epochs=1).fit(module, batches())
    assert diffq.quantizer_of(module) is quantizer
    loaded = diffq.load(tmp_path / "model.diffq", network())
    assert same_weights(loaded, shipped(quantizer, network()))


def test_price(tmp_path):
    """A price lowers the bits from the first step."""
    module, _ = fitted(tmp_path, arguments={"target_mb": None, "lam": 1000.0, "lr": 0.1})
    quantizer = diffq.quantizer_of(module)
    assert quantizer.mean_bits() < 6
    assert quantizer.target is None


class Manual(Module):
    """Two optimizers, of a network each, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = network()

    def training_step(self, batch, index):
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward((net(batch) - batch[:, :8]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.net, self.other)]


def test_several_optimizers(tmp_path):
    """With several optimizers, the first one learns the bits of all networks."""
    arguments = {"target_mb": None, "lam": 1000.0, "lr": 0.1}
    module, trainer = fitted(tmp_path, Manual, arguments)
    bits = diffq.quantizer_of(module).bits()
    assert all(bits[f"{name}.0.weight"].float().mean() < 6 for name in ("net", "other"))
    assert [len(optimizer.param_groups) for optimizer in trainer.optimizers] == [2, 1]


def test_moving_average(tmp_path):
    """The file has the averaged weights that a callback leaves in the module."""
    module = seeded(Module)
    callback = DiffQCallback(lam=100.0, lr=0.1, **SMALL)
    trainer_of(tmp_path, callback, EMAWeightAveraging(decay=0.8)).fit(module, batches())
    loaded = diffq.load(tmp_path / "model.diffq", Module())
    assert same_weights(loaded, shipped(diffq.quantizer_of(module), Module()))


def test_fitted_twice(tmp_path):
    """A second fit of the same module goes on with its quantizer."""
    module, _ = fitted(tmp_path)
    quantizer = diffq.quantizer_of(module)
    bits = quantizer.bits()
    trainer = trainer_of(tmp_path, DiffQCallback(target_mb=TARGET))
    trainer.fit(module, batches())
    assert diffq.quantizer_of(module) is quantizer
    assert same_bits(quantizer.bits(), bits)


def test_without_an_end(tmp_path):
    """A target in a training without an end raises, and says what to give."""
    trainer = trainer_of(tmp_path, DiffQCallback(target_mb=TARGET, **SMALL), epochs=-1)
    with pytest.raises(diffq.ConfigError, match=r"got inf steps.*max_steps"):
        trainer.fit(seeded(Module), batches())


class Ready(Module):
    """A module whose optimizer was made before."""

    def __init__(self):
        super().__init__()
        self.ready = torch.optim.Adam(self.parameters(), 1e-2)

    def configure_optimizers(self):
        return self.ready


def test_optimizer_made_elsewhere(tmp_path):
    """An optimizer that `configure_optimizers` does not make raises."""
    with pytest.raises(diffq.OptimizerError, match="Make it in configure_optimizers"):
        fitted(tmp_path, Ready)


def test_training_that_stops_early(tmp_path):
    """A training that ends before its plan says so."""

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    trainer = trainer_of(tmp_path, DiffQCallback(target_mb=TARGET, **SMALL), Stop())
    with pytest.warns(diffq.DiffqWarning, match="ended at step 5 of the 40"):
        trainer.fit(seeded(Module), batches())


def test_neither_size_nor_price(tmp_path):
    """Without size and price the callback has nothing to do, and says so before training."""
    with pytest.raises(diffq.ConfigError, match=r"target_mb=.* or lam="):
        trainer_of(tmp_path, DiffQCallback()).fit(seeded(Module), batches())


def test_pytorch_lightning(tmp_path):
    """The package of the other name takes the same callback."""
    other = library("pytorch_lightning")

    class Old(other.LightningModule):
        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

        def __init__(self):
            super().__init__()
            self.net = network()
            self.save_hyperparameters({"schedule": "cosine", "lr": 1e-2})

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    quiet |= {"log_every_n_steps": 5}
    trainer = other.Trainer(
        max_epochs=8, callbacks=[DiffQCallback(target_mb=TARGET, **SMALL)], **quiet
    )
    trainer.fit(seeded(Old), batches())
    assert 0.97 * TARGET < megabytes(tmp_path / "model.diffq") <= TARGET
    assert math.isfinite(trainer.callback_metrics["size_mb"])
