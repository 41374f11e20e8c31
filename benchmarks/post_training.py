"""Quality at equal file sizes, by what chooses the bitwidths after training in float32.

python benchmarks/post_training.py --task digits --seed 0
python benchmarks/post_training.py --task text --seed 0

Bitwidths are chosen by squared error alone, by the second moments of the Adam that trained,
and by losses that `diffq.sensitivity` measured on training data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffq

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import language_model
import mnist
from common import train

VALIDATION_BYTES = 60_000
MEASURED_BATCHES = 4


@dataclass(frozen=True)
class Task:
    """A model to train, and what is measured.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        training_loss: the loss of the next batch.
        quality: of a model on data that was not trained on.
        batches: training data that sensitivity is measured on.
        loss: the loss of one of the batches.
        steps: steps of training.
        warmup: the first of them, in which the learning rate rises.
        sizes: MB of the files.
        min_size: MB above which tensors are quantized.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    training_loss: Callable[[], Tensor]
    quality: Callable[[nn.Module], dict[str, float]]
    batches: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    steps: int
    warmup: int
    sizes: tuple[float, ...]
    min_size: float


def digits(seed: int) -> Task:
    """The residual network of `make demo`."""
    train_set, test_set = mnist.load_digits(seed)
    torch.manual_seed(seed)
    model = mnist.ResNet()
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def quality(model: nn.Module) -> dict[str, float]:
        logits = model.eval()(test_set.images)
        right = (logits.argmax(dim=1) == test_set.labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, test_set.labels).item(), "accuracy": 100 * right}

    return Task(
        model=model,
        optimizer=mnist.make_optimizer(model),
        training_loss=lambda: mnist.training_loss(model, train_set, generator),
        quality=quality,
        batches=[
            (train_set.images[start : start + 250], train_set.labels[start : start + 250])
            for start in range(0, 250 * MEASURED_BATCHES, 250)
        ],
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        steps=500,
        warmup=20,
        sizes=(0.06, 0.08, 0.1, 0.13),
        min_size=mnist.MIN_SIZE,
    )


def text(seed: int) -> Task:
    """The language model of `examples/language_model.py` at width 64, with 2 layers."""
    train_text, valid_text = language_model.load_text()
    torch.manual_seed(seed)
    model = language_model.Transformer(64, 2)
    generator, other = (torch.Generator().manual_seed(seed + more) for more in (0, 1000))
    valid_text = valid_text[:VALIDATION_BYTES]
    draw = language_model.random_sequences
    return Task(
        model=model,
        optimizer=language_model.make_optimizer(model),
        training_loss=lambda: language_model.nats(model, draw(train_text, generator, 8)),
        quality=lambda model: {
            "bits_per_character": language_model.bits_per_character(model, valid_text)
        },
        batches=[draw(train_text, other, 32) for _ in range(MEASURED_BATCHES)],
        loss=language_model.nats,
        steps=1200,
        warmup=100,
        sizes=(0.03, 0.04, 0.05, 0.07),
        min_size=0.001,
    )


TASKS = {"digits": digits, "text": text}


def run(task: Task) -> list[dict[str, Any]]:
    """Trains, then one row for float32 and one for each size and way."""
    train(
        "float32",
        task.training_loss,
        task.optimizer,
        None,
        lam=0,
        steps=task.steps,
        warmup=task.warmup,
    )
    rows: list[dict[str, Any]] = [{"chosen by": "float32", **task.quality(task.model)}]
    measured = diffq.sensitivity(task.model, task.batches, task.loss, min_size=task.min_size)
    print(measured, file=sys.stderr)
    ways = {"squared error": None, "Adam": task.optimizer, "losses": measured}
    chosen = {
        (size, way): diffq.quantize_checkpoint(
            task.model.state_dict(), size, sensitivity=source, min_size=task.min_size
        )
        for size in task.sizes
        for way, source in ways.items()
    }
    for (size, way), quantized in chosen.items():
        task.model.load_state_dict(quantized.state_dict())
        found = {"target_mb": size, "file_mb": quantized.size_mb, **task.quality(task.model)}
        rows.append({"chosen by": way, **found})
    return rows


def main() -> None:
    """Prints a JSON object for each row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for row in run(TASKS[args.task](args.seed)):
        print(json.dumps({"task": args.task, "seed": args.seed, **row}))


if __name__ == "__main__":
    main()
