"""`diffq completion`: a script that completes commands, options and files in a shell."""

from __future__ import annotations

import argparse

from diffq.cli.common import Subparsers, say
from diffq.errors import missing_package

#: The shells that a script can be made for.
SHELLS = ("bash", "zsh", "fish")

# How the commands name arguments that are files.
_FILES = ("FILE", "OTHER", "CHECKPOINT", "OUT", "A", "B")

_DESCRIPTION = """\
Prints the script on stdout. Put it where your shell looks for completions:

  bash  diffq completion bash > ~/.local/share/bash-completion/completions/diffq
  zsh   diffq completion zsh > DIR/_diffq, where DIR is a folder of $fpath
  fish  diffq completion fish > ~/.config/fish/completions/diffq.fish
"""


def add_parser(subparsers: Subparsers, whole: argparse.ArgumentParser) -> None:
    """Adds the command.

    Args:
        subparsers: where to.
        whole: the parser of all commands.
    """
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="your shell")
    parser.set_defaults(run=lambda args: _run(args.shell, whole, subparsers))


def _run(shell: str, parser: argparse.ArgumentParser, subparsers: Subparsers) -> int:
    try:
        import shtab
    except ImportError as error:
        raise missing_package("shtab", "A completion script", "cli") from error
    for command in subparsers.choices.values():
        for action in command._actions:
            if action.metavar in _FILES:
                action.complete = shtab.FILE
    say(shtab.complete(parser, shell))
    return 0
