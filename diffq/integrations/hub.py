"""Folders as the Hugging Face hub has them, with `model.diffq` in place of `model.safetensors`.

| model | folder | `from_pretrained` is given |
| --- | --- | --- |
| of transformers | `config.json`, `model.diffq` | its class, or an `AutoModelFor...` |
| with `PyTorchModelHubMixin` | `config.json`, `model.diffq`, `README.md` | its class |
| with adapters of PEFT | `adapter_config.json`, `adapter_model.diffq` | the base model |
| any other | `config.json` with the given `config`, `model.diffq` | its class |

Nothing is unpickled, and no code is taken from the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffq.attach.plan import dtype_name, named_tensors
from diffq.errors import AttachError, ConfigError, MismatchError, listed
from diffq.format.container import Codec
from diffq.integrations.compression import FILE
from diffq.quantizers.base import BaseQuantizer, quantizer_of
from diffq.storage.open import StoredModel
from diffq.storage.save import load, save
from diffq.storage.state import Snapshot

Model = TypeVar("Model", bound=nn.Module)

CONFIG, ADAPTER_CONFIG, ADAPTER_FILE = "config.json", "adapter_config.json", "adapter_model.diffq"


def save_pretrained(
    source: nn.Module | BaseQuantizer[Any],
    folder: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    codec: Codec = "rans",
) -> None:
    """Writes the quantized weights and the configuration of an attached model to a folder.

    Of a model with adapters of PEFT, the adapter in use alone is written. The folder is made if
    needed; `huggingface_hub.upload_folder` takes it from there.

    Args:
        source: an attached model, or its quantizer.
        folder: where to.
        config: arguments of the model's class, for a model that knows no configuration.
        codec: of the file; see `diffq.save`.

    Raises:
        AttachError: the model, or a part of it, has no quantizer of its own.
        ConfigError: `config` is given for a model that has a configuration.
        WeightError: a weight to quantize or a bitwidth is not finite.
    """
    model = source.model if isinstance(source, BaseQuantizer) else source
    own = _has_config(model)
    if own and config is not None:
        raise ConfigError(
            f"config is for models that have no configuration, but {type(model).__name__} has one, "
            "which is written. Leave config out."
        )
    _check_whole(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(model, folder, codec)
    if is_mixin(model):
        _save_by_mixin(model, folder)
    elif own:
        _save_config(model, folder)
    else:
        text = json.dumps(dict(config or {}), indent=2, sort_keys=True)
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")


def from_pretrained(model: type[Model] | Model, folder: str | Path) -> Model:
    """Makes a plain model from a folder that `save_pretrained` wrote, in eval mode.

    The weights have the stored dtype, and ties are those of the class. Initial values, which
    the file replaces, are not computed for models of transformers.

    Args:
        model: the class of the model; for adapters, the base model.
        folder: a folder on this machine, such as `huggingface_hub.snapshot_download` returns.

    Returns:
        The model; for adapters, the base model in a `PeftModel`.

    Raises:
        ConfigError: a file is missing, or the configuration does not fit the class.
        FormatError: the file is damaged, hostile, or of another version.
        MismatchError: names or shapes of file and model differ.
    """
    path = Path(folder)
    made: Model
    if isinstance(model, nn.Module):
        made = _with_adapter(model, path)
    else:
        file = _existing(path, FILE)
        made = _make(model, path)
        _take_dtypes(made, file)
        load(file, made)
    made.eval()
    return made


def write(model: nn.Module, folder: str | Path, codec: Codec) -> None:
    """Writes the quantized weights of an attached model, or of its adapter, under their names."""
    if is_peft(model):
        save(_Adapter(model), Path(folder) / ADAPTER_FILE, codec)
    else:
        save(quantizer_of(model), Path(folder) / FILE, codec)


def is_peft(model: nn.Module) -> bool:
    """Whether a model is one of PEFT."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def is_mixin(model: nn.Module | type[nn.Module]) -> bool:
    """Whether a model or a class has the mixin of huggingface_hub, and is none of transformers."""
    hub = sys.modules.get("huggingface_hub")
    kind = model if isinstance(model, type) else type(model)
    return hub is not None and issubclass(kind, hub.ModelHubMixin) and not _is_transformers(kind)


def _is_transformers(kind: type) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and issubclass(kind, transformers.PreTrainedModel)


def _has_config(model: nn.Module) -> bool:
    return is_peft(model) or is_mixin(model) or _is_transformers(type(model))


def _check_whole(model: nn.Module) -> None:
    if quantizer_of(model).model is not model and not is_peft(model):
        raise AttachError(
            f"A folder holds a whole model, but the quantizer of this {type(model).__name__} is on "
            "a part of it. Attach one to the whole, with include for the part, or save the part."
        )


