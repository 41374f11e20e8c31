"""A callback that compresses a module of Lightning while it trains.

Lightning calls back too late: a module's optimizers come with their schedulers, from one method of
the module. So the callback listens while that method makes an optimizer, and gives it the group of
the bitwidths at once, before a scheduler is made of it.

| when | what |
| --- | --- |
| `setup` and `configure_model` have run | a quantizer is attached, before checkpoints load |
| `configure_optimizers` makes an optimizer | it learns the bitwidths |
| a batch that Lightning logs ends | size, mean bitwidth and price are logged |
| `fit` ends | the file is written |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from diffq.errors import OptimizerError, missing_package
from diffq.format.container import Codec
from diffq.integrations.compression import FILE, Compression, check_end
from diffq.quantizers.base import quantizer_of
from diffq.storage.save import save
from diffq.torch_inside.optimizers import when_made

# One library under two names, whose trainers know the classes of their own name only.
_NAMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
_LIBRARIES = [import_module(name) for package, name in _NAMES.items() if find_spec(package)]
if not _LIBRARIES:
    raise missing_package("lightning", "diffq.integrations.lightning", "lightning")
_BASES: tuple[Any, ...] = tuple(library.Callback for library in _LIBRARIES)


class DiffQCallback(*_BASES):  # type: ignore[misc]
    """Compresses a `LightningModule` to a size, or with a price.

    The module gets a `DiffQuantizer` when `fit` begins, or keeps the one that it, or a part of
    it, has. The steps of a plan are the trainer's `estimated_stepping_batches`. The log has
    `size_mb`, `mean_bits` and `lam`, which other callbacks can monitor. When `fit` ends, the
    quantized weights are written to `model.diffq` in the trainer's `log_dir`.

    Example:
        >>> trainer = Trainer(max_epochs=10, callbacks=[DiffQCallback(target_mb=5.0)])
        >>> trainer.fit(module, batches)

    Args:
        target_mb: MB of the file in the end, or up to 1 % less.
        lam: price of one MB in units of the loss, in place of `target_mb`.
        float_share: share of the steps in plain float; by default half of them for `target_mb`,
            and none for `lam`. Pass 0 to finetune.
        lr: learning rate of the bitwidths; see `DiffQuantizer.setup_optimizer`.
        codec: of the file; see `diffq.save`.
        **options: of the `DiffQuantizer`, such as `noise` and `group_size`.

    Raises:
        ConfigError: when training begins, an argument breaks a rule.
        OptimizerError: `configure_optimizers` makes no optimizer of the module's parameters.
        AttachError: the module cannot be quantized.
    """

    def __init__(
        self,
        *,
        target_mb: float | None = None,
        lam: float | None = None,
        float_share: float | None = None,
        lr: float | None = None,
        codec: Codec = "rans",
        **options: Any,
    ) -> None:
        super().__init__()
        self.compression = Compression(target_mb, lam, float_share, lr, options)
        self.codec = codec

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Attaches the quantizer once the module is complete, and waits for the optimizer."""

        def attach(method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            method(*args, **kwargs)
            self.compression.attach(pl_module)

        def configure(method: Callable[..., Any]) -> Any:
            return self._configure(trainer, pl_module, method)

        # What completes the module comes after this hook, and before the checkpoint is loaded.
        last = [name for name in ("setup", "configure_model") if _overrides(pl_module, name)][-1:]
        for name in last:
            _next_call(pl_module, name, attach)
        if not last:
            self.compression.attach(pl_module)
        if stage == "fit":
            _next_call(pl_module, "configure_optimizers", configure)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Logs the readings where Lightning logs."""
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            pl_module.log_dict(self.compression.readings(quantizer_of(pl_module)))

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Writes the file, of the averaged weights where a callback has put them in place."""
        quantizer = quantizer_of(pl_module)
        check_end(quantizer)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            save(quantizer, folder / FILE, self.codec)

    def _configure(self, trainer: Any, module: nn.Module, method: Callable[..., Any]) -> Any:
        quantizer = quantizer_of(module)
        known = {id(parameter) for parameter in quantizer.model.parameters()}
        found: list[Optimizer] = []

        def set_up(optimizer: Optimizer) -> None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not found and held & known:
                found.append(optimizer)
                steps = trainer.estimated_stepping_batches
                self.compression.setup(quantizer, optimizer, steps)

        with when_made(set_up):
            configured = method()
        if not found:
            raise OptimizerError(
                "DiffQCallback gives the bitwidths to the optimizer that configure_optimizers "
                "makes, but it made none that holds parameters of the quantized model. Make it in "
                "configure_optimizers, with self.parameters()."
            )
        return configured


def _overrides(module: nn.Module, name: str) -> bool:
    """Whether a module has a method of its own, other than Lightning's."""
    own = getattr(type(module), name)
    return all(own is not getattr(library.LightningModule, name) for library in _LIBRARIES)


def _next_call(module: nn.Module, name: str, instead: Callable[..., Any]) -> None:
    """Passes the next call of a method, with the method before the arguments, to a function."""
    method = getattr(module, name)

    @wraps(method)  # Lightning looks through it for whether the module overrides the method.
    def once(*args: Any, **kwargs: Any) -> Any:
        vars(module).pop(name, None)
        return instead(method, *args, **kwargs)

    setattr(module, name, once)
