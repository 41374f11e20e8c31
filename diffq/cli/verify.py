"""`diffq verify`: whether files are sound, to the last byte. Needs no torch."""

from __future__ import annotations

import argparse
from typing import Any

from diffq.cli.common import Subparsers, add_budget, add_command, budget, print_json, progress, say
from diffq.cli.kinds import check_diffq
from diffq.errors import DiffqError
from diffq.reports.text import printable


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "verify",
        run,
        "check every byte of files",
        "Checks structure and checksums of each file, and that every tensor decodes. "
        "The exit code is 0 if all files are sound, else 1.",
        "diffq verify model.diffq\ndiffq verify --quiet models/*.diffq && rsync models/ host:",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="a file of diffq")
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    results = []
    with progress(args) as report:
        for number, path in enumerate(args.files):
            several = len(args.files) if len(args.files) > 1 else 0
            report(f"checking {printable(path)}", number, several)
            results.append(_check(path, budget(args)))
    if args.json:
        print_json(results)
    else:
        for result in results:
            _print(result, args.quiet)
    return 0 if all(result["ok"] for result in results) else 1


def _check(path: str, most: int | None) -> dict[str, Any]:
    from diffq.storage.open import verify

    try:
        check_diffq(path)
        verify(path, most)
    except (DiffqError, OSError) as error:
        return {"file": path, "ok": False, "error": " ".join(str(error).split())}
    return {"file": path, "ok": True, "error": None}


def _print(result: dict[str, Any], quiet: bool) -> None:
    if not result["ok"]:
        say(f"{printable(result['file'])}: FAILED: {printable(result['error'])}")
    elif not quiet:
        say(f"{printable(result['file'])}: ok")
