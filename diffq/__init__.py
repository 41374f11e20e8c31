"""Compresses PyTorch models while they train.

opt = torch.optim.AdamW(model.parameters(), 1e-3)
quantizer = diffq.DiffQuantizer(model, group_size=8)
quantizer.setup_optimizer(opt)
...
loss = task_loss + lam * quantizer.model_size()

`from diffq import *` gives every public name but `open`, which would hide Python's own, and the
module `plot`.
"""

from typing import TYPE_CHECKING

__version__ = "1.0.0.dev0"

# Each public name stands here twice: as an import for type checkers, to whom `__getattr__`
# would make every name valid, and in a table for Python. A test compares the two.
if TYPE_CHECKING:
    from diffq import export as export
    from diffq import plot as plot
    from diffq.attach.pruning import parametrize_pruning as parametrize_pruning
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
    from diffq.nn.activations import ActivationQuantizer as ActivationQuantizer
    from diffq.nn.layers import LayerDrop as LayerDrop
    from diffq.nn.layers import every_other_layer as every_other_layer
    from diffq.nn.layers import every_other_layer_state as every_other_layer_state
    from diffq.nn.layers import share_layers as share_layers
    from diffq.nn.losses import distillation_loss as distillation_loss
    from diffq.ptq.checkpoint import quantize_checkpoint as quantize_checkpoint
    from diffq.ptq.sensitivity import sensitivity as sensitivity
    from diffq.quantizers.base import quantizer_of as quantizer_of
    from diffq.quantizers.diffq import DiffQuantizer as DiffQuantizer
    from diffq.quantizers.earlier import LSQ as LSQ
    from diffq.quantizers.earlier import UniformQuantizer as UniformQuantizer
    from diffq.quantizers.entropy import EntropyQuantizer as EntropyQuantizer
    from diffq.quantizers.lsq import LSQQuantizer as LSQQuantizer
    from diffq.quantizers.product.quantizer import ProductQuantizer as ProductQuantizer
    from diffq.quantizers.qat import QATQuantizer as QATQuantizer
    from diffq.quantizers.quant_noise import QuantNoiseQuantizer as QuantNoiseQuantizer
    from diffq.storage.legacy.load import load_legacy as load_legacy
    from diffq.storage.open import open_file
    from diffq.storage.open import verify as verify
    from diffq.storage.restore import restore_quantized_state as restore_quantized_state
    from diffq.storage.save import load as load
    from diffq.storage.save import save as save

    open = open_file
else:
    from importlib import import_module

    # Imported on first use, so that reading a file needs no torch.
    _LAZY = {
        "ActivationQuantizer": "diffq.nn.activations",
        "AttachError": "diffq.errors",
        "CalibrationError": "diffq.errors",
        "ConfigError": "diffq.errors",
        "DiffQuantizer": "diffq.quantizers.diffq",
        "DiffqError": "diffq.errors",
        "DiffqWarning": "diffq.errors",
        "EntropyQuantizer": "diffq.quantizers.entropy",
        "FormatError": "diffq.errors",
        "LSQ": "diffq.quantizers.earlier",
        "LSQQuantizer": "diffq.quantizers.lsq",
        "LayerDrop": "diffq.nn.layers",
        "MismatchError": "diffq.errors",
        "OptimizerError": "diffq.errors",
        "ProductQuantizer": "diffq.quantizers.product.quantizer",
        "QATQuantizer": "diffq.quantizers.qat",
        "QuantNoiseQuantizer": "diffq.quantizers.quant_noise",
        "StateError": "diffq.errors",
        "UniformQuantizer": "diffq.quantizers.earlier",
        "WeightError": "diffq.errors",
        "distillation_loss": "diffq.nn.losses",
        "every_other_layer": "diffq.nn.layers",
        "every_other_layer_state": "diffq.nn.layers",
        "load": "diffq.storage.save",
        "load_legacy": "diffq.storage.legacy.load",
        "open": "diffq.storage.open",
        "parametrize_pruning": "diffq.attach.pruning",
        "quantize_checkpoint": "diffq.ptq.checkpoint",
        "quantizer_of": "diffq.quantizers.base",
        "restore_quantized_state": "diffq.storage.restore",
        "save": "diffq.storage.save",
        "sensitivity": "diffq.ptq.sensitivity",
        "share_layers": "diffq.nn.layers",
        "verify": "diffq.storage.open",
    }

    # Packages whose functions keep their name: diffq.export.onnx.
    _PACKAGES = ("export", "plot")

    __all__ = sorted({*_LAZY, *_PACKAGES} - {"open"})

    def __getattr__(name: str) -> object:
        if name in _PACKAGES:
            return import_module(f"diffq.{name}")
        if name not in _LAZY:
            raise AttributeError(f"module 'diffq' has no attribute {name!r}")
        attribute = "open_file" if name == "open" else name
        return getattr(import_module(_LAZY[name]), attribute)

    def __dir__() -> list[str]:
        return [*_LAZY, *_PACKAGES, *(name for name in globals() if name.startswith("__"))]
