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
    from diffq.file import open_file as open
    from diffq.file import verify
    from diffq.quantizers.base import quantizer_of
    from diffq.quantizers.differentiable import DiffQuantizer
    from diffq.quantizers.lsq import LSQQuantizer
    from diffq.quantizers.qat import QATQuantizer
    from diffq.restore import restore_quantized_state
    from diffq.storage import load, save

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
    "load",
    "open",
    "quantizer_of",
    "restore_quantized_state",
    "save",
    "verify",
]

# Imported on first use, so that reading a file needs no torch: name to module and attribute.
_LAZY = {
    "DiffQuantizer": ("diffq.quantizers.differentiable", "DiffQuantizer"),
    "LSQQuantizer": ("diffq.quantizers.lsq", "LSQQuantizer"),
    "QATQuantizer": ("diffq.quantizers.qat", "QATQuantizer"),
    "load": ("diffq.storage", "load"),
    "open": ("diffq.file", "open_file"),
    "quantizer_of": ("diffq.quantizers.base", "quantizer_of"),
    "restore_quantized_state": ("diffq.restore", "restore_quantized_state"),
    "save": ("diffq.storage", "save"),
    "verify": ("diffq.file", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'diffq' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
