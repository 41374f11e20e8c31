"""The learned parameters of a quantizer as a parameter group of the user's optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Adam, AdamW, Optimizer, SparseAdam

from diffq.checks import check_number, plain
from diffq.errors import ConfigError, OptimizerError
from diffq.torch_inside.sharding import is_dtensor

DEFAULT_LR = 1e-3

_ADAMS = (Adam, AdamW)

_OWN_OPTIMIZER = (
    "Give the learned parameters an optimizer of their own, and step both:\n"
    "    bits_optimizer = torch.optim.Adam(quantizer.learned_parameters(), 1e-2)\n"
    "    quantizer.setup_optimizer(bits_optimizer)"
)


def add_learned(
    optimizer: Optimizer,
    model: nn.Module,
    learned: Sequence[nn.Parameter],
    options: Mapping[str, Any],
    earlier: Optimizer | None = None,
    default_lr: float = DEFAULT_LR,
) -> None:
    """Gives learned parameters groups of their own in an optimizer, without weight decay.

    An error leaves the optimizer as it was. The optimizer that was given the learned parameters
    earlier loses them.

    Raises:
        OptimizerError: this is no optimizer of the model, or it cannot take the group.
        ConfigError: it knows no such option, or the learning rate breaks a rule.
    """
    _check_optimizer(optimizer, model, learned)
    options = {name: plain(value) for name, value in options.items()}
    _check_options(optimizer, options)
    _check_lr(optimizer, options)
    _check_values(optimizer, options)
    if not learned:
        return
    decay = {"weight_decay": 0.0} if "weight_decay" in _defaults(optimizer) else {}
    groups = _own_groups(optimizer, learned)
    if groups:
        _check_scheduled_lr(groups, options)
        for group in groups:
            group.update(_kernel_given_up(group, options))
            group.update(options if earlier is optimizer else {**decay, **options})
    else:
        _check_new_group(optimizer)
        first = {"lr": _lr_before(optimizer, model, learned, default_lr), **decay}
        kernel = _in_one_pass(optimizer, learned, options)
        group = {"params": _with_names(optimizer, model, learned), **first, **kernel, **options}
        _move(optimizer, {id(parameter) for parameter in learned}, group)
        _fill_state(optimizer, learned)
    if earlier is not None and earlier is not optimizer:
        release(earlier, learned)


def _check_optimizer(
    optimizer: Optimizer, model: nn.Module, learned: Sequence[nn.Parameter]
) -> None:
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"setup_optimizer needs a torch.optim.Optimizer, got {type(optimizer).__name__}. "
            "If that wraps one, call setup_optimizer on the inner one before it is wrapped."
        )
    if isinstance(optimizer, SparseAdam) and learned:
        raise OptimizerError(
            "SparseAdam takes sparse gradients only, and those of learned parameters are dense. "
            + _OWN_OPTIMIZER
        )
    muon = getattr(torch.optim, "Muon", ())
    shape = next((list(parameter.shape) for parameter in learned if parameter.ndim != 2), None)
    if isinstance(optimizer, muon) and shape is not None:
        raise OptimizerError(
            f"Muon takes matrices only, got a learned parameter of shape {shape}. {_OWN_OPTIMIZER}"
        )
    ids = {id(parameter) for parameter in learned}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held & ({id(parameter) for parameter in model.parameters()} - ids):
        return
    if not held & ids:
        raise OptimizerError(
            "setup_optimizer needs the optimizer that trains this quantizer's model, "
            "but got one that holds none of its parameters. "
            "Make it with model.parameters(), after fully_shard if the model is sharded, "
            "then call setup_optimizer."
        )


def _defaults(optimizer: Optimizer) -> Mapping[str, Any]:
    """Its default options; wrappers that are optimizers in name only have none."""
    defaults: Mapping[str, Any] = getattr(optimizer, "defaults", {})
    return defaults


def _check_options(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    # torch takes further keys of a group without a word, and `name` is one that loggers read.
    groups = optimizer.param_groups
    known = {"lr", "name", *_defaults(optimizer), *(key for group in groups for key in group)}
    known -= {"params", "param_names", "initial_lr"}
    for option in options:
        if option not in known:
            close = get_close_matches(option, known, n=1)
            raise ConfigError(
                f"{type(optimizer).__name__} has no option {option!r}."
                + (f" Did you mean {close[0]!r}?" if close else "")
                + f" setup_optimizer takes {', '.join(sorted(known))}."
            )


def _check_values(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Has torch's own optimizers check the values, which they do only when they are made."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return
    known = signature(kind).parameters
    asked = {k: v for k, v in {**_defaults(optimizer), **options}.items() if k in known}
    try:
        kind([nn.Parameter(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))], **asked)
    except Exception as error:
        raise ConfigError(
            f"{kind.__name__} refuses these options of setup_optimizer: {error}. "
            "Pass values that the optimizer itself would take."
        ) from error


def _check_lr(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    lr = options.get("lr", 0.0)
    check_number(lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr, "lr", 0)
    asked = {**_defaults(optimizer), **options}
    if isinstance(lr, Tensor) and isinstance(optimizer, _ADAMS) and asked["foreach"]:
        if not asked["capturable"]:
            raise ConfigError(
                "With foreach=True, Adam and AdamW take a tensor as lr only with capturable=True, "
                f"got lr={lr}. Pass a number."
            )


def _own_groups(optimizer: Optimizer, learned: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The groups with nothing but learned parameters, if they hold all of them; else none."""
    ids = {id(parameter) for parameter in learned}
    groups = [g for g in optimizer.param_groups if g["params"] and ids.issuperset(_ids(g))]
    return groups if ids == {i for group in groups for i in _ids(group)} else []


