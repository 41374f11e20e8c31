"""What benchmarks/training.py compares: contenders, and the models that each trains.

Data only, without diffq: the driver reads it, and workers with either package do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from models import EfficientNet, Recurrent, ResNet, Transformer, image_batch, token_batch


@dataclass(frozen=True)
class Contender:
    """A row of the table: plain training, or with a quantizer.

    Attributes:
        quantizer: name of the class in `diffq`; None for plain training.
        options: its arguments.
        earlier: it is that of the earlier package.
    """

    quantizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    earlier: bool = False


def _diffq(group_size: int, earlier: bool = False, **options: Any) -> Contender:
    return Contender("DiffQuantizer", {"group_size": group_size, **options}, earlier)


CONTENDERS = {
    "plain": Contender(),
    "qat": Contender("QATQuantizer"),
    "lsq": Contender("LSQQuantizer"),
    "entropy": Contender("EntropyQuantizer"),
    "diffq-g1": _diffq(1),
    "diffq-g8": _diffq(8),
    "diffq-g64": _diffq(64),
    "diffq-tensor": _diffq(0),
    "diffq-g8-rounding": _diffq(8, noise="rounding"),
    "earlier-qat": Contender("UniformQuantizer", {"qat": True}, earlier=True),
    "earlier-g1": _diffq(1, earlier=True),
    "earlier-g8": _diffq(8, earlier=True),
    "earlier-tensor": _diffq(0, earlier=True),
}


@dataclass(frozen=True)
class Case:
    """A model, its batch, and how it runs.

    Attributes:
        min_size: parameters of up to this many MB are not quantized; 0.01 is the default of
            both packages.
        bfloat16: forward and loss run under autocast to it.
        compiled: the model runs through `torch.compile`.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    min_size: float = 0.01
    bfloat16: bool = False
    compiled: bool = False


# The language model of the DiffQ paper, after Baevski and Auli (2019): 16 layers, 247M
# parameters, and the 267,744 words of Wikitext-103 in three bands.
_BANDS = ((20_000, 1024), (40_000, 256), (207_744, 64))
_paper = partial(
    Case,
    partial(Transformer, _BANDS, width=1024, layers=16, heads=8, context=512),
    partial(token_batch, 267_744, 8, 512),
)

CASES = {
    "transformer-2x128": Case(Transformer, partial(token_batch, 8192, 2, 128)),
    "transformer-8x128": Case(Transformer, partial(token_batch, 8192, 8, 128)),
    "resnet18": Case(ResNet, partial(image_batch, 10, 8, 32)),
    # With this limit, 236 tensors are quantized.
    "efficientnet": Case(EfficientNet, partial(image_batch, 100, 8, 32), min_size=0.001),
    "lstm": Case(Recurrent, partial(token_batch, 256, 8, 64)),
}

#: On a GPU only.
BIG_CASES = {
    "paper-float32": _paper(),
    "paper-bfloat16": _paper(bfloat16=True),
    "paper-float32-compiled": _paper(compiled=True),
    "paper-bfloat16-compiled": _paper(bfloat16=True, compiled=True),
}

#: What a GPU trains by default, the most telling first: the last ones may find no time.
GPU_CASES = ("transformer-8x128", "efficientnet", "paper-bfloat16", "resnet18", "lstm")

#: Takes no time, and shows nothing but that the benchmark works.
TINY_CASES = {
    "tiny": Case(
        partial(Transformer, ((32, 16),), width=16, layers=1, heads=2),
        partial(token_batch, 32, 2, 8),
        min_size=0,
    ),
}

ALL_CASES = {**CASES, **BIG_CASES, **TINY_CASES}
