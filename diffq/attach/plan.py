"""Model to plan: which tensors are quantized, which stay raw, and which are tied.

The plan is frozen before anything is changed in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffq.attach.patterns import allowed, check_matches, matches
from diffq.attach.pruning import is_pruned
from diffq.attach.ties import have_common_elements, tie_key
from diffq.checks import (
    check_flag,
    check_number,
    check_overrides,
    check_patterns,
    check_small_bits,
)
from diffq.errors import AttachError, ConfigError
from diffq.format.records import ITEM_SIZES
from diffq.numerics.size import MEGABYTE, scaled_bits
from diffq.torch_inside.modules import (
    buffers_in,
    children_in,
    is_lazy,
    non_persistent_buffers,
    parameters_in,
)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` to "float32"."""
    return str(dtype).removeprefix("torch.")


#: Name of the module that a quantizer adds to the root of its model.
LEARNED = "_diffq"

Overrides = Mapping[str, Mapping[str, Any]]

#: Dtypes of parameters that can be quantized.
QUANTIZABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Site:
    """One place that holds a tensor: attribute `attribute` of the submodule `module`."""

    module: str
    attribute: str

    @property
    def name(self) -> str:
        """The tensor's name in the plain model's state dict."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute

    def owner(self, model: nn.Module) -> nn.Module:
        """The submodule that holds the tensor.

        Raises:
            AttachError: the model has no such submodule any more.
        """
        owner = model
        # Directly where a module is in its place: this is asked for each tensor in each step.
        # What wraps a module may pass the names in it on.
        for name in self.module.split(".") if self.module else ():
            modules = children_in(owner)  # TorchScript's has no `get`.
            below = modules[name] if name in modules else getattr(owner, name, None)
            if not isinstance(below, nn.Module):
                raise AttachError(self.changed("was removed"))
            owner = below
        return owner

    def read(self, model: nn.Module) -> Tensor:
        """The tensor as the model sees it, through parametrizations if there are any.

        Raises:
            AttachError: the model has no such tensor any more.
        """
        tensor = getattr(self.owner(model), self.attribute, None)
        if not isinstance(tensor, Tensor):
            raise AttachError(self.changed("was removed"))
        return tensor

    def changed(self, what: str) -> str:
        """The error for a tensor to which something happened after it was planned."""
        return (
            f"A model must keep its tensors while a quantizer is attached, but {self.name} {what}. "
            "Undo that; or call detach(), change the model, and make a new quantizer."
        )


@dataclass(frozen=True)
class TensorPlan:
    """One unique tensor of the model.

    Attributes:
        names: every state dict name of the tensor; the first one is its own.
        sites: the places that hold it, each submodule once.
        shape: the tensor's shape.
        dtype: the tensor's dtype.
        quantized: whether the method quantizes it.
        small: whether it is stored at `small_bits`; a tensor that is neither stays raw.
        learned: whether it is a parameter; buffers are not.
        pruned: whether `diffq.attach.pruning.Pruned` holds some of it at zero.
        padded: whether an embedding has a row for padding in it, which is zero.
        overrides: settings of this tensor that differ from the quantizer's.
    """

    names: tuple[str, ...]
    sites: tuple[Site, ...]
    shape: torch.Size
    dtype: torch.dtype
    quantized: bool
    small: bool
    learned: bool
    pruned: bool
    padded: bool
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name under which the tensor is stored."""
        return self.names[0]

    @property
    def has_levels(self) -> bool:
        """Whether it is stored as integer levels, or as indices of codewords."""
        return self.quantized or self.small

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


