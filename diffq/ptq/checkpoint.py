"""A state dict to a file, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffq.attach.plan import LEARNED, Rules
from diffq.checks import check_number
from diffq.errors import ConfigError
from diffq.format.container import Codec, encode_parts
from diffq.format.kinds.grid import GridRecord
from diffq.numerics.size import MEGABYTE
from diffq.ptq.budget import GROUP_SIZE, Fitted, Report, quantize_to_size
from diffq.ptq.importance import Source
from diffq.ptq.state import Settings, all_names, quantize_state
from diffq.quantizers.progress import ProgressBar
from diffq.quantizers.sizes import record_size, size_rows
from diffq.storage.state import FORMAT, Snapshot, record_tensor, to_state
from diffq.storage.writing import Target, write_file


@dataclass(frozen=True, repr=False, eq=False)
class QuantizedCheckpoint:
    """A quantized state dict, and the file that it makes.

    Printed, it is a table: tensor, shape, groups, mean bits, and MB before entropy coding.

    Attributes:
        model: every tensor as it is stored.
        parts: the bytes of the file, to be written one after the other.
    """

    model: Snapshot
    parts: Sequence[bytes]

    @property
    def size_mb(self) -> float:
        """MB of the file."""
        return sum(map(len, self.parts)) / MEGABYTE

    def save(self, path: Target) -> int:
        """Writes the file, atomically; `diffq.load` and `diffq.open` read it.

        Args:
            path: where to; see `diffq.save`.

        Returns:
            Bytes of the file.

        Raises:
            ConfigError: neither a path nor a binary file was given.
            OSError: the file cannot be written.
        """
        return write_file(path, self.parts)

    def state_dict(self) -> dict[str, Tensor]:
        """The values that the file decodes to, for `load_state_dict`.

        Tied names share one tensor. All are on the CPU.
        """
        tensors = {name: record_tensor(record) for name, record in self.model.records.items()}
        return tensors | {alias: tensors[name] for alias, name in self.model.aliases.items()}

    def get_quantized_state(self, packed: bool = True) -> dict[str, Any]:
        """The quantized state, for `torch.save` and `diffq.restore_quantized_state`.

        Args:
            packed: store levels at each group's own bitwidth, and bitwidths in a bit map;
                False spells both out for a look inside.
        """
        return to_state(self.model, packed)

    def __repr__(self) -> str:
        records = self.model.records
        names = all_names(records, self.model.aliases)
        sizes = [
            record_size(names[name], record)
            for name, record in records.items()
            if isinstance(record, GridRecord)
        ]
        raw = sum(r.stored_bits() for r in records.values() if not isinstance(r, GridRecord))
        title = f"{type(self).__name__}, a file of {self.size_mb:.4f} MB"
        return f"{title}\n{size_rows(sizes, raw, len(records))}"


def quantize_checkpoint(
    state: Mapping[str, Any],
    target_mb: float | None = None,
    *,
    bits: int | None = None,
    sensitivity: Source | None = None,
    group_size: int | None = None,
    per_channel: bool = False,
    min_size: float = 0.01,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    float16: bool = False,
    codec: Codec = "rans",
    metadata: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> QuantizedCheckpoint:
    """Quantizes the state dict of a trained model, without data or training.

    With `target_mb`, groups of weights get bitwidths for which the file just fits and the
    squared error is small, or with `sensitivity` what the error costs. With `bits`, all
    weights get one bitwidth. The state dict stays as it is. `diffq pack` is this function.

    Args:
        state: name to tensor, as `model.state_dict()` gives it. Tied names share memory.
        target_mb: most MB of the file, everything included.
        bits: one bitwidth for all weights, 1 to 15, in place of `target_mb`.
        sensitivity: how much an error in each weight costs, to choose bitwidths by. It is a
            trained Adam or the like, or its `state_dict()`, whose second moments tell; or a
            result of `diffq.sensitivity`; or a dict of names to numbers from 0, one for the
            tensor or one for each weight, such as squared gradients.
        group_size: consecutive weights that share a bitwidth, 0 for the whole tensor; by
            default 64 with `target_mb`, and the whole tensor with `bits`.
        per_channel: one range and one bitwidth for each slice along the first dimension.
        min_size: quantize tensors of more than this many MB in float32.
        include: name patterns; if there are any, only tensors that match are quantized.
        exclude: name patterns of tensors that are stored as they are.
        float16: store floats that are not quantized as float16.
        codec: see `diffq.save`.
        metadata: see `diffq.save`.
        report: called with what is being done, the steps done and the steps in all. By
            default, a progress bar on stderr, if that is a terminal.

    Returns:
        The quantized state dict, with `save(path)`, `state_dict()` and `size_mb`.

    Raises:
        ConfigError: an argument breaks a rule, nothing fits, a pattern matches nothing, an
            entry is no dense tensor, or the sensitivity is not that of the state dict.
        WeightError: a weight to quantize holds NaN or Inf, or does not fit float16.
        FormatError: the metadata is no JSON object, or a name is not storable.

    Examples:
        >>> small = diffq.quantize_checkpoint(model.state_dict(), 2.5, sensitivity=optimizer)
        >>> small.save("model.diffq")
    """
    _check_state(state)
    _check_choice(target_mb, bits, sensitivity)
    if per_channel and group_size:
        raise ConfigError(
            f"Groups are those of group_size or one for each channel, got group_size={group_size} "
            "and per_channel=True. Leave one of them out."
        )
    # Checks both before the work, on a model without tensors.
    encode_parts({}, None, metadata, codec)
    if group_size is None and target_mb is not None:
        group_size = GROUP_SIZE
    rules = Rules(min_size, include, exclude, float16=float16)
    settings = Settings(group_size, per_channel, rules)
    with _progress(report) as tell:
        if bits is None:
            most = int((target_mb or 0) * MEGABYTE)
            fitted = quantize_to_size(state, most, settings, codec, metadata, tell, sensitivity)
        else:
            tell("quantizing", 0, 0)
            model = quantize_state(state, bits, settings)
            fitted = Fitted(model, encode_parts(model.records, model.aliases, metadata, codec))
    return QuantizedCheckpoint(fitted.snapshot, fitted.parts)


def _check_state(state: Any) -> None:
    if not isinstance(state, Mapping):
        got = "a model" if isinstance(state, nn.Module) else f"{type(state).__name__}"
        raise ConfigError(
            f"quantize_checkpoint needs a state dict, got {got}. Pass model.state_dict(); read "
            "files with torch.load or safetensors.torch.load_file, or run `diffq pack` on them."
        )
    if state.get("format") == FORMAT:
        raise ConfigError(
            "The state is quantized already, and would lose precision once more. Write it as it "
            "is with diffq.save(state, path)."
        )
    learned = next((name for name in state if LEARNED in str(name).split(".")), None)
    if learned is not None:
        raise ConfigError(
            f"The state dict of a model with a quantizer has entries of it, such as {learned!r}. "
            "Save the bits that were learned with diffq.save(quantizer, path), or call "
            "quantizer.detach() first."
        )


def _check_choice(target_mb: Any, bits: Any, sensitivity: Any) -> None:
    if (target_mb is None) == (bits is None):
        got = "neither" if bits is None else "both"
        raise ConfigError(
            f"The size is given by target_mb, or by bits for all weights, got {got}. Pass one."
        )
    if target_mb is not None:
        check_number(target_mb, "target_mb", 0)
    elif sensitivity is not None:
        raise ConfigError(
            "sensitivity chooses bitwidths for a size, got bits, one for all weights. "
            "Pass target_mb in its place, or leave sensitivity out."
        )


def _progress(report: Report | None) -> AbstractContextManager[Report]:
    return _progress_bar() if report is None else nullcontext(report)


@contextmanager
def _progress_bar() -> Iterator[Report]:
    with ProgressBar("quantizing", 0) as bar:

        def tell(what: str, done: int, total: int) -> None:
            bar.done, bar.total = done, total
            bar.advance(0, what)

        yield tell
