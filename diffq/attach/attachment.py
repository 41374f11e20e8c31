"""Puts quantizers on a model, in place, and takes them off without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffq.attach.batch import Batch, Batches, CodedBatch
from diffq.attach.checkpoints import StateHooks
from diffq.attach.classes import Cover, cover_of, put_on, take_off
from diffq.attach.forward import Forwards
from diffq.attach.learned import Learned
from diffq.attach.place import Place, untied
from diffq.attach.plan import LEARNED, TensorPlan
from diffq.attach.sample import same_memory
from diffq.attach.weight import WeightQuantizer
from diffq.errors import AttachError, warn
from diffq.numerics.lengths import CodeLengths
from diffq.numerics.size import BitsSize, LearnedSize, MeasuredSize, Sized, Sizes
from diffq.torch_inside.modules import children_in, parameters_in
from diffq.torch_inside.sharding import is_managed, reshard, whole, whole_parameters

T = TypeVar("T")


class Attachment:
    """What is on a model: quantizers of its tensors, made whole or not at all.

    Attributes:
        model: the model, as long as it is attached.
        face: the object that users hold; copies of the model have their own.
        quantizers: one for each unique quantized tensor, by index.
        forwards: the model's forwards, which all its modules share.
    """

    def __init__(
        self, model: nn.Module, quantizers: Sequence[WeightQuantizer], face: object
    ) -> None:
        self.model = model
        self.face = face
        self.quantizers = tuple(quantizers)
        for index, quantizer in enumerate(self.quantizers):
            quantizer.index = index
        weights = [q.plan.sites[0].read(model) for q in self.quantizers]
        self.learned = Learned(self.quantizers, weights)
        self.forwards = Forwards(self.quantizers, self.learned)
        self._sizes: Sizes | None = None
        self._batches = Batches()
        # The size as measured, in a block in which nothing changes it.
        self._holds = False
        self._held: MeasuredSize | None = None
        self._places = self._find_places()
        self._places_of: list[list[Place]] = [[] for _ in self.quantizers]
        for place in self._places:
            self._places_of[place.quantizer.index].append(place)
        self.forwards.root, self.forwards.attached = ref(model), True
        # By the module and not by its name: a detach reaches modules that were replaced since.
        self._covered = [m for m in model.modules() if m is model or self._below(m)]
        self._links = self._find_links()
        if "forward" in vars(model) and self.quantizers:
            warn(
                "The model's forward was set on the model itself, as Accelerate does in mixed "
                "precision, and diffq does not see its calls: tensors that the model itself reads "
                "stay plain. Attach the quantizer before, and set forward afterwards."
            )
        self._states = StateHooks(self.forwards, self._places)
        try:
            model.add_module(LEARNED, self.learned)
            for module in self._covered:
                own = {p.name: p for p in self._places if p.owner is module}
                cover = Cover(self.forwards, own, self._below(module))
                cover.attachment = self if module is model else None
                put_on(module, cover)
            self._states.register(model)
        except BaseException:
            self.detach()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes a copy or a pickle of a whole model an attached one."""
        self.__dict__.update(state)
        self.forwards.root, self.forwards.attached = ref(self.model), True

    @property
    def ran(self) -> bool:
        """Whether a forward of the model has ended."""
        return self.forwards.ran

    def weight(self, quantizer: WeightQuantizer) -> Tensor:
        """The tensor that a quantizer is given: the Parameter, gathered if it is sharded.

        Where another parametrization computes the tensor, it is computed here.

        Raises:
            AttachError: something else is in its place, the tensor has another shape, or tied
                tensors were untied.
        """
        place, *others = self._places_of[quantizer.index]
        weight = self._gathered(place)
        place.check_shape(weight)
        for other in others:
            base = self._gathered(other)
            # What is computed is another tensor each time.
            if (
                isinstance(weight, nn.Parameter)
                and base is not weight
                and not same_memory(base, weight)
            ):
                raise AttachError(untied(quantizer.plan))
        return weight

    def check_places(self) -> None:
        """Checks that every quantized tensor is in its place.

        Raises:
            AttachError: one is not.
        """
        self.check_links()
        for place in self._places:
            place.base()

    def check_links(self) -> None:
        """Checks that every module with a quantized tensor is still part of the model.

        Raises:
            AttachError: one was removed or replaced.
        """
        if all(children_in(parent).get(key) is child for parent, key, child in self._links):
            return
        present = set(self.model.modules())
        for place in self._places:
            if place.owner not in present:
                raise place.changed("was removed or replaced")
        self._links = self._find_links()

    def forget(self) -> None:
        """Has all quantized weights computed again."""
        self.forwards.forget()

    def learning_now(self) -> frozenset[WeightQuantizer]:
        """The quantizers whose noise acts on the loss in this step of the optimizer.

        Before its first forward, those of the step before: a loop may ask for the size first.
        """
        if any(q.readings.in_this_step for q in self.quantizers):
            return frozenset(q for q in self.quantizers if q.readings.learns)
        return frozenset(q for q in self.quantizers if q.readings.before)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins what is learned anew, where it depends on weights that were trained since."""
        started = self.each_weight(lambda q, weight, learned: q.restart(weight))
        self.learned.write(started)
        self.forget()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """A block in which no weight changes, so that levels are measured once."""
        self._holds = True
        try:
            yield
        finally:
            self._holds, self._held = False, None

    def learned_size(self) -> LearnedSize | None:
        """The size of what is learned; None if none is.

        Those tensors have a gradient that noise acts on.
        """
        if any(quantizer.coded for quantizer in self.quantizers):
            measured = self._held or self._measured_size()
            self._held = measured if self._holds else None
            return measured
        sized = [
            (quantizer, Sized(grouping, span[0]))
            for quantizer, span in zip(self.quantizers, self.learned.spans, strict=True)
            if (grouping := quantizer.grouping) is not None and span is not None
        ]
        if not sized:
            return None
        quantizers, tensors = zip(*sized, strict=True)
        if self._sizes is None or self._sizes.tensors != tensors:
            self._sizes = Sizes(tensors)
        active = self.learning_now()
        return BitsSize(self._sizes, [quantizer in active for quantizer in quantizers])

    @torch.no_grad()
    def _measured_size(self) -> MeasuredSize:
        """The size of levels, measured with the weights as they are."""
        active, parameter = self.learning_now(), self.learned.parameter
        device = None if parameter is None else parameter.device
        total = torch.zeros((), dtype=torch.float32, device=device)
        numbers = sum(self.learned.counts())
        gradient = torch.zeros(numbers, dtype=torch.float32, device=device)
        for quantizers, lengths in self._code_lengths():
            total += lengths.bits.sum().to(total)
            self.learned.place(gradient, quantizers, lengths.slopes)
        learning = [q for q in self.quantizers if q.coded and q.learning and q in active]
        for quantizer, span in zip(self.quantizers, self.learned.spans, strict=True):
            if span is not None and quantizer not in learning:
                gradient[span[0] : span[0] + span[1].numel()] = 0
        return MeasuredSize(total, gradient, bool(learning))

    def _code_lengths(self) -> Iterator[tuple[Sequence[WeightQuantizer], CodeLengths]]:
        """Bits of levels, batch by batch, or tensor by tensor where each has to be gathered."""
        coded = [quantizer for quantizer in self.quantizers if quantizer.coded]
        reshard(self.model)
        self.check_links()
        batches: list[tuple[Batch, list[Tensor] | None]]
        if is_managed(self.model):
            batches = [(type(quantizer).batch([quantizer]), None) for quantizer in coded]
        else:
            batches = [*self._batches.of([(q, self.weight(q).detach()) for q in coded])]
        runs = self.learned.runs([batch.quantizers for batch, _ in batches])
        for (batch, held), run in zip(batches, runs, strict=True):
            weights = held or [self.weight(q).detach() for q in batch.quantizers]
            if isinstance(batch, CodedBatch):
                yield batch.quantizers, batch.code_lengths(weights, run.beside(weights[0]))

    def each_quantizer(self, call: Callable[[WeightQuantizer, Tensor | None], T]) -> list[T]:
        """What `call` gives for each quantizer and what it learned, gathered if sharded."""
        reshard(self.model)
        parts = self._parts()
        return [call(quantizer, parts[quantizer.index]) for quantizer in self.quantizers]

    def each_weight(self, call: Callable[[WeightQuantizer, Tensor, Tensor | None], T]) -> list[T]:
        """What `call` gives for each quantizer, its weight, and what it learned.

        Sharded weights are gathered for it, those of one tensor at a time.

        Raises:
            AttachError: as `weight`.
        """
        reshard(self.model)
        self.check_links()
        parts = self._parts()
        results = []
        for quantizer in self.quantizers:
            weight, learned = self.weight(quantizer).detach(), parts[quantizer.index]
            if learned is not None:
                learned = learned.to(weight.device)
            results.append(call(quantizer, weight, learned))
        return results

    def each_raw(self, plans: Iterable[TensorPlan], call: Callable[[Tensor], T]) -> list[T]:
        """What `call` gives for the tensor of each plan without quantizer, gathered likewise.

        Raises:
            AttachError: tied tensors were untied, and differ.
        """
        reshard(self.model)
        return [call(self._raw_tensor(plan)) for plan in plans]

    def computing(self) -> AbstractContextManager[None]:
        """A block that computes as a forward of the model does."""
        return self.forwards.entered(self._places)

    def detach(self) -> None:
        """Takes everything off: same parameters, names, order and classes."""
        self._states.remove()
        for module in self._covered:
            cover = cover_of(module)
            if cover is not None and cover.forwards is self.forwards:
                take_off(module)
        if children_in(self.model).get(LEARNED) is self.learned:
            del children_in(self.model)[LEARNED]

    def bake(self, quantizer: WeightQuantizer, value: Tensor) -> None:
        """Sets a tensor of the detached model at every place; whatever computed it is removed."""
        places = [place for place in self._places if place.quantizer is quantizer]
        for _, owner, name, _ in places:
            if parametrize.is_parametrized(owner, name):
                # The tensor was computed from others, which cannot give this very value.
                parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
        with torch.no_grad():
            getattr(places[0].owner, places[0].name).copy_(value)

    def _find_places(self) -> tuple[Place, ...]:
        places = []
        for quantizer in self.quantizers:
            for site in quantizer.plan.sites:
                owner, name = site.owner(self.model), site.attribute
                position = [*parameters_in(owner), name].index(name)
                places.append(Place(quantizer, owner, name, position))
        return tuple(places)

    def _below(self, module: nn.Module) -> tuple[Place, ...]:
        modules = set(module.modules())
        return tuple(place for place in self._places if place.owner in modules)

    def _find_links(self) -> list[tuple[nn.Module, str, nn.Module]]:
        covered = set(self._covered)
        return [
            (parent, key, child)
            for parent in self.model.modules()
            for key, child in children_in(parent).items()
            if child in covered
        ]

    def _parts(self) -> list[Tensor | None]:
        parts = self.learned.parts()
        return [None if part is None else part.detach() for part in parts]

    def _gathered(self, place: Place) -> Tensor:
        if place.name in parameters_in(place.owner):
            return whole(place.base())
        chains: Any = getattr(place.owner, "parametrizations", ())
        computed = [chains[place.name]] if place.name in chains else []
        with whole_parameters(computed):
            return place.base()

    def _raw_tensor(self, plan: TensorPlan) -> Tensor:
        owners = [site.owner(self.model) for site in plan.sites]
        chains: list[Any] = [o.parametrizations for o in owners if parametrize.is_parametrized(o)]
        with whole_parameters(chains):
            read = dict.fromkeys(site.read(self.model) for site in plan.sites)
            tensor, *others = (whole(each.detach()) for each in read)
        if not all(torch.equal(other, tensor) for other in others):
            raise AttachError(untied(plan))
        return tensor


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is attached to a model, or to a part of it; None if nothing is."""
    for module in model.modules():
        cover = cover_of(module)
        if cover is not None and cover.attachment is not None:
            found: Attachment = cover.attachment
            return found
    return None


def is_attached(model: nn.Module) -> bool:
    """Whether a model is attached, or is a part of one that is, or has such a part."""
    for module in model.modules():
        cover = cover_of(module)
        root = None if cover is None or cover.forwards.root is None else cover.forwards.root()
        if root is not None and any(module is each for each in root.modules()):
            return True
    return False


def strip(model: nn.Module) -> None:
    """Makes a copy of a part of an attached model plain."""
    for module in list(model.modules()):
        if cover_of(module) is not None:
            take_off(module)