@dataclass(frozen=True)
class Rules:
    """What a user says about selection.

    Attributes:
        min_size: a parameter is quantized if it takes more than this many MB in float32.
        include: name patterns; if there are any, only parameters that match are quantized.
        exclude: name patterns of parameters that stay raw, small ones too.
        overrides: name pattern to settings; where several match, later ones win.
        float16: whether parameters that are not quantized are stored as float16.
        small_bits: bitwidth of parameters that are too small to be quantized; None for none.
        least_dims: parameters of fewer dimensions count as small.

    A pattern is a shell pattern (`*`, `?`, `[...]`) for the full name, such as
    `encoder.*.weight`, or for its last part, such as `bias`.
    """

    min_size: float = 0.01
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Overrides | None = None
    float16: bool = False
    small_bits: int | None = None
    least_dims: int = 0

    def __post_init__(self) -> None:
        check_number(self.min_size, "min_size", 0)
        check_patterns(self.include, "include")
        check_patterns(self.exclude, "exclude")
        check_overrides(self.overrides)
        check_flag(self.float16, "float16")
        check_small_bits(self.small_bits)

    def select(self, names: Sequence[str], tensor: Tensor) -> bool:
        """Whether a parameter with these names is quantized."""
        fits = tensor.dtype in QUANTIZABLE and not self._is_small(tensor.shape)
        return fits and allowed(names, self.include, self.exclude)

    def shrinks(self, names: Sequence[str], tensor: Tensor) -> bool:
        """Whether a parameter with these names is stored at `small_bits`: where that is smaller."""
        if self.small_bits is None or tensor.dtype not in QUANTIZABLE:
            return False
        width = 16 if self.halves(tensor.dtype) else 8 * tensor.dtype.itemsize
        smaller = scaled_bits(tensor.numel(), self.small_bits) < width * tensor.numel()
        fits = smaller and self._is_small(tensor.shape)
        return fits and allowed(names, self.include, self.exclude)

    def halves(self, dtype: torch.dtype) -> bool:
        """Whether a parameter of this dtype with no levels is stored as float16."""
        return self.float16 and dtype in (torch.float32, torch.float64)

    def settings(self, names: Sequence[str]) -> dict[str, Any]:
        """The overrides for a parameter with these names."""
        merged: dict[str, Any] = {}
        for pattern, settings in (self.overrides or {}).items():
            if matches([pattern], names):
                merged.update(settings)
        return merged

    def check_patterns(self, shapes: Mapping[str, torch.Size]) -> None:
        """Checks that each pattern has an effect, by the shape under every name of a parameter.

        Raises:
            ConfigError: a pattern matches no name; or one of `include` or `overrides`
                matches only parameters that are too small for it.
        """
        names = list(shapes)
        check_matches((*self.include, *self.exclude, *(self.overrides or {})), names)
        included = self.include if self.small_bits is None else ()
        for pattern in (*included, *(self.overrides or {})):
            matched = [name for name in names if matches([pattern], [name])]
            if all(self._is_small(shapes[name]) for name in matched):
                least = f" or fewer than {self.least_dims} dimensions" if self.least_dims else ""
                fate = f"stored at small_bits={self.small_bits}" if self.small_bits else ""
                raise ConfigError(
                    f"The pattern {pattern!r} matches only parameters of at most "
                    f"{self.min_size} MB{least}, which are {fate or 'not quantized'}: "
                    f"{', '.join(matched[:3])}. Lower min_size, or leave the pattern out."
                )

    def why_nothing(self, plans: Sequence[TensorPlan]) -> str:
        """The warning for a plan that quantizes no tensor, with the remedy."""
        dims = f" of {self.least_dims} or more dimensions" if self.least_dims else ""
        if any(plan.small for plan in plans):
            return (
                f"Only small parameters are quantized, at small_bits={self.small_bits}: there "
                f"is no other{dims} of more than min_size={self.min_size} MB. Pass min_size=0 to "
                "quantize small ones like large ones."
            )
        weights = [
            plan
            for plan in plans
            if plan.learned and plan.dtype in QUANTIZABLE and len(plan.shape) >= self.least_dims
        ]
        chosen = [p for p in weights if allowed(p.names, self.include, self.exclude)]
        if not weights:
            return (
                f"Nothing is quantized: the model has no floating-point parameter{dims}. "
                "Attach the quantizer to the model that holds the weights."
            )
        largest = max(chosen or weights, key=lambda plan: plan.numel)
        size = f"{largest.name}, takes {4 * largest.numel / MEGABYTE:.4g} MB"
        if chosen:
            return (
                f"Nothing is quantized: only parameters of more than min_size={self.min_size} MB "
                f"are, and the largest, {size}. Pass min_size=0 to quantize small ones too."
            )
        return (
            "Nothing is quantized: include and exclude leave every parameter out. "
            f"The largest, {size}. Change the patterns."
        )

    def _is_small(self, shape: torch.Size) -> bool:
        return len(shape) < self.least_dims or shape.numel() <= self.min_size * MEGABYTE / 4


