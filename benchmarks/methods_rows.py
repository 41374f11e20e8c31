"""The methods that benchmarks/methods.py compares, each as phases of one training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

import diffq
from diffq.quantizers.base import BaseQuantizer
from methods_tasks import Task

#: MB; smaller parameters than this stay in float32.
MIN_SIZE = 0.003
BITS = (2, 3, 4, 8)
CODEBOOK = 64

Attach = Callable[[nn.Module], BaseQuantizer]

#: Quantizes nothing, so that float32 models are saved, loaded and trained as all others.
float32: Attach = partial(diffq.QATQuantizer, min_size=1e6)


@dataclass(frozen=True)
class Phase:
    """A part of a training; each starts from the weights of the one before.

    Attributes:
        share: of the steps.
        attach: makes the quantizer.
        extras_lr: learning rate of what the quantizer learns.
        lam: price of one MB.
        staged: fixes the next tensors of a `ProductQuantizer` every third of the phase.
        pruned: the smaller half of each large tensor is pruned before the phase.
        distilled: the loss is that of distillation from the trained float32 model.
        activations: inputs of layers are rounded to 8 bits in the end.
    """

    share: float
    attach: Attach = float32
    extras_lr: float = 1e-3
    lam: float = 0.0
    staged: bool = False
    pruned: bool = False
    distilled: bool = False
    activations: bool = False


@dataclass(frozen=True)
class Row:
    """A method: its phases take all steps together; `student` says that the model is smaller."""

    family: str
    setting: str
    phases: tuple[Phase, ...]
    student: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}, {self.setting}" if self.setting else self.family


WHOLE = Phase(1)
FIRST = Phase(2 / 3)


def rows_of(task: Task) -> list[Row]:
    return [Row("float32", "", (WHOLE, Phase(0))), *scalar(task), *product(task), *subsets()]


def scalar(task: Task) -> list[Row]:
    """Fixed bitwidths, then learned ones."""
    rows = []
    for bits in BITS:
        width, options = f"{bits} bits", {"bits": bits, "min_size": MIN_SIZE}
        after = Phase(0, partial(diffq.QATQuantizer, training=False, **options))
        qat = Phase(1, partial(diffq.QATQuantizer, **options))
        noise = Phase(1, partial(diffq.QuantNoiseQuantizer, p=0.1, **options))
        lsq = Phase(1 / 3, partial(diffq.LSQQuantizer, **options), extras_lr=1e-4)
        rows += [
            Row("post-training", width, (WHOLE, after)),
            Row("QAT", width, (qat,)),
            Row("Quant-Noise", width, (noise,)),
            Row("LSQ", width, (FIRST, lsq)),
        ]
    half = partial(diffq.QuantNoiseQuantizer, p=0.5, bits=4, min_size=MIN_SIZE)
    rows.append(Row("Quant-Noise p=0.5", "4 bits", (Phase(1, half),)))
    for noise_kind in ("gaussian", "rounding"):
        attach = partial(diffq.DiffQuantizer, noise=noise_kind, group_size=8, min_size=MIN_SIZE)
        rows += [
            Row(f"DiffQ {noise_kind}", f"λ {lam:g}", (Phase(1, attach, extras_lr=0.1, lam=lam),))
            for lam in task.lambdas
        ]
    return rows


def product(task: Task) -> list[Row]:
    """Product quantization, from after the training to iterative with noise and int8."""
    rows = []
    for name, blocks in task.product.items():
        attach = partial(
            diffq.ProductQuantizer,
            codebook_size=CODEBOOK,
            stages=task.stages,
            min_size=MIN_SIZE,
            **blocks,
        )
        noisy, staged = Phase(2 / 3, attach), Phase(1 / 3, attach, staged=True)
        quiet = partial(attach, p=0)
        eighths = replace(staged, attach=partial(attach, centroids="int8"))
        rows += [
            Row("PQ", name, (WHOLE, Phase(0, quiet))),
            Row("iPQ", name, (FIRST, replace(staged, attach=quiet))),
            Row("iPQ with noise", name, (noisy, staged)),
            Row("iPQ with noise, int8 centroids", name, (noisy, eighths)),
            Row(
                "iPQ with noise, int8 centroids and activations",
                name,
                (noisy, replace(eighths, activations=True)),
            ),
        ]
    return rows


def subsets() -> list[Row]:
    """All subsets of quantization, pruning and distillation."""
    rows = []
    for number in range(8):
        quantized, pruned, distilled = (bool(number & bit) for bit in (1, 2, 4))
        parts = [name for name, used in (("Q", quantized), ("P", pruned), ("D", distilled)) if used]
        last = Phase(1 / 3, pruned=pruned, distilled=distilled)
        if quantized:
            last = replace(last, attach=partial(diffq.QATQuantizer, bits=4, min_size=MIN_SIZE))
        first = replace(FIRST, distilled=distilled)
        rows.append(Row("subset", "+".join(parts) or "none", (first, last), student=distilled))
    return rows
