"""How one tensor is quantized: what each method implements.

A padding row, a pruned weight or a mask is zero by design, and quantization keeps it zero. To see
zeros takes a pass over the weight, and to act on them waits for the device, which training must
not. So a quantizer is told (`look`) at these times whether there may be zeros:

| when | whose weights |
| --- | --- |
| the quantizer is attached | all |
| a state dict is loaded | parameters, whole ones |
| each `eval()`, and `train()` after it | parameters, whole ones |
| eval, export and sizes, where no compiler traces them | all, as they are computed with |
| a training forward, a compiled forward | none |

Where there may be zeros, each forward finds out on the device whether there are, so zeros that go
leave no trace. Zeros that come are seen at the next of these times. Tensors that another
parametrization computes, and those that FSDP shards, are seen in the first and fourth row alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffq.attach.batch import Batch
from diffq.attach.plan import TensorPlan
from diffq.attach.readings import Readings
from diffq.attach.sample import Sample
from diffq.errors import MismatchError
from diffq.format.records import Record
from diffq.numerics.fineness import Fineness
from diffq.numerics.noise import straight_through
from diffq.numerics.size import Grouping

if TYPE_CHECKING:
    from typing_extensions import Self


class WeightQuantizer(ABC):
    """The quantizer of one unique tensor: it draws, connects, quantizes and records.

    It holds neither the weight nor what is learned: each call gets both. A subclass implements
    `draw`, `quantize`, `record` and `size_bits`, and where something is learned `start`.

    `learned` is always this tensor's part of the model's learned parameter, in the shape that
    `start` gave it; None if nothing is learned.

    Attributes:
        plan: the tensor.
        group_size: weights that share a bitwidth or an index.
        index_bits: bits of all indices that stand for the weights in place of levels; else 0.
        index: the place in the model's list of weight quantizers.
        stage: 0 to 9, what training does with the tensor; part of the state dict.
        readings: who has read the weight, which decides whether its bits learn.
        slot: the sample of the forward that runs, for compiled code: it finds the sample with
            the quantizer, so that layers which are alike share their code.
    """

    #: What users call the method.
    method: ClassVar[str]

    #: Whether the size depends on the weights, so that batches are `CodedBatch`es and measure it.
    coded: ClassVar[bool] = False

    def __init__(self, plan: TensorPlan) -> None:
        self.plan = plan
        self.group_size = plan.numel
        self.index_bits = 0
        self.index = 0
        self.stage = 0
        self.readings = Readings()
        self.slot: Sample | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no sample."""
        return {**self.__dict__, "slot": None}

    def start(self, weight: Tensor) -> Tensor | None:
        """What is learned, at first: float32 of any shape; None if nothing is.

        Args:
            weight: the weight when the quantizer is attached; it may be on the meta device.
        """
        return None

    def restart(self, weight: Tensor) -> Tensor | None:
        """What is learned, once weights were trained plain; None to leave it as it is."""
        return None

    def check(self, weight: Tensor) -> None:
        """Raises WeightError for weights beyond the grids that can be stored."""
        return None

    def look(self, weight: Tensor, learned: Tensor | None) -> None:
        """Looks for weights that are exactly zero and must stay so; waits for the device.

        Nothing has to be done where zero is a level of every grid.
        """
        return None

    @property
    def alike(self) -> Hashable:
        """What quantizers have in common that are in one `Batch`, besides class and group size."""
        return None

    @classmethod
    def batch(cls, quantizers: Sequence[Self]) -> Batch:
        """A batch of quantizers that are alike, by default one that takes them one by one."""
        return Batch(quantizers)

    @abstractmethod
    def draw(self, weight: Tensor, learned: Tensor | None) -> Sample | None:
        """What one training forward computes with; None for the weight itself."""

    def connect(self, weight: Tensor, sample: Sample, learned: Tensor | None) -> Tensor:
        """The value with its gradient, in the weight's dtype: the straight-through estimator."""
        return straight_through([weight], [sample.value])[0]

    @abstractmethod
    def quantize(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """The true quantized weight, in the weight's shape and dtype, without gradient."""

    @abstractmethod
    def record(self, weight: Tensor, learned: Tensor | None) -> Record:
        """What is stored of the weight: it decodes to `quantize` bit for bit."""

    @abstractmethod
    def size_bits(self) -> Tensor | float:
        """Bits of the stored weight, 0-dim; those that are learned are left to `grouping`."""

    @property
    def grouping(self) -> Grouping | None:
        """What the size of learned bitwidths depends on; None if none are learned."""
        return None

    def stored_bits(self, record: Record) -> int:
        """Bits of the stored weight: Equation 12 of the DiffQ paper."""
        return record.stored_bits()

    @property
    def fineness(self) -> Fineness | None:
        """What learned numbers say about the size, also once fixed; None if they say nothing."""
        return None

    def finest(self, weight: Tensor) -> Tensor | None:
        """The highest numbers of `fineness` that a weight allows, float64 on the CPU.

        None where it allows all.
        """
        return None

    def fix_size(self, learned: Tensor | None) -> None:
        """Fixes what decides the size, and rounds in training from here on."""
        return None

    @property
    def learning(self) -> bool:
        """Whether training moves what is learned of this tensor."""
        return True

    def meaning(self) -> dict[str, Any]:
        """The settings without which a state dict would be another model: names to numbers."""
        return {}

    def kept(self) -> Tensor | None:
        """Integers that a state dict holds besides `learned`, int32; None if there are none."""
        return None

    def set_stage(self, stage: int, learned: Tensor | None, kept: Tensor | None) -> None:
        """Takes up the stage of a state dict.

        Args:
            stage: the stage.
            learned: what is learned, loaded already.
            kept: as `kept`; None if the state dict has none.
        """
        self.stage = stage

    def read_earlier(
        self, entries: Mapping[str, Tensor], learned: Tensor | None
    ) -> tuple[int, Tensor | None]:
        """Reads the entries of a state dict from when quantizers were modules.

        Args:
            entries: "logits", "scale", "codebook", "indices" and "_extra_state".
            learned: takes what was learned.

        Returns:
            The stage, and what `kept` gives.
        """
        for name in ("logits", "scale", "codebook"):
            if learned is None or name not in entries:
                continue
            if entries[name].shape != learned.shape:
                raise MismatchError(
                    f"The checkpoint has {name} of shape {list(entries[name].shape)} for "
                    f"{self.plan.name}, and the quantizer of this model {list(learned.shape)}. "
                    "Make the quantizer with the settings of the checkpoint."
                )
            learned.copy_(entries[name])
        return 0, None

    def settled(self) -> Tensor | None:
        """What a state dict holds in place of `learned`, once training no longer moves it."""
        return None

    def group_bits(self, learned: Tensor | None) -> NDArray[np.uint8] | None:
        """Bitwidth of each group, uint8 [groups]; None if there are no levels."""
        return None
