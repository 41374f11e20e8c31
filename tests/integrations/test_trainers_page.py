"""docs/trainers.md: its code runs as written, on small models, and makes files of the size."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.integrations.tiny import gpt2, library, same_weights, shipped, texts
from tests.models import seeded, snapshot_of
from tests.processors import repeatable

library("transformers")
library("lightning")
library("accelerate")
import lightning as L  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
#: In place of the 5 MB of the page.
TARGET = 0.008


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Writes to a folder of the test, and forgets the accelerators."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(word, target=TARGET, epochs_made="range(epochs)", **names):
    """Runs the block with a word, on the names that the page takes as given; returns all names."""
    (block,) = [block for block in BLOCKS if word in block]
    code = block.replace("5.0", str(target)).replace("range(epochs)", epochs_made)
    names = {"diffq": diffq, "torch": torch, "math": math, **names}
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def has_the_size(path, target=TARGET):
    """Whether a file has the size that was asked for, as far as so few groups of weights allow."""
    return 0.9 * target < os.path.getsize(path) / 2**20 <= target


def network():
    """A network whose large weight is above `min_size`."""
    return nn.Sequential(nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 8))


class Module(L.LightningModule):
    """A module of the user."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, index):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def batches(count=10):
    """Batches of pairs of inputs and targets."""
    inputs = torch.randn(4 * count, 16, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(inputs, inputs[:, :8])
    return torch.utils.data.DataLoader(data, batch_size=4)


def test_transformers(tmp_path):
    """The block for transformers, on a model of 0.2 MB."""
    rows = [{"input_ids": row, "labels": row} for row in texts(16)]
    settings = {"max_steps": 40, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments("out", dataloader_pin_memory=False, **settings)
    model = seeded(lambda: gpt2(n_embd=64, n_layer=1))
    run("from transformers", 0.04, model=model, args=args, train_dataset=rows)
    assert has_the_size("out/model.diffq", 0.04)


def test_lightning(tmp_path):
    """The block for Lightning, and the one for the file of a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        options = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
        make = L.Trainer
        patch.setattr(L, "Trainer", lambda **given: make(**{**options, **given}))
        names = run("trainer.fit", module=seeded(Module), batches=batches())
    assert has_the_size("model.diffq")
    names["trainer"].save_checkpoint("last.ckpt")
    run("best.diffq", path="last.ckpt", Module=Module)
    best = diffq.load("best.diffq", Module())
    assert same_weights(best, diffq.load("model.diffq", Module()))


class Resumed(Accelerator):
    """Loads a checkpoint once all is prepared."""

    def prepare(self, *args, **options):
        prepared = super().prepare(*args, **options)
        if len(args) > 1:
            self.load_state("checkpoint-5")
        return prepared


def accelerated(kind, seed, made):
    """The names of the block for Accelerate, for a model of this seed and some of 8 epochs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    given = {"Accelerator": lambda **options: kind(cpu=True, **options), "epochs": 8}
    model = seeded(network, seed)
    return run("accumulate", epochs_made=made, **given, model=model, batches=batches())


@repeatable()
def test_accelerate(tmp_path):
    """The recipe for Accelerate ends with a file of the size, and resumes bit for bit."""
    whole = accelerated(Accelerator, 0, "range(8)")
    target = whole["quantizer"].target
    assert (target.step, target.steps, target.phase) == (40, 40, "done")
    assert has_the_size("model.diffq")
    file = Path("model.diffq").read_bytes()
    resumed = accelerated(Resumed, 1, "range(6, 8)")
    assert same_bits(snapshot_of(resumed["model"]), snapshot_of(whole["model"]))
    assert Path("model.diffq").read_bytes() == file


def test_hub(tmp_path):
    """The block for folders gives a plain model back."""
    model = seeded(gpt2)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    loaded = run("from_pretrained", model=model)["loaded"]
    assert same_weights(loaded, shipped(quantizer, gpt2()))
