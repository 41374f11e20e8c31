"""Compress a Lightning module to a size in MB: one callback, a network on handwritten digits.

    python examples/lightning_digits.py                     # a few minutes on a CPU
    python examples/lightning_digits.py --target-mb 0.05

The module knows nothing of quantization. After training, its network is loaded from the file
into a plain one, and must be as accurate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import diffq
from diffq.integrations.lightning import DiffQCallback
from mnist import BATCH, MIN_SIZE, ResNet, load_digits


class Digits(L.LightningModule):
    """A residual network, AdamW and a cosine schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        right = (self.net(images).argmax(dim=1) == labels).float()
        self.log("accuracy", right.mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-mb", type=float, default=0.08, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/lightning_digits"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    L.seed_everything(0)
    train_set, test_set = (TensorDataset(d.images, d.labels) for d in load_digits(0))
    batches = DataLoader(train_set, BATCH, shuffle=True)
    validation = DataLoader(test_set, 500)
    callback = DiffQCallback(target_mb=args.target_mb, noise="rounding", min_size=MIN_SIZE)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[callback],
        default_root_dir=args.out,
        logger=False,
        log_every_n_steps=10,
    )
    trainer.fit(Digits(), batches, validation)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})

    path = args.out / "model.diffq"
    loaded = diffq.load(path, Digits())
    (result,) = L.Trainer(logger=False).validate(loaded, validation, verbose=False)
    print(f"{path.stat().st_size / 2**20:.4f} MB, accuracy {result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
