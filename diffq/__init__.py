"""Compresses PyTorch models while they train.

opt = torch.optim.AdamW(model.parameters(), 1e-3)
quantizer = diffq.DiffQuantizer(model, group_size=8)
quantizer.setup_optimizer(opt)
...
loss = task_loss + lam * quantizer.model_size()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffq.errors import (
    AttachError,
    ConfigError,
    DiffqError,
    FormatError,
    MismatchError,
    OptimizerError,
    StateError,
    WeightError,
)

if TYPE_CHECKING:
    from diffq.quantizers.differentiable import DiffQuantizer
    from diffq.quantizers.lsq import LSQQuantizer
    from diffq.quantizers.qat import QATQuantizer
    from diffq.restore import restore_quantized_state

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "ConfigError",
    "DiffQuantizer",
    "DiffqError",
    "FormatError",
    "LSQQuantizer",
    "MismatchError",
    "OptimizerError",
    "QATQuantizer",
    "StateError",
    "WeightError",
    "restore_quantized_state",
]

# Imported on first use, so that diffq.format works without torch.
_LAZY = {
    "DiffQuantizer": "diffq.quantizers.differentiable",
    "LSQQuantizer": "diffq.quantizers.lsq",
    "QATQuantizer": "diffq.quantizers.qat",
    "restore_quantized_state": "diffq.restore",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'diffq' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
