"""One forward of an attached model: what it computes with, from its entry to its backward.

| state of the model | `running` | `replayed` | reading a quantized tensor gives |
| --- | --- | --- | --- |
| outside of a forward | empty | none, or of another backward | the Parameter |
| in a forward | its `Forward`, once for each call | none | the sample, or the quantized tensor |
| in the backward of its output | as the parts that run again | its `Forward` | the same |

A `Forward` is made by the outermost call of a covered module's `forward`. It draws all samples
of training at once, outside of regions that activation checkpointing runs again, and looks
whether the quantized weights of eval are still right. It is gone with the graph of its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from diffq.attach.cache import EvalCache
from diffq.attach.learned import Learned
from diffq.attach.sample import Sample
from diffq.attach.weight import WeightQuantizer
from diffq.attach.writes import Writes
from diffq.errors import AttachError, OptimizerError
from diffq.numerics.noise import straight_through
from diffq.torch_inside.graph import (
    Tied,
    call_after_backward,
    in_backward,
    is_plain,
    output_tensors,
)
from diffq.torch_inside.sharding import is_distributed, is_dtensor, is_managed


class Place(NamedTuple):
    """A module that holds a quantized tensor, and the tensor's name in it."""

    quantizer: WeightQuantizer
    owner: nn.Module
    name: str

    def base(self) -> Tensor:
        """The tensor without quantization.

        Raises:
            AttachError: something else was put in its place.
        """
        if torch.compiler.is_compiling() and self.name in self.owner._parameters:
            return self.owner._parameters[self.name]  # type: ignore[return-value]
        plain = getattr(getattr(type(self.owner), self.name, None), "plain", None)
        if plain is None:
            raise AttachError(self.changed("was replaced or parametrized"))
        try:
            base: Tensor | None = plain(self.owner)
        except AttributeError:
            base = None
        if base is None:
            raise AttachError(self.changed("was removed"))
        return base

    def changed(self, what: str) -> str:
        """The error for a tensor to which something happened while it was quantized."""
        return self.quantizer.plan.sites[0].changed(what)


class Forward:
    """What one outermost forward computes with.

    Attributes:
        samples: one of each quantized tensor, by index; None for what is drawn when it is read.
        entry: the module whose call it is; None in a block that computes.
        writes: finds writes to the samples at the end.
    """

    def __init__(self, count: int, entry: nn.Module | None) -> None:
        self.samples: list[Sample | None] = [None] * count
        self.entry = entry
        self.writes: Writes | None = None


