"""A quantizer as people see it: its table, its numbers for a log, its page."""

from __future__ import annotations

from abc import abstractmethod

from diffq.attach.attachment import Attachment
from diffq.attach.plan import TensorPlan
from diffq.errors import DiffqError
from diffq.format.container import Codec
from diffq.numerics.size import MEGABYTE_BITS
from diffq.quantizers.sizes import Rows, head, mean_bits, size_rows, tensor_size, total_bits
from diffq.reports.markup import joined, tag
from diffq.reports.model import model_page
from diffq.reports.notebook import fragment
from diffq.reports.summary import reader_of
from diffq.storage.state import Snapshot
from diffq.storage.writing import PathLike, write_file
from diffq.torch_inside.sharding import is_sharded

_SHARDED = (
    "sharded: bits and MB take all ranks to compute. Call mean_bits(), true_model_size() or "
    "metrics() on every rank"
)


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
            bits; and `diffq/bits/<tensor>`, the mean of each quantized tensor but small ones.

        Raises:
            WeightError: a weight or bitwidth is not finite.
            AttachError: a quantized tensor was removed or replaced.
        """
        sizes = self._attachment.each_weight(tensor_size)
        levels = [size for size in sizes if size.level_bits]
        numbers = {"diffq/size_mb": total_bits(sizes, self._raw_bits()) / MEGABYTE_BITS}
        if levels:
            numbers["diffq/mean_bits"] = mean_bits(levels)
        learned = [size for size in levels if not size.small]
        return numbers | {f"diffq/bits/{size.names[0]}": size.mean_bits for size in learned}

    def report(self, path: PathLike | None = None, codec: Codec = "rans") -> str:
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
        return f"{title}\n{rows}"

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
        rows = [head(q.plan.names, q.plan.shape, q.group_size) for q in quantizers]
        last = (f"{len(self.plan) - len(rows)} without levels", "", "")
        return Rows(("tensor", "shape", "groups"), rows, [last])

    def _measured_rows(self) -> Rows:
        sizes = self._attachment.each_weight(tensor_size)
        return size_rows(sizes, self._raw_bits(), len(self.plan))