def _save_config(model: Any, folder: str | Path) -> None:
    if is_peft(model):
        model.peft_config[model.active_adapter].save_pretrained(folder)
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _save_by_mixin(model: Any, folder: str | Path) -> None:
    """Has the mixin write all but the weights: its documentation names the method to replace."""
    model._save_pretrained = lambda save_directory: None
    try:
        model.save_pretrained(folder)
    finally:
        del model._save_pretrained


@dataclass(frozen=True)
class _Adapter:
    """The adapter in use of a model of PEFT, as something to save."""

    model: Any

    def snapshot(self) -> Snapshot:
        """The adapter's tensors, under the names that PEFT stores."""
        import peft

        state = self.model.state_dict()
        chosen = peft.get_peft_model_state_dict(
            self.model, state, adapter_name=self.model.active_adapter
        )
        prefix = _path_of(self.model, quantizer_of(self.model).model)
        whole = quantizer_of(self.model).snapshot()
        names = {id(tensor): name for name, tensor in state.items()}
        records = {}
        for name, tensor in chosen.items():
            found = names.get(id(tensor), "").removeprefix(prefix)
            found = whole.aliases.get(found, found)
            if found not in whole.records:
                raise AttachError(
                    f"{name} of the adapter is no tensor of the quantized model, but computed when "
                    "PEFT saves. Save the whole model: diffq.save(quantizer, path)."
                )
            records[name] = whole.records[found]
        return Snapshot(records, {})


def _path_of(model: nn.Module, part: nn.Module) -> str:
    """What comes before the names of a part."""
    return next(f"{path}." if path else "" for path, each in model.named_modules() if each is part)


def _with_adapter(base: Any, folder: Path) -> Any:
    import peft

    _existing(folder, ADAPTER_CONFIG)
    state = load(_existing(folder, ADAPTER_FILE))
    model = peft.get_peft_model(base, peft.PeftConfig.from_pretrained(str(folder)))
    result: Any = peft.set_peft_model_state_dict(model, state)
    if result.unexpected_keys:
        raise MismatchError(
            f"The adapter in {folder} does not fit the base model, which has no place for "
            f"{listed(result.unexpected_keys)}. Pass the model that it was trained on."
        )
    return model


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ConfigError(
            f"A folder of hub.save_pretrained has {name}, but {folder} has none. Pass a folder on "
            "this machine, as huggingface_hub.snapshot_download returns it; and the class of the "
            "model, or for adapters the base model."
        )
    return folder / name


def _read_config(folder: Path) -> dict[str, Any]:
    path = _existing(folder, CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} must hold JSON: {error}. Download the folder again.") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path} must hold a JSON object, got {type(config).__name__}. "
            "Download the folder again."
        )
    return config


def _make(kind: Any, folder: Path) -> Any:
    if is_mixin(kind):
        return _make_by_mixin(kind, folder)
    config = _read_config(folder)
    if _is_transformers(kind):
        return _make_uninitialized(kind, folder)
    if hasattr(kind, "from_config"):  # AutoModelFor...
        from transformers import AutoConfig

        return kind.from_config(AutoConfig.from_pretrained(folder))
    try:
        return kind(**config)
    except TypeError as error:
        raise ConfigError(
            f"{folder / CONFIG} must hold the arguments of {kind.__name__}: {error}. Pass the "
            "class that was saved."
        ) from error


def _make_uninitialized(kind: Any, folder: Path) -> Any:
    from transformers.initialization import no_init_weights

    config = kind.config_class.from_pretrained(folder)
    with no_init_weights():
        model = kind(config)
    model.tie_weights()
    return model


def _make_by_mixin(kind: Any, folder: Path) -> Any:
    """Has the mixin read the configuration, in a class that leaves the weights as they are made."""

    def fresh(
        cls: type,
        /,
        *,
        model_id: Any,
        revision: Any,
        cache_dir: Any,
        force_download: Any,
        local_files_only: Any,
        token: Any,
        **arguments: Any,
    ) -> Any:
        return kind(**arguments)

    loader: Any = type(kind.__name__, (kind,), {"_from_pretrained": classmethod(fresh)})
    return loader.from_pretrained(folder)


def _take_dtypes(model: nn.Module, file: Path) -> None:
    """Casts tensors to their stored dtypes, as the model was cast that was saved."""
    with StoredModel(file) as stored:
        dtypes = {name: entry.dtype for name, entry in stored.entries.items()}
    for site, tensor in named_tensors(model):
        wanted = dtypes.get(site.name, dtype_name(tensor.dtype))
        if wanted != dtype_name(tensor.dtype):
            tensor.data = tensor.data.to(getattr(torch, wanted))
