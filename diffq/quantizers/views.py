"""A quantizer as people see it: its table, its numbers for a log, its page."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from diffq.attach.attachment import Attachment
from diffq.attach.plan import TensorPlan
from diffq.attach.weight import WeightQuantizer
from diffq.errors import DiffqError
from diffq.format.container import Codec
from diffq.format.groups import group_count, stream_counts
from diffq.numerics.size import MEGABYTE_BITS
from diffq.reports.markup import joined, tag
from diffq.reports.model import model_page
from diffq.reports.notebook import fragment
from diffq.reports.summary import reader_of
from diffq.reports.tables import table
from diffq.reports.text import shape
from diffq.storage.state import Snapshot
from diffq.storage.writing import PathLike, write_file
from diffq.torch_inside.sharding import is_sharded

_SHARDED = (
    "sharded: bits and MB take all ranks to compute. Call mean_bits(), true_model_size() or "
    "metrics() on every rank"
)


class TensorSize(NamedTuple):
    """Bits of one tensor: of its levels or indices, and of all that is stored of it."""

    plan: TensorPlan
    group_size: int
    stored_bits: int
    level_bits: int

    @property
    def mean_bits(self) -> float:
        """Bits per weight."""
        return self.level_bits / self.plan.numel


class Rows(NamedTuple):
    """A table of a quantizer: its heading, its rows, and those after them."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    last: Sequence[tuple[str, ...]]


class Views:
    """Adds `metrics`, `report`, and how a quantizer is shown on a terminal and in a notebook."""

    _attached: Attachment | None

    @property
    @abstractmethod
    def _attachment(self) -> Attachment:
        """What is on the model."""

    @property
    @abstractmethod
    def plan(self) -> tuple[TensorPlan, ...]:
        """Every unique tensor of the model's state dict."""

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """The whole model as frozen records."""

    @abstractmethod
    def _raw_bits(self) -> float:
        """Bits of all tensors without a weight quantizer."""

    def metrics(self) -> dict[str, float]:
        """Sizes and bitwidths as plain numbers, to be logged.

        A collective if the model is sharded: call it on every rank, and log on one. It reads
        all weights, so call it every few hundred steps rather than in each.

            >>> wandb.log(quantizer.metrics(), step=step)

        Returns:
            `diffq/size_mb`, which is `true_model_size()`; `diffq/mean_bits`, unless no weight has
            bits; and `diffq/bits/<tensor>`, the mean of each quantized tensor.

        Raises:
            WeightError: a weight or bitwidth is not finite.
            AttachError: a quantized tensor was removed or replaced.
        """
        sizes = self._attachment.each_weight(tensor_size)
        levels = [size for size in sizes if size.level_bits]
        numbers = {"diffq/size_mb": _total(sizes, self._raw_bits()) / MEGABYTE_BITS}
        if levels:
            numbers["diffq/mean_bits"] = _mean(levels)
        return numbers | {f"diffq/bits/{size.plan.name}": size.mean_bits for size in levels}

    def report(self, path: PathLike | None = None, codec: Codec = "zstd") -> str:
        """A web page about the file that `diffq.save` would write now.

        It shows the size, where bytes and bits are, how the bits would change in a smaller file,
        and a table of all tensors. It loads nothing from anywhere. Encodes the whole model, as
        `diffq report` does for a file. A collective if the model is sharded: call it on every
        rank, with a path on one.

        Args:
            path: a file to write the page to.
            codec: see `diffq.save`.

        Returns:
            The page, as HTML.

        Raises:
            WeightError: a weight or bitwidth is not finite.
            AttachError: tied tensors were untied, or the model was changed otherwise.
            ConfigError: an unknown codec.
            OSError: the page cannot be written.
        """
        snapshot = self.snapshot()
        name = f"{type(self).__name__} of {type(self._attachment.model).__name__}"
        page = model_page(reader_of(snapshot.records, snapshot.aliases, codec), name)
        if path is not None:
            write_file(path, [page.encode()])
        return page

    def __repr__(self) -> str:
        """A table: tensor, shape, groups, mean bits, MB; without bits and MB if sharded."""
        title, rows = self._shown()
        if rows is None:
            return title
        return f"{title}\n{table(rows.header, [*rows.rows, *rows.last], left=2)}"

    def _repr_html_(self) -> str:
        """The table of `repr`, for notebooks."""
        title, rows = self._shown()
        return joined(tag("p", title), fragment(*rows) if rows else "")

    def _shown(self) -> tuple[str, Rows | None]:
        """A title and a table; never a collective, since debuggers and single ranks ask for it."""
        name = type(self).__name__
        if self._attached is None:
            return f"{name}(detached)", None
        if is_sharded(self._attached.model):
            return f"{name}, {_SHARDED}", self._planned_rows()
        try:
            return name, self._measured_rows()
        except DiffqError as error:
            return f"{name}({error})", None

    def _planned_rows(self) -> Rows:
        quantizers = [q for q in self._attachment.quantizers if q.plan.quantized]
        rows = [_head(quantizer.plan, quantizer.group_size) for quantizer in quantizers]
        last = (f"{len(self.plan) - len(rows)} without levels", "", "")
        return Rows(("tensor", "shape", "groups"), rows, [last])

    def _measured_rows(self) -> Rows:
        sizes = self._attachment.each_weight(tensor_size)
        total = _total(sizes, self._raw_bits())
        levels = [size for size in sizes if size.level_bits]
        rest = total - sum(size.stored_bits for size in levels)
        rows = [
            (*_head(s.plan, s.group_size), f"{s.mean_bits:.2f}", _megabytes(s.stored_bits))
            for s in levels
        ]
        mean = f"{_mean(levels):.2f}" if levels else ""
        last = [
            (f"{len(self.plan) - len(rows)} without levels", "", "", "", _megabytes(rest)),
            ("total", "", "", mean, _megabytes(total)),
        ]
        return Rows(("tensor", "shape", "groups", "bits", "MB"), rows, last)


def tensor_size(quantizer: WeightQuantizer, weight: Tensor, learned: Tensor | None) -> TensorSize:
    """The size of what a weight quantizer stores of its weight."""
    stored_bits = quantizer.record(weight, learned).stored_bits()
    plan, group_size = quantizer.plan, quantizer.group_size
    return TensorSize(plan, group_size, stored_bits, level_bits(quantizer, learned))


def level_bits(quantizer: WeightQuantizer, learned: Tensor | None) -> int:
    """Bits of the levels or indices of a tensor; 0 if it has neither."""
    bits = quantizer.group_bits(learned)
    if bits is None:
        return quantizer.index_bits
    counts = stream_counts(bits, quantizer.group_size, quantizer.plan.numel)
    return sum(width * count for width, count in counts.items())


def _total(sizes: Sequence[TensorSize], raw_bits: float) -> float:
    return raw_bits + sum(size.stored_bits for size in sizes)


def _mean(levels: Sequence[TensorSize]) -> float:
    return sum(s.level_bits for s in levels) / sum(s.plan.numel for s in levels)


def _head(plan: TensorPlan, group_size: int) -> tuple[str, str, str]:
    groups = group_count(plan.numel, group_size)
    return " = ".join(plan.names), shape(plan.shape), str(groups)


def _megabytes(bits: float) -> str:
    return f"{bits / MEGABYTE_BITS:.4f}"
