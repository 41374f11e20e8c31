"""Compress a language model of transformers with its Trainer: one callback, a size in MB.

    python examples/transformers_trainer.py                   # a few minutes on a CPU
    python examples/transformers_trainer.py --target-mb 0.2

A small GPT-2 with tied embeddings learns the bytes of Python's own modules, without network.
Then a plain model is made from the folder that the trainer wrote, and must compute the same.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from diffq.integrations import hub
from diffq.integrations.transformers import DiffQCallback

LENGTH = 64


class Bytes(Dataset):
    """Pieces of the standard library, as bytes that are their own labels."""

    def __init__(self, size: int = 2**19) -> None:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(path.read_bytes() for path in modules)[:size]
        self.pieces = torch.tensor(list(text)).view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def make_model() -> GPT2LMHeadModel:
    """A GPT-2 of 0.4 million weights."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": LENGTH, "vocab_size": 256}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-mb", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=600, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/transformers_trainer"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    set_seed(0)
    data = Bytes()
    held_out = range(0, len(data), 50)
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=args.steps // 12,
        eval_strategy="steps",
        eval_steps=args.steps // 4,
        save_strategy="steps",
        save_steps=args.steps // 2,
        report_to=[],
    )
    trainer = Trainer(
        make_model(),
        training,
        train_dataset=Subset(data, [i for i in range(len(data)) if i % 50]),
        eval_dataset=Subset(data, held_out),
        callbacks=[DiffQCallback(target_mb=args.target_mb, noise="rounding")],
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]

    folder = args.out / f"checkpoint-{args.steps}"
    size = (folder / "model.diffq").stat().st_size / 2**20
    whole = (folder / "model.safetensors").stat().st_size / 2**20
    loaded = hub.from_pretrained(GPT2LMHeadModel, folder)
    again = Trainer(loaded, training, eval_dataset=Subset(data, held_out)).evaluate()["eval_loss"]
    print(f"{whole:.3f} MB in float32, {size:.4f} MB in {folder / 'model.diffq'}")
    print(f"loss on held out text {loss:.4f}, of the loaded model {again:.4f}")


if __name__ == "__main__":
    main()
