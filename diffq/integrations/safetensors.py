"""Quantized states in safetensors files, for pipelines that move no other kind of file.

Each tensor of an entry is stored as `name/field`; the rest of the state is JSON in the metadata. A
`.diffq` file is smaller, since levels are entropy-coded there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffq.errors import StateError, missing_package
from diffq.storage.state import read_header

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise missing_package("safetensors", "diffq.integrations.safetensors", "cli") from error

_KEY = "diffq.state"


def save_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Writes a quantized state to a safetensors file.

    Args:
        state: what `get_quantized_state` returned.
        path: where to.

    Raises:
        StateError: this is no quantized state.
    """
    read_header(state)
    tensors, entries = {}, {}
    for name, entry in state["tensors"].items():
        parts = {key: each for key, each in entry.items() if isinstance(each, torch.Tensor)}
        tensors.update({f"{name}/{key}": each.contiguous() for key, each in parts.items()})
        entries[name] = {key: each for key, each in entry.items() if key not in parts}
    text = json.dumps({**state, "tensors": entries})
    save_file(tensors, path, metadata={"format": "pt", _KEY: text})


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, for `diffq.restore_quantized_state`, which checks it.

    Raises:
        StateError: the file is damaged, or holds no quantized state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})[_KEY])
            for key in file.keys():  # noqa: SIM118 - it is no dict
                name, _, field = key.rpartition("/")
                state["tensors"][name][field] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"{path} must be a file of save_state, sound and whole: {error!r}. A safetensors file "
            "of float weights goes into a plain model with safetensors.torch.load_model."
        ) from error
    read_header(state)
    return dict(state)
