"""`diffq report`: a page about a file, or about two side by side. Needs no torch."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from diffq.cli.common import (
    add_budget,
    add_command,
    budget,
    check_output,
    megabytes,
    print_json,
    progress,
    say,
)
from diffq.cli.kinds import check_diffq
from diffq.reports.text import printable

if TYPE_CHECKING:
    from diffq.cli.common import Subparsers
    from diffq.reports.summary import Progress

_DESCRIPTION = """\
Writes a web page about a file: its size, where the bytes and the bits are, how the bits would
change in a smaller file, and a table of the tensors that sorts. With OTHER, the page shows both
files side by side, and what changed from FILE to OTHER. The page is one file, which loads nothing
from anywhere.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "report",
        run,
        "write a web page about a file, or about two",
        _DESCRIPTION,
        "diffq report model.diffq\ndiffq report old.diffq new.diffq -o changes.html",
    )
    parser.add_argument("file", metavar="FILE", help="a file of diffq")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a file to compare it with")
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help="the page to write (default: the last file's name with .html added, in this folder)",
    )
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from diffq.storage.writing import write_file

    paths = [args.file] if args.other is None else [args.file, args.other]
    out = args.out or f"{Path(paths[-1]).name}.html"
    for path in paths:
        check_diffq(path)
        check_output(out, path)
    with progress(args) as report:
        size = write_file(out, [_page(paths, budget(args), report).encode()])
    if args.json:
        print_json({"file": out, "bytes": size, "models": paths})
    elif not args.quiet:
        say(f"{printable(out)}: {megabytes(size)}")
    return 0


def _page(paths: list[str], most: int | None, report: Progress) -> str:
    from diffq.reports.comparison import comparison_page
    from diffq.reports.model import model_page
    from diffq.storage.open import StoredModel

    with ExitStack() as opened:
        readers = [opened.enter_context(StoredModel(path, most)).reader for path in paths]
        names = [Path(path).name for path in paths]
        if len(paths) == 1:
            return model_page(readers[0], names[0], report)
        return comparison_page(readers[0], readers[1], (names[0], names[1]), report)
