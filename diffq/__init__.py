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
    CalibrationError,
    ConfigError,
    DiffqError,
    DiffqWarning,
    FormatError,
    MismatchError,
    OptimizerError,
    StateError,
    WeightError,
)

if TYPE_CHECKING:
    from diffq.activations import ActivationQuantizer
    from diffq.file import open_file as open
    from diffq.file import verify
    from diffq.layers import (
        LayerDrop,
        every_other_layer,
        every_other_layer_state,
        share_layers,
    )
    from diffq.legacy.load import load_legacy
    from diffq.losses import distillation_loss
    from diffq.pruning import parametrize_pruning
    from diffq.quantizers.base import quantizer_of
    from diffq.quantizers.compat import LSQ, UniformQuantizer
    from diffq.quantizers.differentiable import DiffQuantizer
    from diffq.quantizers.lsq import LSQQuantizer
    from diffq.quantizers.product import ProductQuantizer
    from diffq.quantizers.qat import QATQuantizer
    from diffq.quantizers.quant_noise import QuantNoiseQuantizer
    from diffq.restore import restore_quantized_state
    from diffq.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantizer",
    "AttachError",
    "CalibrationError",
    "ConfigError",
    "DiffQuantizer",
    "DiffqError",
    "DiffqWarning",
    "FormatError",
    "LSQ",
    "LSQQuantizer",
    "LayerDrop",
    "MismatchError",
    "OptimizerError",
    "ProductQuantizer",
    "QATQuantizer",
    "QuantNoiseQuantizer",
    "StateError",
    "UniformQuantizer",
    "WeightError",
    "distillation_loss",
    "every_other_layer",
    "every_other_layer_state",
    "load",
    "load_legacy",
    "open",
    "parametrize_pruning",
    "quantizer_of",
    "restore_quantized_state",
    "save",
    "share_layers",
    "verify",
]

# Imported on first use, so that reading a file needs no torch: name to module and attribute.
_LAZY = {
    "ActivationQuantizer": ("diffq.activations", "ActivationQuantizer"),
    "DiffQuantizer": ("diffq.quantizers.differentiable", "DiffQuantizer"),
    "LSQ": ("diffq.quantizers.compat", "LSQ"),
    "LSQQuantizer": ("diffq.quantizers.lsq", "LSQQuantizer"),
    "LayerDrop": ("diffq.layers", "LayerDrop"),
    "ProductQuantizer": ("diffq.quantizers.product", "ProductQuantizer"),
    "QATQuantizer": ("diffq.quantizers.qat", "QATQuantizer"),
    "QuantNoiseQuantizer": ("diffq.quantizers.quant_noise", "QuantNoiseQuantizer"),
    "UniformQuantizer": ("diffq.quantizers.compat", "UniformQuantizer"),
    "distillation_loss": ("diffq.losses", "distillation_loss"),
    "every_other_layer": ("diffq.layers", "every_other_layer"),
    "every_other_layer_state": ("diffq.layers", "every_other_layer_state"),
    "load": ("diffq.storage", "load"),
    "load_legacy": ("diffq.legacy.load", "load_legacy"),
    "open": ("diffq.file", "open_file"),
    "parametrize_pruning": ("diffq.pruning", "parametrize_pruning"),
    "quantizer_of": ("diffq.quantizers.base", "quantizer_of"),
    "restore_quantized_state": ("diffq.restore", "restore_quantized_state"),
    "save": ("diffq.storage", "save"),
    "share_layers": ("diffq.layers", "share_layers"),
    "verify": ("diffq.file", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'diffq' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
