"""What the commands share: their parsers, tables, progress bars and JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffq.errors import ConfigError
from diffq.quantizers.tables import table
from diffq.storage.writing import check_target

if TYPE_CHECKING:
    from rich.table import Table

    from diffq.format.kinds.base import Record

MEGABYTE = 2**20

#: What `parser.add_subparsers` returns.
Subparsers = Any  # argparse has no public name for it
#: Told what is being done, the steps done and the steps in all.
Report = Callable[[str, int, int], None]

# Wide enough for a table without folded names.
_WIDE = 10_000
_NAME_WIDTH = 20


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Adds a command with the options that all commands have.

    Args:
        subparsers: where to.
        name: the command's name.
        run: called with the parsed arguments; returns the exit code.
        summary: one line for `diffq --help`.
        description: what the command does, for its own help.
        examples: command lines, one per line.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no progress, notes or confirmations"
    )
    return parser


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Adds the option for files that decode to more than is plausible."""
    parser.add_argument(
        "--budget-mb",
        type=positive,
        metavar="MB",
        help="memory that the tensors may decode to (default: 8 MB and 1024 times the file's size)",
    )


def budget(args: argparse.Namespace) -> int | None:
    """The bytes of `--budget-mb`."""
    return None if args.budget_mb is None else int(args.budget_mb * MEGABYTE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or torch says that there is no more memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch has no class of its own for the memory of the CPU.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def check_output(out: str, source: str) -> None:
    """Checks, before the work, that a command can write its output and keeps its input.

    Raises:
        ConfigError: the output is the input.
        OSError: the output cannot be written.
    """
    check_target(out)
    if os.path.exists(out) and os.path.samefile(out, source):
        raise ConfigError(
            f"The output must be another file than the input, got {out} for both. "
            "Choose another name."
        )


def level_counts(record: Record) -> dict[int, int]:
    """Weights at each bitwidth, by rising bitwidth; none where no levels are stored."""
    from diffq.format.kinds.levels import LevelRecord

    levels = record.coded if isinstance(record, LevelRecord) else None
    return levels.counts() if levels else {}


def coded_bits(record: Record) -> tuple[int, int]:
    """Bits of all levels or indices of a tensor, and the number of weights they stand for."""
    if record.coded is None:
        return 0, 0
    counts = record.coded.counts()
    return sum(width * count for width, count in counts.items()), record.numel


def mean_bits(coded: Iterable[tuple[int, int]]) -> float | None:
    """Bits per weight of what `coded_bits` counted for some tensors; None without weights."""
    pairs = list(coded)
    weights = sum(count for _, count in pairs)
    return sum(bits for bits, _ in pairs) / weights if weights else None


def error_measures(error: float, power: float) -> dict[str, float | None]:
    """Relative error and signal-to-noise ratio in dB; None where there is no finite one.

    Args:
        error: the squared norm of an error.
        power: the squared norm of the reference.
    """
    if not (power > 0 and math.isfinite(error) and math.isfinite(power)):
        return {"relative_error": None, "snr_db": None}
    # Roots and logarithms first, because the quotient can be too large or too small for a float.
    return {
        "relative_error": finite(math.sqrt(error) / math.sqrt(power)),
        "snr_db": 10 * (math.log10(power) - math.log10(error)) if error else None,
    }


def finite(value: float) -> float | None:
    """A number that JSON has, or None."""
    return value if math.isfinite(value) else None


def positive(text: str) -> float:
    """Parses a number above 0, of which as many MB are a finite number of bytes."""
    value = float(text)
    if not 0 < value * MEGABYTE < float("inf"):
        raise ValueError
    return value


def nonnegative(text: str) -> float:
    """Parses a number from 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def whole(text: str) -> int:
    """Parses a whole number from 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def printable(text: str) -> str:
    """Text from a file without what a terminal would obey, such as escape sequences."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def megabytes(size: float) -> str:
    """Bytes as MB, with as many digits as small models need."""
    return f"{size / MEGABYTE:.3f} MB"


def ratio(value: float | None, unit: str = "", digits: int = 2) -> str:
    """A number with its unit, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def print_json(value: Any) -> None:
    """Prints JSON that any terminal and parser takes."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[str] | None = None,
    left: int = 1,
) -> None:
    """Prints rows under a header on stdout; the first `left` columns are aligned to the left.

    A terminal gets a table of rich, if that is installed, which folds long names.
    """
    if not (sys.stdout.isatty() and _has_rich()):
        print(table(header, rows, left, footer))
        return
    from rich.console import Console
    from rich.measure import Measurement

    folded = _rich_table(header, rows, footer, left)
    wide = Console(width=_WIDE)
    least = Measurement.get(wide, wide.options, folded).minimum
    # A terminal narrower than that wraps the lines by itself.
    console = Console(emoji=False, highlight=False)
    console.print(folded, width=max(console.width, least), crop=False, soft_wrap=True)


def _rich_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[str] | None,
    left: int,
) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    folded = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_footer=footer is not None,
    )
    for number, title in enumerate(header):
        # Only the names are folded to fit the terminal, and not to less than a few characters.
        folded.add_column(
            title,
            footer[number] if footer else "",
            justify="left" if number < left else "right",
            overflow="fold",
            no_wrap=number > 0,
            min_width=0 if number else _NAME_WIDTH,
        )
    for row in rows:
        # As Text, so that brackets in names are no markup.
        folded.add_row(*map(Text, row))
    return folded


def say(text: str) -> None:
    """Prints a line on stdout."""
    print(text)


def note(args: argparse.Namespace, text: str) -> None:
    """Prints a line on stderr, unless `--quiet`."""
    if not args.quiet:
        print("diffq: note:", printable(" ".join(text.split())), file=sys.stderr)


@contextmanager
def progress(args: argparse.Namespace) -> Iterator[Report]:
    """A progress bar on stderr, if that is a terminal, rich is installed, and not `--quiet`."""
    if args.quiet or not (sys.stderr.isatty() and _has_rich()):
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        # A total of 0 has no end to show: the bar pulses.
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total or None
        )


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True