def build_plan(model: nn.Module, rules: Rules) -> tuple[TensorPlan, ...]:
    """Lists every unique tensor of a model's state dict, in its order.

    Ties are found by memory: a tensor under two names is one entry, and so are two parameters
    with the same elements. Nothing is changed in the model.

    Raises:
        AttachError: a lazy module has not seen its first input, a tensor is sparse, or a tensor
            to quantize shares a part of its memory with another.
        ConfigError: a pattern matches nothing, or nothing large enough.
    """
    tensors: dict[object, tuple[Tensor, list[Site]]] = {}
    for site, tensor in named_tensors(model):
        if is_lazy(tensor):
            raise AttachError(
                f"{site.name} has no shape yet. Run one forward of the lazy module first."
            )
        if tensor.layout != torch.strided:
            raise AttachError(
                f"{site.name} must be a dense tensor to be stored, got {tensor.layout}. "
                "Register it with persistent=False, or make it dense."
            )
        if dtype_name(tensor.dtype) not in ITEM_SIZES:
            raise AttachError(
                f"{site.name} has dtype {dtype_name(tensor.dtype)}, which cannot be stored. "
                "Register it with persistent=False, or convert it."
            )
        tensors.setdefault(tie_key(tensor), (tensor, []))[1].append(site)
    plans = [_plan(model, tensor, sites, rules) for tensor, sites in tensors.values()]
    _check_overlaps([(plan, t) for plan, (t, _) in zip(plans, tensors.values(), strict=True)])
    rules.check_patterns({n: plan.shape for plan in plans if plan.learned for n in plan.names})
    return tuple(plans)


def _plan(model: nn.Module, tensor: Tensor, sites: list[Site], rules: Rules) -> TensorPlan:
    names = tuple(site.name for site in sites)
    learned = isinstance(tensor, nn.Parameter) or parametrize.is_parametrized(
        sites[0].owner(model), sites[0].attribute
    )
    # A module that is reachable under two names is one place to parametrize.
    unique = {(id(site.owner(model)), site.attribute): site for site in reversed(sites)}
    return TensorPlan(
        names=names,
        sites=tuple(reversed(unique.values())),
        shape=tensor.shape,
        dtype=tensor.dtype,
        quantized=learned and rules.select(names, tensor),
        small=learned and rules.shrinks(names, tensor),
        learned=learned,
        pruned=is_pruned(sites[0].owner(model), sites[0].attribute),
        padded=any(getattr(site.owner(model), "padding_idx", None) is not None for site in sites),
        overrides=rules.settings(names),
    )


def _check_overlaps(tensors: Sequence[tuple[TensorPlan, Tensor]]) -> None:
    """Raises AttachError for a tensor to quantize that has elements in common with another."""
    spans: dict[object, list[tuple[int, int, TensorPlan, Tensor]]] = {}
    for plan, tensor in tensors:
        if plan.learned and isinstance(tie_key(tensor), tuple):
            start = tensor.data_ptr()
            extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (extent + 1) * tensor.element_size()
            spans.setdefault(tensor.device, []).append((start, end, plan, tensor))
    for there in spans.values():
        there.sort(key=lambda span: span[0])
        for place, (_, end, plan, tensor) in enumerate(there):
            for start, _, other, second in there[place + 1 :]:
                if start >= end:
                    break
                if any(p.has_levels for p in (plan, other)) and have_common_elements(
                    tensor, second
                ):
                    raise AttachError(
                        f"A tensor to quantize must not share a part of its memory with another, "
                        f"but {plan.name} and {other.name} do. Make one of them a copy, tie them "
                        f"as a whole, or pass exclude={[plan.name, other.name]!r}."
                    )


def named_tensors(model: nn.Module) -> Iterator[tuple[Site, Tensor]]:
    """Every parameter and persistent buffer under every name, as the model's code reads it."""
    read: dict[tuple[int, str], Tensor] = {}
    for site, owner in named_sites(model):
        key = id(owner), site.attribute
        if key not in read:
            read[key] = getattr(owner, site.attribute)
        yield site, read[key]


def named_sites(model: nn.Module) -> Iterator[tuple[Site, nn.Module]]:
    """The place of every parameter and persistent buffer, with the submodule that holds it."""
    inner: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if f"{path}.".startswith(inner) or path.rpartition(".")[2] == LEARNED:
            continue
        names: list[str] = []
        if parametrize.is_parametrized(module):
            inner += (f"{path}.parametrizations.".lstrip("."),)
            names += module.parametrizations
        names += (name for name, tensor in parameters_in(module).items() if tensor is not None)
        skipped = non_persistent_buffers(module)
        names += (n for n, t in buffers_in(module).items() if t is not None and n not in skipped)
        yield from ((Site(path, name), module) for name in names)
