"""What the examples share: the training loop, the saved file and the table of results."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import diffq

MEGABYTE = 2**20

console = Console()

Quantizer = diffq.DiffQuantizer | diffq.EntropyQuantizer | diffq.QATQuantizer


@dataclass(frozen=True)
class Method:
    """A row of the table: the quantizer to attach and the size to train to.

    Attributes:
        name: of the row.
        quantizer: makes the quantizer of a model; None trains plain float32.
        setup: arguments of its `setup_optimizer`, such as a size by name.
        lam: price of one MB in the loss; 0 where `setup` has a size or a price.
    """

    name: str
    quantizer: Callable[[nn.Module], Quantizer] | None = None
    setup: dict[str, Any] = field(default_factory=dict)
    lam: float = 0.0


def make_parser(
    description: str | None, *, steps: int, out: Path, bits_lr: float | None = None
) -> argparse.ArgumentParser:
    """A parser with the options of all examples that train with one seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_options(parser, steps, bits_lr)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of weights, batches and noise (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=out, help="folder to write to (default: %(default)s)"
    )
    return parser


def add_training_options(
    parser: argparse.ArgumentParser, steps: int, bits_lr: float | None
) -> None:
    """Options of a training and its quantizer, with their defaults."""
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        help="training steps of each method (default: %(default)s)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=8,
        help="weights that share a bitwidth: small groups adapt better, but their bitwidths "
        "take space in the file (default: %(default)s)",
    )
    parser.add_argument(
        "--small-bits",
        type=int,
        default=8,
        help="bitwidth of small tensors such as biases and norms, or 0 to keep them in float32 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--bits-lr",
        type=float,
        default=bits_lr,
        help="learning rate of the bitwidths: high for short trainings (default: "
        f"{bits_lr or 'one that fits the steps'})",
    )


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Linear warm-up, then a cosine to zero; every parameter group follows it."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def fit(
    method: Method,
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    task_loss: Callable[[nn.Module, torch.Generator], Tensor],
    *,
    seed: int,
    steps: int,
    warmup: int,
) -> tuple[nn.Module, Quantizer | None]:
    """Trains a model with a method; `task_loss` draws its batches from the generator."""
    torch.manual_seed(seed)
    model = make_model()
    quantizer = method.quantizer(model) if method.quantizer else None
    optimizer = make_optimizer(model)
    if quantizer is not None:
        quantizer.setup_optimizer(optimizer, **method.setup)
    batches = torch.Generator().manual_seed(seed)
    train(
        method.name,
        lambda: task_loss(model, batches),
        optimizer,
        quantizer,
        lam=method.lam,
        steps=steps,
        warmup=warmup,
    )
    return model, quantizer


def train(
    title: str,
    task_loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    quantizer: Quantizer | None,
    *,
    lam: float,
    steps: int,
    warmup: int,
) -> None:
    """Minimizes `task_loss() + lam * model size in MB`; `task_loss` draws its own batches.

    With a target, or a price in the step, `lam` is 0 here.
    """
    schedule = warmup_cosine(optimizer, steps, warmup)
    with make_progress() as progress:
        task = progress.add_task(title, total=steps, status="")
        for _ in range(steps):
            loss = task_loss()
            status = f"loss {loss.item():.3f}"
            if quantizer is not None:
                size = quantizer.model_size()
                status += f"  size {size.item():.3f} MB"
                if lam:
                    loss = loss + lam * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, status=status)


def save(model: nn.Module, quantizer: Quantizer | None, folder: Path, name: str) -> Path:
    """Writes what has to be shipped to use the model; returns the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.lower().replace(' ', '_')}.{'diffq' if quantizer else 'pt'}"
    if quantizer is None:
        torch.save(model.state_dict(), path)
    else:
        diffq.save(quantizer, path)
    return path


def megabytes(path: Path) -> float:
    """Size of a file."""
    return path.stat().st_size / MEGABYTE


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints the results: names to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def make_progress(visible: bool = True) -> Progress:
    """A progress bar with a status behind it."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not visible,
    )
