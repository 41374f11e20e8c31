"""Lightning: fitting, checkpoints, resuming, both kinds of optimization, averaged weights."""

from functools import partial

import pytest
import torch
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.integrations.tiny import EXTRAS, evaluates_as_shipped, floats, library, shipped
from tests.models import QUANTIZERS, mlp, seeded, snapshot_of
from tests.processors import repeatable

library("lightning")
import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    StochasticWeightAveraging,
)


class Compressing(L.LightningModule):
    """A module whose network is attached when it is made, as in the documentation."""

    def __init__(self, kind="diffq", automatic=True):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = automatic
        self.net = mlp()
        self.quantizer = QUANTIZERS[kind](self.net)

    def training_step(self, batch, index):
        loss = self.net(batch).square().mean() + 100 * self.quantizer.model_size()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
        self.quantizer.setup_optimizer(optimizer, lr=0.1)
        return optimizer


def batches():
    """Two batches, the same at each call."""
    data = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(data, batch_size=4)


def trainer_of(folder, epochs=2, **options):
    """A trainer on the CPU that writes only where it is told to."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    return L.Trainer(max_epochs=epochs, default_root_dir=folder, **{**quiet, **settings, **options})


@pytest.mark.parametrize("automatic", [True, False])
def test_fit(automatic, tmp_path):
    """Both kinds of optimization train weights and bits, and validate what the file holds."""
    module = seeded(lambda: Compressing(automatic=automatic))
    before = floats(module)
    trainer = trainer_of(tmp_path)
    trainer.fit(module, batches())
    assert not close(floats(module), before)
    assert module.quantizer.mean_bits() < 8
    assert evaluates_as_shipped(module.net, mlp, torch.randn(5, 16))
    (measured,) = trainer.validate(module, batches(), verbose=False)
    plain = shipped(module.quantizer, mlp())
    losses = [plain(batch).square().mean().item() for batch in batches()]
    assert measured["val_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_both_optimizations_agree(tmp_path):
    """Manual optimization does what automatic optimization does."""
    modules = []
    for automatic in (True, False):
        module = seeded(partial(Compressing, "diffq-rounding", automatic))
        trainer_of(tmp_path, 1, limit_train_batches=1).fit(module, batches())
        modules.append(module)
    assert close(floats(modules[0]), floats(modules[1]))


@repeatable()
@pytest.mark.parametrize("kind", ["diffq-rounding", "lsq"])
def test_resume(kind, tmp_path):
    """A fit that goes on from a checkpoint ends as the uninterrupted one does."""
    whole = seeded(lambda: Compressing(kind))
    trainer_of(tmp_path, 4).fit(whole, batches())
    half = seeded(lambda: Compressing(kind))
    trainer = trainer_of(tmp_path, 2)
    trainer.fit(half, batches())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = seeded(lambda: Compressing(kind), 1)
    trainer_of(tmp_path, 4).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert same_bits(snapshot_of(resumed), snapshot_of(whole))
    assert not close(floats(resumed), floats(half))


@pytest.mark.parametrize("kind", ["diffq", "qat", "product"])
def test_load_from_checkpoint(kind, tmp_path):
    """A checkpoint alone gives the attached module back, and the plain network its weights."""
    module = seeded(lambda: Compressing(kind))
    trainer = trainer_of(tmp_path)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    loaded = Compressing.load_from_checkpoint(tmp_path / "module.ckpt", map_location="cpu")
    assert same_bits(snapshot_of(loaded), snapshot_of(module))
    assert same_bits(loaded.quantizer.bits(), module.quantizer.bits())
    assert evaluates_as_shipped(loaded.net, mlp, torch.randn(5, 16))
    state = torch.load(tmp_path / "module.ckpt", weights_only=True)["state_dict"]
    names = {f"net.{name}" for name in mlp().state_dict()}
    assert names <= set(state) <= names | {f"net.{name}" for name in EXTRAS}
    plain = {name: state[f"net.{name}"] for name in mlp().state_dict()}
    assert same_bits(plain, dict(module.quantizer.detach().state_dict()))


class Record(L.Callback):
    """Keeps the weights before each epoch and after each step."""

    def __init__(self):
        self.epochs, self.steps = [], []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append(floats(module))

    def on_train_batch_end(self, trainer, module, *rest):
        self.steps.append(floats(module))


def test_stochastic_weight_averaging(tmp_path):
    """The callback leaves the mean of the epochs' weights, which eval quantizes."""
    module, record = seeded(Compressing), Record()
    averaging = StochasticWeightAveraging(
        swa_lrs=[1e-2, 0.1], swa_epoch_start=1, annealing_epochs=1, device=None
    )
    trainer_of(tmp_path, 4, callbacks=[record, averaging]).fit(module, batches())
    states = record.epochs[averaging.swa_start :]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    assert len(states) > 2
    assert close(floats(module), mean)
    assert not close(mean, states[-1])
    assert evaluates_as_shipped(module.net, mlp, torch.randn(5, 16))


@pytest.mark.parametrize("buffers", [True, False])
def test_exponential_moving_average(buffers, tmp_path):
    """The callback leaves the moving average of weights and logits, which eval quantizes."""
    module, record = seeded(Compressing), Record()
    averaging = EMAWeightAveraging(decay=0.8, use_buffers=buffers)
    trainer_of(tmp_path, 3, callbacks=[record, averaging]).fit(module, batches())
    average = dict(record.steps[0])
    for state in record.steps[1:]:
        average = {name: 0.8 * average[name] + 0.2 * state[name] for name in average}
    assert len(record.steps) == 6
    assert close(floats(module), average)
    assert not close(average, record.steps[-1])
    assert evaluates_as_shipped(module.net, mlp, torch.randn(5, 16))


class Mixing(L.LightningModule):
    """A module with a parameter of its own, that a step reads and no forward does."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.quantizer = QUANTIZERS["diffq"](self)

    def mixed(self, x):
        with self.quantizer.computing():
            return x @ self.mix

    def training_step(self, batch, index):
        return self.mixed(batch).square().mean() + 100 * self.quantizer.model_size()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam([self.mix], 1e-2)
        self.quantizer.setup_optimizer(optimizer, lr=0.1)
        return optimizer


def test_parameters_of_the_module_itself(tmp_path):
    """Within `computing()`, a step reads noisy weights and eval quantized ones."""
    module = seeded(Mixing)
    before = floats(module)
    trainer_of(tmp_path).fit(module, batches())
    assert not close(floats(module), before)
    assert diffq.quantizer_of(module).mean_bits() < 8
    x, file = torch.randn(3, 16), module.quantizer.get_quantized_state()
    stored = diffq.restore_quantized_state(nn.ParameterDict({"mix": torch.zeros(16, 16)}), file)
    with torch.no_grad():
        assert close(module.eval().mixed(x), x @ stored["mix"])
        assert not close(module.mixed(x), x @ module.mix)
