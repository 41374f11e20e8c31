"""The two tasks of benchmarks/methods.py, made from the models and data of the examples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

#: Inputs and targets (int64) of a training step.
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained, and how its quality is measured.

    Attributes:
        name: of the row in the results.
        steps: training steps of each method, unless told otherwise.
        make: the model that is compressed; the student of distillation if it is passed True.
        draw: a random batch.
        evaluate: the quality, on data that training never sees.
        optimizer: for all parameters of a model.
        product: settings of product quantization by the size that it aims at.
        stages: name patterns of iterative product quantization; what is left comes last.
        lambdas: prices of one MB at which DiffQ is trained.
    """

    name: str
    steps: int
    make: Callable[[bool], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    evaluate: Callable[[nn.Module], float]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    product: dict[str, dict[str, Any]]
    stages: list[list[str]]
    lambdas: tuple[float, ...]


def language_model() -> Task:
    """A transformer of 0.12 million weights on source text; held-out bits per character."""
    import language_model as example

    train_text, valid_text = example.load_text()
    valid_text = valid_text[:100_000]

    def draw(generator: torch.Generator) -> Batch:
        sequences = example.random_sequences(train_text, generator, batch=8).long()
        return sequences[:, :-1], sequences[:, 1:]

    return Task(
        name="language-model",
        steps=540,
        make=lambda student: example.Transformer(width=32 if student else 64, layers=2),
        draw=draw,
        evaluate=lambda model: example.bits_per_character(model, valid_text),
        optimizer=example.make_optimizer,
        product={"blocks of 8": {"block_size": 8}, "blocks of 4": {"block_size": 4}},
        stages=[["*.widen.*", "*.narrow.*"], ["embed.*", "position.*"]],
        lambdas=(0.1, 1, 5, 20),
    )


def digits() -> Task:
    """A residual network of 0.31 million weights on digits; held-out accuracy in percent."""
    import mnist as example

    train_set, test_set = example.load_digits(seed=0)

    def draw(generator: torch.Generator) -> Batch:
        batch = example.random_digits(train_set, generator)
        return batch.images, batch.labels

    return Task(
        name="digits",
        steps=150,
        make=lambda student: example.ResNet(width=8 if student else 16),
        draw=draw,
        evaluate=lambda model: example.evaluate(model, test_set).accuracy,
        optimizer=example.make_optimizer,
        product={
            "blocks of 9": {"block_size": {"conv": 9}},
            "blocks of 3": {"block_size": {"conv": 3}},
        },
        stages=[["block1.*", "block2.*"], ["block3.*"]],
        lambdas=(0.1, 1, 4, 20),
    )


TASKS = {"language-model": language_model, "digits": digits}
