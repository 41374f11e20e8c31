"""The forwards of an attached model: what they compute with, from entry to backward.

| state of the model | `running()` | `replayed` | reading a quantized tensor gives |
| --- | --- | --- | --- |
| outside of a forward | empty | none, or of another backward | the Parameter |
| in a forward | its `Forward` | none | the sample, or the quantized tensor |
| in the backward of its output | empty | its `Forward` | the same |
| any of these, training in plain float | as above | as above | the Parameter |

A `Forward` is made by the outermost call of a covered module's `forward`. It draws all samples
of training at once, outside of regions that activation checkpointing runs again, and looks
whether the quantized weights of eval are still right. It is gone with the graph of its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from diffq.attach.cache import EvalCache
from diffq.attach.drawing import Drawing
from diffq.attach.learned import Learned
from diffq.attach.place import Place
from diffq.attach.sample import Forward, Sample
from diffq.attach.weight import WeightQuantizer
from diffq.attach.writes import Writes
from diffq.numerics.noise import straight_through
from diffq.torch_inside.graph import (
    call_after_backward,
    in_backward,
    is_plain,
    is_traced,
    output_tensors,
    untraced,
)
from diffq.torch_inside.modules import parameter_in
from diffq.torch_inside.sharding import is_dtensor, is_managed


class Forwards:
    """The forwards of one model, which all its covered modules share.

    Attributes:
        quantizers: one for each unique tensor, by index.
        learned: what they learn.
        replayed: the forward whose backward runs, in which checkpoints run parts of it again.
        always_quantized: training computes with quantized weights too.
        expects_optimizer: training is refused, because no optimizer has what is learned.
        root: the model.
        attached: false in copies of a part of a model, which are plain.
        ran: whether a forward has ended.
        stacks: by thread, the forward that runs and those of blocks in it.
    """

    def __init__(self, quantizers: Sequence[WeightQuantizer], learned: Learned) -> None:
        self.quantizers = quantizers
        self.learned = learned
        self.cache = EvalCache(len(quantizers))
        self.replayed: Forward | None = None
        self.always_quantized = False
        self.expects_optimizer = False
        self.root: ReferenceType[nn.Module] | None = None
        self.attached = False
        self.ran = False
        # The outermost forwards of all threads, for compiled code, which knows no threads.
        self.marks: list[Forward] = []
        self.stacks: dict[int, list[Forward]] = {}
        # Modes in which a forward was searched for writes that leave no trace in versions.
        self._searched: set[bool] = set()
        self._drawing = Drawing(learned)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are outside of every forward."""
        outside: dict[str, Any] = {
            "stacks": {},
            "marks": [],
            "replayed": None,
            "root": None,
            "attached": False,
        }
        return {**self.__dict__, **outside}

    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the model by the first of their names."""
        model = None if self.root is None else self.root()
        return {} if model is None else dict(model.named_parameters())

    def running(self) -> list[Forward]:
        """The forward that runs in this thread, and those of blocks in it; empty outside."""
        thread = get_ident()
        stack = self.stacks.get(thread)
        if stack is None:
            stack = self.stacks[thread] = []
        return stack

    def current(self) -> Forward | None:
        """The forward that runs in this thread, or whose backward runs."""
        if torch.compiler.is_compiling():
            return self.marks[-1] if self.marks else None
        stack = self.stacks.get(get_ident())
        if stack:
            return stack[-1]
        return self.replayed if self.replayed is not None and in_backward() else None

    @contextmanager
    def entered(self, places: Sequence[Place]) -> Iterator[None]:
        """A block that computes as a forward does, with the samples of a forward around it."""
        around = self.current()
        forward = self.enter(places) if around is None else around
        stack = self.running()
        depth = len(stack)
        try:
            stack.append(forward)
            self.marks.append(forward)
            yield
        finally:
            del stack[depth:]
            if self.marks:
                self.marks.pop()
            for quantizer in self.quantizers if around is None else ():
                quantizer.slot = None
        if around is None:
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
        if is_traced():
            return untraced(lambda: self._enter(places, entry))
        return self._enter(places, entry)

    def _enter(self, places: Sequence[Place], entry: nn.Module | None) -> Forward:
        if not in_backward():
            self.replayed = None
        parameter = self.learned.parameter
        if parameter is not None and parameter.is_meta and is_plain():
            self.learned()  # a hook of offloading brings the numbers
        forward, plain = Forward(len(self.quantizers), entry), is_plain()
        shares = plain and entry is not None and not torch.is_grad_enabled()
        if shares and self.cache.begin(forward, places, parameter):
            for quantizer, sample in zip(self.quantizers, forward.quantized, strict=True):
                quantizer.slot = sample
            return forward
        training: list[tuple[Place, Tensor]] = []
        evaluated: list[tuple[Place, Tensor]] = []
        seen: set[int] = set()
        for place in places:
            quantizer, owner = place.quantizer, place.owner
            if is_managed(owner) or quantizer.index in seen:
                continue  # FSDP's tensors are whole only while their module runs
            base = place.base()
            if base.is_meta:
                continue  # offloaded tensors come when their module runs
            if plain:
                place.check_shape(base)
            seen.add(quantizer.index)
            trains = owner.training and not self.always_quantized
            if trains and self.learned.plain:
                continue
            (training if trains else evaluated).append((place, base))
        if training:
            if entry is not None and self.expects_optimizer and torch.is_grad_enabled():
                self.learned.refuse_training()
            self._draw(forward, training)
        if evaluated:
            self._evaluate(forward, evaluated)
        pairs = training + evaluated
        for place, _ in pairs:
            place.quantizer.slot = forward.first(place.quantizer.index)
        if plain:
            thorough = bool(training) not in self._searched
            self._searched.add(bool(training))
            forward.writes = Writes(forward, pairs, thorough)
            if shares and not thorough:
                self.cache.keep(forward, places, pairs)
        return forward

    def enter_part(self, forward: Forward, places: Iterable[Place]) -> None:
        """Draws for a sharded module that runs in a forward, where its tensors are whole.

        Each of its calls draws anew, as a checkpoint expects of what it runs again.
        """
        pairs = [
            (place, place.base())
            for place in places
            if is_managed(place.owner) and place.owner.training and not self.always_quantized
        ]
        if pairs and not self.learned.plain:
            self._draw(forward, pairs)

    def leave(self, forward: Forward, output: Any) -> None:
        """Ends an outermost forward that returned, and waits for its backward.

        Raises:
            AttachError: the forward wrote to a quantized tensor, which cannot last.
        """
        # A block may read a single weight.
        self.ran = self.ran or forward.entry is not None
        writes, forward.writes = forward.writes, None
        if writes is not None and not is_traced():
            try:
                writes.check()
            except BaseException:
                self.forget()
                raise
        if not torch.is_grad_enabled() or not is_plain() or is_traced():
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
        if training and self.learned.plain:
            if not torch.compiler.is_compiling():
                quantizer.readings.note(training=False)
            return self._drawing.plain(quantizer, base)
        if torch.compiler.is_compiling():
            slot = quantizer.slot  # an index would make code of each layer its own
            sample = slot if slot is not None and slot.training == training else None
        else:
            sample = forward.samples(training)[quantizer.index]
        if sample is None or not sample.stands_for(base) or forward.is_outdated(sample):
            sample = self._at_reading(forward, place, base, training)
        if not torch.compiler.is_compiling():  # checkpoints allow no side effects
            quantizer.readings.note(training)
        if not training:
            return self._quantized(forward, sample, base)
        if not torch.is_grad_enabled():
            sample.read_without_grad = True
            return sample.value.to(base.dtype)
        # Reentrant checkpoints run without gradients first, and then build a graph of their
        # own for each part: two of them must not share a node.
        own_graph = sample.read_without_grad and in_backward()
        if sample.connected is None or own_graph or sample.weight is not base:
            return self._drawing.connect(quantizer, base, sample)
        return sample.connected

    def forget(self) -> None:
        """Has all quantized weights computed again."""
        self.cache.clear()
        for stack in list(self.stacks.values()):
            for forward in stack:
                forward.forget()

    def switch(self, place: Place, training: bool) -> None:
        """Takes notice that the module of a tensor is switched to training or to eval."""
        self.forget()
        # Some loops call train() in each step.
        if not training or not place.owner.training:
            self.look(place)

    def look(self, place: Place) -> None:
        """Looks for zeros that must stay; see `diffq.attach.weight`."""
        weight = parameter_in(place.owner, place.name)
        parameter = self.learned.parameter
        # What other parametrizations compute may change with each computation.
        if weight is None or not is_plain() or weight.is_meta or is_dtensor(weight):
            return
        if parameter is None or not (parameter.is_meta or is_dtensor(parameter)):
            learned = self.learned.part(place.quantizer.index)
            place.quantizer.look(weight.detach(), None if learned is None else learned.detach())

    def _draw(self, forward: Forward, pairs: Sequence[tuple[Place, Tensor]]) -> None:
        tensors = [(place.quantizer, base) for place, base in pairs]
        for quantizer, sample in self._drawing.draw(tensors):
            forward.put(quantizer.index, sample)
            if torch.compiler.is_compiling():
                # Reading must change nothing in what checkpoints run again.
                quantizer.readings.note(training=True)

    def _evaluate(self, forward: Forward, pairs: Sequence[tuple[Place, Tensor]]) -> None:
        cache = self.cache if is_plain() else None
        indices, bases = [place.quantizer.index for place, _ in pairs], [base for _, base in pairs]
        values: list[Tensor | None] = [None] * len(pairs)
        if cache is not None:
            values = cache.values(self.learned.flat(), indices, bases)
        each = zip(pairs, values, strict=True)
        missing = [(place.quantizer, base) for (place, base), value in each if value is None]
        quantized = self._drawing.quantize(missing)
        for base, index, value in zip(bases, indices, values, strict=True):
            sample = Sample(base, quantized[index] if value is None else value, training=False)
            if cache is not None and value is None:
                cache.put(index, base, sample.value)
            forward.put(index, sample)

    def _quantized(self, forward: Forward, sample: Sample, base: Tensor) -> Tensor:
        # Tracers run a model twice, and compare the graphs.
        if not (torch.is_grad_enabled() and base.requires_grad) or is_traced():
            return sample.value
        if sample.connected is not None and sample.weight is base:
            return sample.connected
        (connected,) = straight_through([base], [sample.value])
        if is_plain():
            # After a backward comes a step, and fused optimizers leave no trace of theirs.
            connected.register_hook(lambda grad: self.forget())  # type: ignore[no-untyped-call]
        if sample.weight is base and forward.ready is None:
            sample.connected = connected
        return connected

    def _at_reading(self, forward: Forward, place: Place, base: Tensor, training: bool) -> Sample:
        index = place.quantizer.index
        old = forward.samples(training)[index]
        ours = isinstance(base, nn.Parameter) and not is_managed(place.owner)
        if old is not None and ours and isinstance(old.weight, nn.Parameter):
            if not old.stands_for(base):
                raise place.replaced(old.weight)
        place.check_shape(base)
        if training:
            self._draw(forward, [(place, base)])
        else:
            value = self._drawing.quantize([(place.quantizer, base)])[index]
            forward.put(index, Sample(base, value, training=False))
        return cast(Sample, forward.samples(training)[index])

    def _replay(self, forward: Forward) -> None:
        self.replayed = forward
        # The graph of gradients may have a backward of its own, which passes no output.
        if not torch.is_grad_enabled():
            call_after_backward(self._end_replay)

    def _end_replay(self) -> None:
        self.replayed = None
