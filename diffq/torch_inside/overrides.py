"""Methods of `nn.Module` that torch calls on each module when a model is moved, saved or loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class Overridable(nn.Module):
    """A module that has a say in how its tensors are moved and saved."""

    def before_saving(self) -> None:
        """Makes the tensors what a state dict shall hold."""

    def saved_besides(self) -> Mapping[str, Tensor]:
        """Entries of a state dict that are no parameters or buffers."""
        return {}

    def moving(self, move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function that replaces each tensor, in place of the one of a cast or move."""
        return move

    def after_moving(self) -> None:
        """Takes notice that the tensors were moved."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.before_saving()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + name, each) for name, each in self.saved_besides().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(self.moving(fn), recurse)  # type: ignore[no-untyped-call]
        self.after_moving()
        return self


class SavesFirst(nn.Module):
    """A module that saves tensors which it computes, ahead of those that it holds."""

    def saved_first(self, saved: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Name to tensor of these, given the entries of the state dict so far."""
        return {}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        first = self.saved_first(destination)
        destination.update((prefix + name, each) for name, each in first.items())
        super()._save_to_state_dict(destination, prefix, keep_vars)


def before_moves(base: type[nn.Module], tell: Callable[[Any], None]) -> dict[str, Any]:
    """The members of a subclass that calls `tell` with a module before it is cast or moved."""
    method: Any = base._apply

    @functools.wraps(method)
    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        tell(self)
        return method(self, *args, **kwargs)

    return {"_apply": apply}


def after_loads(base: type[nn.Module], tell: Callable[[Any], None]) -> dict[str, Any]:
    """The members of a subclass that calls `tell` with a module after its tensors were loaded."""
    method: Any = base._load_from_state_dict

    @functools.wraps(method)
    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        tell(self)

    return {"_load_from_state_dict": load}
