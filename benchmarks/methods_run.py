"""Trains one row of benchmarks/methods.py, and measures the file that it leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import diffq
from common import MEGABYTE, train
from diffq.quantizers.base import BaseQuantizer
from methods_rows import MIN_SIZE, WHOLE, Phase, Row
from methods_tasks import Task

#: Peak learning rate of later phases, as a part of that of the first.
FINETUNE = 0.5
CALIBRATION_BATCHES = 10

State = dict[str, Tensor]


@dataclass
class Runner:
    """Runs rows of one task; what rows have in common is trained once.

    The n-th phase of every row draws the same batches.
    """

    task: Task
    seed: int
    steps: int
    folder: Path
    _states: dict[tuple[bool, tuple[Phase, ...]], State] = field(default_factory=dict)

    def run(self, row: Row) -> dict[str, Any]:
        """The row's quality, as loaded from its file, and the bytes of the file."""
        start = time.perf_counter()
        model = self._model_after(row.student, row.phases[:-1])
        quantizer = self._train(model, row.phases, row.name)
        path = self.folder / "model.diffq"
        size = diffq.save(quantizer, path)
        restored = self.task.make(row.student)
        if row.phases[-1].activations:
            diffq.ActivationQuantizer(restored)
        diffq.load(path, restored)
        return {
            "quality": self.task.evaluate(restored),
            "bytes": size,
            "mean_bits": 32.0 if math.isnan(bits := quantizer.mean_bits()) else bits,
            "seconds": time.perf_counter() - start,
        }

    def _model_after(self, student: bool, phases: tuple[Phase, ...]) -> nn.Module:
        """A plain model with the weights that these phases trained."""
        torch.manual_seed(self.seed)
        model = self.task.make(student)
        if phases:
            if (student, phases) not in self._states:
                trained = self._model_after(student, phases[:-1])
                self._train(trained, phases, "what rows share").detach()
                self._states[student, phases] = trained.state_dict()
            model.load_state_dict(self._states[student, phases])
        return model

    def _train(self, model: nn.Module, phases: tuple[Phase, ...], title: str) -> BaseQuantizer:
        """Trains the last of the phases; the model is the result of the others."""
        phase, seed = phases[-1], 1000 * self.seed + len(phases)
        teacher = self._model_after(False, (WHOLE,)).eval() if phase.distilled else None
        torch.manual_seed(seed)
        if phase.pruned:
            prune_half(model)
        activations = diffq.ActivationQuantizer(model) if phase.activations else None
        quantizer = phase.attach(model)
        batches = torch.Generator().manual_seed(seed)
        steps = round(phase.share * self.steps)
        if steps:
            optimizer = self.task.optimizer(model)
            quantizer.setup_optimizer(optimizer, lr=phase.extras_lr)
            for group in optimizer.param_groups:
                group["lr"] *= FINETUNE if len(phases) > 1 else 1
            loss = self._loss(model, teacher, batches)
            if phase.staged:
                loss = in_stages(loss, quantizer, steps)
            train(title, loss, optimizer, quantizer, lam=phase.lam, steps=steps, warmup=steps // 10)
        model.eval()
        if activations is not None:
            with activations.calibrate():
                for _ in range(CALIBRATION_BATCHES):
                    model(self.task.draw(batches)[0])
        return quantizer

    def _loss(
        self, model: nn.Module, teacher: nn.Module | None, batches: torch.Generator
    ) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            inputs, targets = self.task.draw(batches)
            logits = model(inputs)
            if teacher is None:
                return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
            with torch.no_grad():
                taught = teacher(inputs)
            return diffq.distillation_loss(logits, taught, targets)

        return loss


def prune_half(model: nn.Module) -> None:
    """Holds the smaller half of each large matrix or kernel at zero."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1 and 4 * weight.numel() > MIN_SIZE * MEGABYTE:
            prune.l1_unstructured(module, "weight", amount=0.5)
    diffq.parametrize_pruning(model)


def in_stages(
    loss: Callable[[], Tensor], quantizer: diffq.ProductQuantizer, steps: int
) -> Callable[[], Tensor]:
    """The loss, with a stage of iterative product quantization before some of the steps."""
    count = len(quantizer.stages)
    due = [stage * steps // count for stage in range(count)]
    step = -1

    def staged() -> Tensor:
        nonlocal step
        step += 1
        for _ in range(due.count(step)):
            quantizer.quantize_stage()
        return loss()

    return staged
