"""Compresses PyTorch models while they train.

opt = torch.optim.AdamW(model.parameters(), 1e-3)
quantizer = diffq.DiffQuantizer(model, group_size=8)
quantizer.setup_optimizer(opt)
...
loss = task_loss + lam * quantizer.model_size()

`from diffq import *` gives every public name but `open`, which would hide Python's own.
"""

from typing import TYPE_CHECKING

__version__ = "1.0.0.dev0"

# Each public name stands here twice: as an import for type checkers, to whom `__getattr__`
# would make every name valid, and in a table for Python. A test compares the two.
if TYPE_CHECKING:
    from diffq.activations import ActivationQuantizer as ActivationQuantizer
    from diffq.errors import AttachError as AttachError
    from diffq.errors import CalibrationError as CalibrationError
    from diffq.errors import ConfigError as ConfigError
    from diffq.errors import DiffqError as DiffqError
    from diffq.errors import DiffqWarning as DiffqWarning
    from diffq.errors import FormatError as FormatError
    from diffq.errors import MismatchError as MismatchError
    from diffq.errors import OptimizerError as OptimizerError
    from diffq.errors import StateError as StateError
    from diffq.errors import WeightError as WeightError
    from diffq.file import open_file
    from diffq.file import verify as verify
    from diffq.layers import LayerDrop as LayerDrop
    from diffq.layers import every_other_layer as every_other_layer
    from diffq.layers import every_other_layer_state as every_other_layer_state
    from diffq.layers import share_layers as share_layers
    from diffq.legacy.load import load_legacy as load_legacy
    from diffq.losses import distillation_loss as distillation_loss
    from diffq.pruning import parametrize_pruning as parametrize_pruning
    from diffq.quantizers.base import quantizer_of as quantizer_of
    from diffq.quantizers.compat import LSQ as LSQ
    from diffq.quantizers.compat import UniformQuantizer as UniformQuantizer
    from diffq.quantizers.differentiable import DiffQuantizer as DiffQuantizer
    from diffq.quantizers.lsq import LSQQuantizer as LSQQuantizer
    from diffq.quantizers.product import ProductQuantizer as ProductQuantizer
    from diffq.quantizers.qat import QATQuantizer as QATQuantizer
    from diffq.quantizers.quant_noise import QuantNoiseQuantizer as QuantNoiseQuantizer
    from diffq.restore import restore_quantized_state as restore_quantized_state
    from diffq.storage import load as load
    from diffq.storage import save as save

    open = open_file
else:
    from importlib import import_module

    # Imported on first use, so that reading a file needs no torch.
    _LAZY = {
        "ActivationQuantizer": "diffq.activations",
        "AttachError": "diffq.errors",
        "CalibrationError": "diffq.errors",
        "ConfigError": "diffq.errors",
        "DiffQuantizer": "diffq.quantizers.differentiable",
        "DiffqError": "diffq.errors",
        "DiffqWarning": "diffq.errors",
        "FormatError": "diffq.errors",
        "LSQ": "diffq.quantizers.compat",
        "LSQQuantizer": "diffq.quantizers.lsq",
        "LayerDrop": "diffq.layers",
        "MismatchError": "diffq.errors",
        "OptimizerError": "diffq.errors",
        "ProductQuantizer": "diffq.quantizers.product",
        "QATQuantizer": "diffq.quantizers.qat",
        "QuantNoiseQuantizer": "diffq.quantizers.quant_noise",
        "StateError": "diffq.errors",
        "UniformQuantizer": "diffq.quantizers.compat",
        "WeightError": "diffq.errors",
        "distillation_loss": "diffq.losses",
        "every_other_layer": "diffq.layers",
        "every_other_layer_state": "diffq.layers",
        "load": "diffq.storage",
        "load_legacy": "diffq.legacy.load",
        "open": "diffq.file",
        "parametrize_pruning": "diffq.pruning",
        "quantizer_of": "diffq.quantizers.base",
        "restore_quantized_state": "diffq.restore",
        "save": "diffq.storage",
        "share_layers": "diffq.layers",
        "verify": "diffq.file",
    }

    __all__ = sorted(_LAZY.keys() - {"open"})

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module 'diffq' has no attribute {name!r}")
        attribute = "open_file" if name == "open" else name
        return getattr(import_module(_LAZY[name]), attribute)

    def __dir__() -> list[str]:
        return [*_LAZY, *(name for name in globals() if name.startswith("__"))]