class Forwards:
    """The forwards of one model, which all its covered modules share.

    Attributes:
        quantizers: one for each unique tensor, by index.
        learned: what they learn.
        running: by thread, the forward of each call that runs, the outermost first.
        replayed: the forward whose backward runs, in which checkpoints run parts of it again.
        always_quantized: training computes with quantized weights too.
        expects_optimizer: training is refused, because no optimizer has what is learned.
        root: the model; None in copies of a part of it.
        ran: whether a forward has ended.
    """

    def __init__(self, quantizers: Sequence[WeightQuantizer], learned: Learned) -> None:
        self.quantizers = quantizers
        self.learned = learned
        self.cache = EvalCache(len(quantizers))
        self.running: dict[int, list[Forward]] = {}
        self.replayed: Forward | None = None
        self.always_quantized = False
        self.expects_optimizer = False
        self.root: ReferenceType[nn.Module] | None = None
        self.ran = False
        # Modes in which a forward was searched for writes that leave no trace in versions.
        self._searched: set[bool] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are outside of every forward."""
        return {**self.__dict__, "running": {}, "replayed": None, "root": None}

    def current(self) -> Forward | None:
        """The forward that runs, or whose backward runs."""
        if self.running:
            stack = self.running.get(_thread())
            if stack:
                return stack[-1]
        return self.replayed if self.replayed is not None and in_backward() else None

    def runs(self) -> bool:
        """Whether a call runs in this thread."""
        return bool(self.running) and _thread() in self.running

    @contextmanager
    def entered(self, places: Sequence[Place]) -> Iterator[None]:
        """A block that computes as a forward does."""
        forward = self.enter(places)
        try:
            self.begin(forward)
            yield
        finally:
            self.end(forward)
        self.leave(forward, None)

    def enter(self, places: Sequence[Place], entry: nn.Module | None = None) -> Forward:
        """Computes what an outermost forward computes with.

        Args:
            places: the tensors of the module and those below.
            entry: the module that is called; None in a block that computes, which may train
                without an optimizer.

        Raises:
            AttachError: a tensor is not what it was when the quantizer was attached.
            OptimizerError: training must not begin.
            WeightError: in eval, a weight or a bitwidth is not finite.
        """
        if not in_backward():
            self.replayed = None
        parameter = self.learned.parameter
        if parameter is not None and parameter.is_meta and is_plain():
            self.learned()  # a hook of offloading brings the numbers
        forward = Forward(len(self.quantizers), entry)
        training: list[tuple[WeightQuantizer, Tensor]] = []
        evaluated: list[tuple[WeightQuantizer, Tensor]] = []
        seen: set[int] = set()
        for place in places:
            quantizer, owner, _ = place
            if is_managed(owner):
                continue  # FSDP's tensors are whole only while their module runs
            base = place.base()
            if base.is_meta or quantizer.index in seen:
                continue  # offloaded tensors come when their module runs
            self._check_shape(quantizer, base)
            seen.add(quantizer.index)
            trains = owner.training and not self.always_quantized
            (training if trains else evaluated).append((quantizer, base))
        if training:
            if entry is not None and self.expects_optimizer and torch.is_grad_enabled():
                self._refuse_training()
            self._draw(forward, training)
        if evaluated:
            self._evaluate(forward, evaluated)
        if is_plain():
            self._watch_writes(forward, bool(training))
        return forward

    def enter_part(self, forward: Forward, places: Iterable[Place]) -> None:
        """Draws for a sharded module that runs in a forward, where its tensors are whole.

        Each of its calls draws anew, as a checkpoint expects of what it runs again.
        """
        pairs = [
            (q, place.base())
            for place in places
            for q, owner, _ in [place]
            if is_managed(owner) and owner.training and not self.always_quantized
        ]
        if pairs:
            self._draw(forward, pairs)

    def begin(self, forward: Forward) -> None:
        """Begins one call."""
        self.running.setdefault(_thread(), []).append(forward)

    def end(self, forward: Forward) -> None:
        """Ends one call, also one that was interrupted before it was noted."""
        stack = self.running.get(_thread(), [])
        if stack and stack[-1] is forward:
            stack.pop()
        if not stack:
            self.running.pop(_thread(), None)

    def leave(self, forward: Forward, output: Any) -> None:
        """Ends an outermost forward that returned, and waits for its backward.

        Raises:
            AttachError: the forward wrote to a quantized tensor, which cannot last.
        """
        self.ran = True
        written = None if forward.writes is None else forward.writes.first()
        forward.writes = None
        if written is not None:
            self.forget()
            raise _refused_write(self.quantizers[written].plan.name)
        if not torch.is_grad_enabled() or not is_plain() or not any(forward.samples):
            return
        # Parameters among the outputs outlive this forward, and so would a hook on them.
        computed = [t for t in output_tensors(output) if t.requires_grad and not t.is_leaf]
        for tensor in computed:
            tensor.register_hook(lambda grad: self._replay(forward))  # type: ignore[no-untyped-call]
        if not computed and not in_backward():
            self.replayed = forward  # what the output holds is unknown, so any backward may be its

    def read(self, forward: Forward, place: Place, base: Tensor, training: bool) -> Tensor:
        """What a forward computes with in place of a tensor."""
        quantizer = place.quantizer
        if base.is_meta:
            return base
        training = training and not self.always_quantized
        sample = forward.samples[quantizer.index]
        if sample is None or sample.training != training or not sample.stands_for(base):
            sample = self._at_reading(forward, place, base, training)
        if not training:
            quantizer.readings.ever = True
            return self._quantized(sample, base)
        quantizer.readings.note_training()
        if not torch.is_grad_enabled():
            sample.read_without_grad = True
            return sample.value.to(base.dtype)
        # Reentrant checkpoints run without gradients first, and then build a graph of their
        # own for each part: two of them must not share a node.
        own_graph = sample.read_without_grad and in_backward()
        if sample.connected is None or own_graph or sample.weight is not base:
            return self._connect(quantizer, base, sample, self.learned.part(quantizer.index))
        return sample.connected

    def forget(self) -> None:
        """Has all quantized weights computed again."""
        self.cache.clear()

    def switch(self, place: Place, training: bool) -> None:
        """Takes notice that the module of a tensor is switched to training or to eval."""
        self.forget()
        # Some loops call train() in each step.
        if not training or not place.owner.training:
            self.look(place)

    def look(self, place: Place) -> None:
        """Looks for zeros that must stay; see `diffq.attach.weight`."""
        weight = place.owner._parameters.get(place.name)
        parameter = self.learned.parameter
        # What other parametrizations compute may change with each computation.
        if weight is None or not is_plain() or weight.is_meta or is_dtensor(weight):
            return
        if parameter is None or not (parameter.is_meta or is_dtensor(parameter)):
            learned = self.learned.part(place.quantizer.index)
            place.quantizer.look(weight.detach(), None if learned is None else learned.detach())

    def _check_shape(self, quantizer: WeightQuantizer, base: Tensor) -> None:
        if base.shape != quantizer.plan.shape:
            was, now = list(quantizer.plan.shape), list(base.shape)
            raise AttachError(quantizer.plan.sites[0].changed(f"went from shape {was} to {now}"))

    def _draw(self, forward: Forward, pairs: Iterable[tuple[WeightQuantizer, Tensor]]) -> None:
        parts = self.learned.parts()
        kinds: dict[type[WeightQuantizer], list[tuple[WeightQuantizer, Tensor]]] = {}
        for quantizer, base in pairs:
            kinds.setdefault(type(quantizer), []).append((quantizer, base))
        for kind, alike in kinds.items():
            learned = [_beside(base, parts[q.index]) for q, base in alike]
            with torch.no_grad():
                quantizers, bases = zip(*alike, strict=True)
                samples = kind.draw_all(quantizers, bases, learned)
            for (q, base), sample, part in zip(alike, samples, learned, strict=True):
                if sample is None:
                    sample = Sample(base, base.detach(), is_weight=True)
                if torch.is_grad_enabled():
                    sample.connected = self._connect(q, base, sample, part)
                forward.samples[q.index] = sample

    def _connect(
        self, quantizer: WeightQuantizer, base: Tensor, sample: Sample, learned: Tensor | None
    ) -> Tensor:
        learned = _beside(base, learned)
        connected = base if sample.is_weight else quantizer.connect(base, sample, learned)
        if learned is not None and not quantizer.learning and is_distributed():
            # DistributedDataParallel waits for the gradient of every parameter.
            connected = Tied.apply(connected, learned)  # type: ignore[no-untyped-call]
        return connected

    def _evaluate(self, forward: Forward, pairs: Sequence[tuple[WeightQuantizer, Tensor]]) -> None:
        parts = self.learned.parts()
        cache = self.cache if is_plain() else None
        if cache is not None:
            cache.validate(self.learned.flat(), [base for _, base in pairs])
        for quantizer, base in pairs:
            value = None if cache is None else cache.get(quantizer.index, base)
            if value is None:
                value = self._quantize(quantizer, base, parts[quantizer.index])
                if cache is not None:
                    cache.put(quantizer.index, base, value)
            forward.samples[quantizer.index] = Sample(base, value, training=False)

    def _quantize(self, quantizer: WeightQuantizer, base: Tensor, learned: Tensor | None) -> Tensor:
        self._check_shape(quantizer, base)
        learned = None if learned is None else _beside(base, learned.detach())
        # Values that inference mode made would be of no use to a later backward.
        with torch.inference_mode(False) if is_plain() and not base.is_inference() else _nothing():
            return quantizer.quantize(base.detach(), learned)

    def _quantized(self, sample: Sample, base: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and base.requires_grad):
            return sample.value
        if sample.connected is None or sample.weight is not base:
            connected = straight_through(base, sample.value)
            if is_plain():
                # After a backward comes a step, and fused optimizers leave no trace of theirs.
                connected.register_hook(lambda grad: self.forget())  # type: ignore[no-untyped-call]
            if sample.weight is not base:
                return connected
            sample.connected = connected
        return sample.connected

    def _at_reading(self, forward: Forward, place: Place, base: Tensor, training: bool) -> Sample:
        quantizer = place.quantizer
        old = forward.samples[quantizer.index]
        ours = isinstance(base, nn.Parameter) and not is_managed(place.owner)
        if old is not None and ours and isinstance(old.weight, nn.Parameter):
            if not old.stands_for(base):
                raise AttachError(place.changed("was assigned or untied in a forward"))
        self._check_shape(quantizer, base)
        if training:
            self._draw(forward, [(quantizer, base)])
        else:
            value = self._quantize(quantizer, base, self.learned.part(quantizer.index))
            forward.samples[quantizer.index] = Sample(base, value, training=False)
        return cast(Sample, forward.samples[quantizer.index])

    def _refuse_training(self) -> None:
        parameter = self.learned.parameter
        if parameter is None or not parameter.requires_grad:
            return
        if any(quantizer.learning for quantizer in self.quantizers):
            raise OptimizerError(
                "The quantizer learns parameters that no optimizer was given. "
                "Call quantizer.setup_optimizer(optimizer) before training; "
                "if they are meant to stay as they are, call quantizer.no_optimizer()."
            )

    def _watch_writes(self, forward: Forward, training: bool) -> None:
        forward.writes = Writes(forward.samples, thorough=training not in self._searched)
        self._searched.add(training)

    def _replay(self, forward: Forward) -> None:
        self.replayed = forward
        call_after_backward(self._end_replay)

    def _end_replay(self) -> None:
        self.replayed = None


def _refused_write(name: str) -> AttachError:
    return AttachError(
        f"A forward must not write to a quantized tensor, but {name} was written to, and the write "
        "would be lost: in a forward, reading gives the tensor that is computed with. Write "
        f"before the forward, or pass exclude=[{name!r}]."
    )


def _thread() -> int:
    """The key of this thread; compilers trace one at a time."""
    return 0 if torch.compiler.is_compiling() else get_ident()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _beside(weight: Tensor, learned: Tensor | None) -> Tensor | None:
    """What is learned on the device of its weight."""
    if learned is None or learned.device == weight.device:
        return learned
    return learned.to(weight.device, non_blocking=True)