def _ids(group: Mapping[str, Any]) -> list[int]:
    return [id(parameter) for parameter in group["params"]]


def _check_scheduled_lr(groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    for group in groups:
        lr = group.get("initial_lr")
        if lr is not None and options.get("lr", lr) != lr:
            raise OptimizerError(
                "The optimizer has a learning rate scheduler, which would keep lr="
                f"{float(lr):g} for the learned parameters, got lr={float(options['lr']):g}. "
                "Call setup_optimizer first, then make the scheduler."
            )


def _check_new_group(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS):
        raise OptimizerError(
            "LBFGS takes a single parameter group, so it cannot train the learned parameters "
            f"beside the weights. Make it with the weights alone. {_OWN_OPTIMIZER}"
        )
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise OptimizerError(
            "The optimizer has a learning rate scheduler, which would not know the new parameter "
            "group. Call setup_optimizer first, then make the scheduler. If that scheduler is no "
            "longer in use, delete 'initial_lr' from the optimizer's param_groups."
        )


def _lr_before(
    optimizer: Optimizer, model: nn.Module, learned: Sequence[nn.Parameter], default: float
) -> float | Tensor:
    """The learning rate that learned parameters have where no weight of the model is held."""
    ids = {id(parameter) for parameter in learned}
    weights = {id(parameter) for parameter in model.parameters()} - ids
    if any(weights.intersection(_ids(group)) for group in optimizer.param_groups):
        return default
    before = next(group for group in optimizer.param_groups if ids.intersection(_ids(group)))
    lr: float | Tensor = before.get("lr", default)
    return lr


def _in_one_pass(
    optimizer: Optimizer, learned: Sequence[nn.Parameter], options: Mapping[str, Any]
) -> dict[str, bool]:
    """Adam's own faster kernel for CPUs, where the user has chosen none.

    The same numbers but for rounding. By default Adam takes a dozen passes there, and a
    group size of 1 doubles what it updates.
    """
    if type(optimizer) not in _ADAMS or any(not p.is_cpu or is_dtensor(p) for p in learned):
        return {}
    if any(parameter in optimizer.state for parameter in learned):
        return {}  # The kernels keep their steps in different dtypes.
    asked = {**_defaults(optimizer), **options}
    chosen = [asked[name] for name in ("fused", "foreach")]
    special = [asked[name] for name in ("capturable", "differentiable")]
    return {} if chosen != [None, None] or any(special) else {"fused": True}


def _kernel_given_up(group: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, None]:
    """Gives up the fused kernel of a group where options ask for what it cannot do."""
    others = ("foreach", "capturable", "differentiable")
    asked = any(options.get(name) for name in others) and "fused" not in options
    return {"fused": None} if group.get("fused") and asked else {}


def _with_names(
    optimizer: Optimizer, model: nn.Module, learned: Sequence[nn.Parameter]
) -> list[Any]:
    """Learned parameters, each with its name where the optimizer was made with names."""
    if not any("param_names" in group for group in optimizer.param_groups):
        return list(learned)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(parameter)], parameter) for parameter in learned]


def _move(optimizer: Optimizer, ids: set[int], group: dict[str, Any]) -> None:
    """Adds a group, and takes its parameters out of the others; drops those left empty."""
    with _unchanged_after_error(optimizer):
        groups = optimizer.param_groups
        emptied = [g for g in groups if g["params"] and ids.issuperset(_ids(g))]
        _take_out(optimizer, ids)
        groups[:] = [g for g in groups if not any(g is each for each in emptied)]
        try:
            optimizer.add_param_group(group)
        except Exception as error:
            raise OptimizerError(
                f"{type(optimizer).__name__} refused the parameter group of the learned "
                f"parameters: {error}. {_OWN_OPTIMIZER}"
            ) from error


def _fill_state(optimizer: Optimizer, learned: Sequence[nn.Parameter]) -> None:
    """Gives learned parameters the state that Adagrad fills when it is made, and not later."""
    late = [parameter for parameter in learned if parameter not in optimizer.state]
    if isinstance(optimizer, Adagrad) and late:
        start = optimizer.param_groups[-1]["initial_accumulator_value"]
        optimizer.state.update(Adagrad(late, initial_accumulator_value=start).state)


def forget_state(optimizer: Optimizer, learned: Sequence[nn.Parameter]) -> None:
    """Has an optimizer begin anew with learned parameters."""
    for parameter in learned:
        optimizer.state.pop(parameter, None)
    _fill_state(optimizer, learned)


@contextmanager
def _unchanged_after_error(optimizer: Optimizer) -> Iterator[None]:
    """Gives an optimizer its groups, state and defaults back if the block fails."""
    groups = list(optimizer.param_groups)
    parts: list[Any] = [*groups, optimizer.state, _defaults(optimizer)]
    contents = [dict(part) for part in parts]
    try:
        yield
    except BaseException:
        optimizer.param_groups[:] = groups
        for part, content in zip(parts, contents, strict=True):
            part.clear()
            part.update(content)
        raise


def _take_out(optimizer: Optimizer, ids: set[int]) -> None:
    """Takes parameters out of an optimizer's groups, with their names."""
    for group in optimizer.param_groups:
        kept = [place for place, each in enumerate(_ids(group)) if each not in ids]
        for key in {"params", "param_names"} & group.keys():
            group[key] = [group[key][place] for place in kept]


def release(optimizer: Optimizer, learned: Sequence[nn.Parameter]) -> None:
    """Takes learned parameters out of an optimizer for good."""
    # A group stays, though empty: a scheduler has a learning rate for each.
    _take_out(optimizer, {id(parameter) for parameter in learned})
    for parameter in learned:
        optimizer.state.pop(parameter, None)
