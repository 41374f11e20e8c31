"""The command line: `diffq COMMAND`, or `python -m diffq COMMAND`.

Each command is a module with `add_parser(subparsers)`, which names the function that
runs it. NumPy, torch and safetensors are imported when a command needs them. rich, which
makes tables for terminals, may be missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import diffq
from diffq.cli.common import is_out_of_memory
from diffq.cli.completion import add_parser as add_completion
from diffq.cli.convert import add_parser as add_convert
from diffq.cli.diff import add_parser as add_diff
from diffq.cli.inspect import add_parser as add_inspect
from diffq.cli.pack import add_parser as add_pack
from diffq.cli.report import add_parser as add_report
from diffq.cli.unpack import add_parser as add_unpack
from diffq.cli.verify import add_parser as add_verify
from diffq.errors import DiffqError
from diffq.reports.text import printable

#: What `diffq --help` lists, in its order. A command from elsewhere is added here.
COMMANDS = (
    add_inspect,
    add_report,
    add_verify,
    add_pack,
    add_unpack,
    add_diff,
    add_convert,
)

_EPILOG = """\
exit codes:
  0  done; what was checked is sound
  1  damaged, not fitting, not readable, or any other error (one line on stderr)
  2  the command line itself is wrong

MB is 2**20 bytes. `diffq COMMAND --help` has examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows a question mark.
        getattr(stream, "reconfigure", lambda errors: None)(errors="replace")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        if error.filename:
            return _fail(str(error))
        # Whoever read the output has seen enough. Python flushes once more at exit.
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (DiffqError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("The memory does not suffice for this model.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "diffq",
        description="Looks into model files of diffq, checks, makes, unpacks and compares them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffq {diffq.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_parser in COMMANDS:
        add_parser(subparsers)
    add_completion(subparsers, parser)
    return parser


def _fail(message: str) -> int:
    print("diffq: error:", printable(" ".join(message.split())), file=sys.stderr)
    return 1
